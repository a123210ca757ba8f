"""Softmax attention: the reference against a loop over every pair, everything else against it."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from seqzoo.kernels.attention import attention
from tests.tolerances import assert_close_to_reference

B, T, H, K, V = 2, 37, 4, 5, 7
W = 8
NAN = float("nan")


def alibi(distance):
    heads = torch.arange(1, H + 1, device=distance.device)
    slopes = torch.exp2(-heads.float())[:, None, None]
    return -slopes * distance.abs()[..., None, :, :]


def inputs(T=T, S=None, G=H, K=K, V=V, dtype=torch.float32, B=B):
    S = T if S is None else S
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, V))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def padded(where, S=T):
    mask = torch.ones(B, S, dtype=torch.bool)
    if where == "left":
        mask[0, : S // 3] = False
    elif where == "right":
        mask[0, -S // 3 :] = False
    else:
        mask[:, 1:] = torch.rand(B, S - 1) > 0.4
    mask[1, S // 2] = False
    return mask


def packed(S=T):
    cuts = torch.zeros(B, S, dtype=torch.long)
    cuts[0, [5, 6, 20]] = 1
    cuts[1, S - 1] = 1
    return cuts.cumsum(1)


def compare(case, T=T, S=None, G=H, dtype=torch.float32, **sizes):
    """Output and every gradient of `chunked` against the float64 reference, same rounded inputs."""
    given = inputs(T, S, G, dtype=dtype, **sizes)
    exact = [x.detach().double().requires_grad_() for x in given]
    o, ref = attention(*given, **case), attention(*exact, backend="reference", **case)
    weight = torch.randn_like(o)
    got = torch.autograd.grad(o, given, weight)
    wanted = torch.autograd.grad(ref, exact, weight.double())
    assert o.dtype == dtype
    assert_close_to_reference(o, ref)
    for name, a, b in zip("qkv", got, wanted, strict=True):
        assert_close_to_reference(a, b, gradient=True, name=f"gradient of {name}")


CASES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "scaled": {"scale": 0.7},
    "left padding": {"mask": padded("left")},
    "padding inside": {"mask": padded("inside")},
    "right padding": {"mask": padded("right")},
    "bidirectional padding": {"mask": padded("inside"), "causal": False},
    "documents": {"document": packed()},
    "padded documents": {"document": packed(), "mask": padded("inside")},
    "softcap": {"softcap": 1.5},
    "softcap of documents": {"softcap": 1.5, "document": packed(), "bias": alibi},
    "bias by distance": {"bias": alibi},
    "bias by padded distance": {"bias": alibi, "mask": padded("inside")},
    "bias by given places": {"bias": alibi, "index": 3 * torch.arange(T).expand(B, T)},
    "bias of every pair": {"bias": torch.randn(B, 1, T, T)},
    "bias of the keys": {"bias": torch.randn(T)},
    "window": {"window": W},
    "window of one": {"window": 1},
    "bidirectional window": {"window": W, "causal": False},
    "window beyond the sequence": {"window": 100, "sinks": 2},
    "window, left padding": {"window": W, "mask": padded("left")},
    "window, padding inside": {"window": W, "mask": padded("inside")},
    "window, bidirectional padding": {"window": W, "mask": padded("inside"), "causal": False},
    "window, documents": {"window": W, "document": packed(), "mask": padded("inside")},
    "window, bias": {"window": W, "bias": alibi},
    "window, bias, padding": {"window": W, "bias": alibi, "mask": padded("inside")},
    "window, bias of every pair": {"window": W, "bias": torch.randn(H, T, T)},
    "window, softcap": {"window": W, "softcap": 1.5},
    "sinks": {"window": W, "sinks": 3},
    "sinks, left padding": {"window": W, "sinks": 3, "mask": padded("left"), "bias": alibi},
    "sinks, padding inside": {"window": W, "sinks": 3, "mask": padded("inside")},
    "sinks of documents": {"window": 3, "sinks": 2, "document": packed()},
    "sinks of padded documents": {
        "window": 3,
        "sinks": 2,
        "document": packed(),
        "mask": padded("inside"),
    },
}


@pytest.mark.parametrize("groups", [H, 2, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunked_is_the_reference_in_output_and_gradients(case, groups):
    compare(case, G=groups)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_the_sum_over_every_pair(case):
    q, k, v = inputs(G=2, dtype=torch.float64)
    ref = attention(q, k, v, backend="reference", **case)
    torch.testing.assert_close(ref, by_hand(q, k, v, **case), atol=1e-12, rtol=1e-12)


def by_hand(
    q,
    k,
    v,
    causal=True,
    window=None,
    bias=None,
    document=None,
    mask=None,
    index=None,
    sinks=0,
    scale=None,
    softcap=None,
):
    """A loop over pairs of tokens, written from the docstring."""
    B, T, H, K = q.shape
    G = k.shape[2]
    o = torch.zeros(B, T, H, v.shape[3], dtype=v.dtype)
    there = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    document = torch.zeros(B, T) if document is None else document
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(H // G, 2))
    scores = scores * (K**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    for b in range(B):
        real = [t for t in range(T) if there[b, t]]
        for nth, t in enumerate(real):
            mine = [s for s in real if document[b, s] == document[b, t]]
            seen = []
            for s in mine:
                near = window is None or abs(nth - real.index(s)) < window
                if (near or mine.index(s) < sinks) and (s <= t or not causal):
                    seen.append(s)
            row = scores[b, :, t, seen]
            for i, s in enumerate(seen):
                if callable(bias):
                    distance = nth - real.index(s) if index is None else index[b, t] - index[b, s]
                    row[:, i] += bias(torch.tensor([[int(distance)]]))[..., 0, 0]
                elif bias is not None:
                    row[:, i] += bias.expand(B, H, T, T)[b, :, t, s]
            values = v[b, seen].repeat_interleave(H // G, 1)
            o[b, t] = torch.einsum("hs,shv->hv", row.softmax(-1), values)
    return o


@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 3 * W + 7])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_is_itself_and_the_tokens_before_at_every_block_edge(length, causal):
    q, k, v = inputs(length, dtype=torch.float64)
    t = torch.arange(length)
    band = (t[:, None] - t).abs() < W
    band = band & (t[:, None] >= t) if causal else band
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    weights = scores.masked_fill(~band, -math.inf).softmax(-1)
    wanted = torch.einsum("bhts,bshv->bthv", weights, v)
    got = attention(q, k, v, causal=causal, window=W)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", [1, W, W + 3, 3 * W + 7])
@pytest.mark.parametrize("before", [1, W - 1, 2 * W + 5])
@pytest.mark.parametrize("case", [{}, {"window": W}, {"window": W, "sinks": 2}, {"bias": alibi}])
def test_queries_are_the_last_of_more_keys(case, before, length):
    compare(case, length, before + length, G=2)
    compare(case | {"mask": padded("inside", before + length)}, length, before + length)
    whole = torch.randn(B, before + length, H, K, dtype=torch.float64)
    _, k, v = inputs(length, before + length, dtype=torch.float64)
    late = attention(whole[:, before:], k, v, **case)
    torch.testing.assert_close(late, attention(whole, k, v, **case)[:, before:])


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"causal": False},
        {"window": 7, "bias": alibi},
        {"document": packed(36)},
        {"mask": padded("inside", 36), "softcap": 2.0},
    ],
    ids=["causal", "bidirectional", "window and bias", "documents", "mask and softcap"],
)
def test_a_layout_of_blocks_is_its_mask_of_tokens(more, dense):
    layout = torch.eye(12, dtype=torch.bool)
    layout[:, 0] = True
    layout[4] = False  # a whole row of blocks that sees nothing
    if dense:
        layout[5:] = True
    compare(more | {"layout": layout}, 36, G=2)
    q, k, v = inputs(36, dtype=torch.float64)
    tokens = layout.repeat_interleave(3, 0).repeat_interleave(3, 1)
    barred = torch.zeros(36, 36, dtype=torch.float64).masked_fill(~tokens, -1e9)
    if "bias" not in more:
        o = attention(q, k, v, layout=layout, **more)
        seen = o.abs().sum((2, 3)) > 0
        wanted = attention(q, k, v, bias=barred, **more)
        torch.testing.assert_close(o[seen], wanted[seen])
        assert not o[:, 12:15].any()


def test_keys_of_another_length_need_no_causality():
    compare({"causal": False}, 9, 25, G=2)
    compare({"causal": False, "mask": padded("inside", 25)}, 9, 25)
    compare({"causal": False, "layout": torch.eye(3, 5, dtype=torch.bool)}, 9, 25)
    compare({"causal": False, "layout": torch.eye(3, 5, dtype=torch.bool)}, 24, 5)


MODES = [{}, {"window": W}, {"window": W, "sinks": 2}, {"bias": alibi}, {"softcap": 1.0}]


@pytest.mark.parametrize("case", [*MODES, {"mask": padded("inside")}, {"document": packed()}])
def test_changing_the_future_leaves_the_past_unchanged_to_the_bit(case):
    q, k, v = inputs()
    o = attention(q, k, v, **case)
    for t in (1, W, 20):
        changed = [torch.cat([x[:, :t], 1e4 * torch.randn_like(x[:, t:])], 1) for x in (q, k, v)]
        assert torch.equal(attention(*changed, **case)[:, :t], o[:, :t])
        past = torch.autograd.grad(o[:, :t].square().sum(), (q, k, v), retain_graph=True)
        assert not any(g[:, t:].any() for g in past)


@pytest.mark.parametrize("case", [*MODES, {"causal": False}])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(case, backend):
    mask = padded("inside")
    mask[1] = False
    given = inputs()
    o = attention(*given, mask=mask, backend=backend, **case)
    assert not o[~mask].any()
    assert o[mask].any(-1).all()
    grads = torch.autograd.grad(o.sum(), given)
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[~mask].any() for g in grads)


@pytest.mark.parametrize("case", [*MODES, {"causal": False}])
def test_what_a_masked_token_contains_reaches_nobody(case):
    mask = padded("inside")
    q, k, v = inputs()
    junk = [torch.where(mask[..., None, None], x, 1e3 * torch.randn_like(x)) for x in (q, k, v)]
    o = attention(q, k, v, mask=mask, **case)
    assert torch.equal(attention(*junk, mask=mask, **case)[mask], o[mask])


@pytest.mark.parametrize("case", [*MODES, {"causal": False, "window": 3}])
def test_a_padded_row_is_the_row_without_its_padding(case):
    mask = padded("inside")
    q, k, v = inputs(dtype=torch.float64)
    o = attention(q, k, v, mask=mask, **case)
    for b in range(B):
        alone = attention(*(x[b : b + 1, mask[b]] for x in (q, k, v)), **case)
        torch.testing.assert_close(o[b : b + 1, mask[b]], alone)


@pytest.mark.parametrize("case", [*MODES, {"causal": False, "window": 3}])
def test_packed_documents_are_separate_sequences(case):
    document = packed()
    q, k, v = inputs(dtype=torch.float64)
    o = attention(q, k, v, document=document, **case)
    for b in range(B):
        for name in document[b].unique():
            here = document[b] == name
            alone = attention(*(x[b : b + 1, here] for x in (q, k, v)), **case)
            torch.testing.assert_close(o[b : b + 1, here], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MODES)
def test_half_precision_is_computed_in_float32(case, dtype):
    compare(case, dtype=dtype, G=2)


def test_autocast_does_not_reach_the_kernel():
    given = inputs()
    o = attention(*given, window=W)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*given, window=W), o)


@pytest.mark.parametrize(
    "case", [{}, {"window": 3, "sinks": 1, "mask": padded("inside", 7), "bias": alibi}]
)
def test_gradcheck(case):
    given = inputs(7, G=2, K=3, V=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **case), given, nondet_tol=0.0)


@pytest.mark.parametrize("case", [{}, {"window": W}])
def test_a_bias_learns(case):
    q, k, v = inputs(dtype=torch.float64)
    slopes = torch.rand(H, 1, 1, dtype=torch.float64, requires_grad=True)
    grads = []
    for backend in ("chunked", "reference"):

        def bias(distance):
            return -slopes * distance[..., None, :, :]

        o = attention(q, k, v, bias=bias, backend=backend, **case)
        grads.append(torch.autograd.grad(o.square().sum(), slopes)[0])
    assert_close_to_reference(*grads)


EDGES = [*MODES, {"window": W, "mask": True}, {"document": True}, {"causal": False}]


def filled(case, rows, S):
    full = torch.ones(rows, S, dtype=torch.bool)
    named = {"mask": full, "document": full.long()}
    return {name: named.get(name, value) for name, value in case.items()}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("rows", "length"), [(0, 9), (2, 0), (0, 0)])
def test_nothing_in_nothing_out(case, backend, rows, length):
    given = inputs(length, B=rows)
    o = attention(*given, backend=backend, **filled(case, rows, length))
    assert o.shape == (rows, length, H, V)
    grads = torch.autograd.grad(o.sum(), given)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("case", EDGES)
def test_meta_tensors_give_the_shape(case):
    q, k, v = (x.to("meta") for x in inputs())
    case = {
        name: x.to("meta") if isinstance(x, torch.Tensor) else x
        for name, x in filled(case, B, T).items()
    }
    assert attention(q, k, v, **case).shape == (B, T, H, V)


@pytest.mark.parametrize("case", EDGES)
def test_any_layout_in_memory_gives_the_same(case):
    given = inputs(dtype=torch.float64)
    case = filled(case, B, T)
    strided = [x.detach().transpose(0, 3).contiguous().transpose(0, 3) for x in given]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(attention(*strided, **case), attention(*given, **case))
    q, k, v = (x[:1].expand(B, -1, -1, -1) for x in given)
    torch.testing.assert_close(
        attention(q, k, v, **case), attention(*(x.contiguous() for x in (q, k, v)), **case)
    )


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", EDGES)
def test_no_uninitialised_memory_is_read(case):
    given = inputs()
    o = attention(*given, **filled(case, B, T))
    assert o.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), given))


COMPILED = {
    "plain": {},
    "window": {"window": W, "sinks": 2},
    "bias": {"window": W, "bias": alibi, "mask": padded("inside")},
    "documents": {"document": packed(), "softcap": 2.0},
    "layout": {"layout": torch.eye(T, dtype=torch.bool)},
}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_compiles_whole_and_gives_the_same(case):
    given = inputs(G=2)
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, **case), fullgraph=True, backend="aot_eager"
    )
    o, wanted = compiled(*given), attention(*given, **case)
    torch.testing.assert_close(o, wanted)
    for a, b in zip(
        torch.autograd.grad(o.sum(), given), torch.autograd.grad(wanted.sum(), given), strict=True
    ):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The most elements in a tensor, and whether any mask was made."""

    elements, masks = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple) else (made,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
                self.masks += x.dtype == torch.bool
        return made


def test_plain_attention_makes_no_mask_and_no_square():
    given = inputs(2048, B=1)
    with Largest() as made:
        attention(*given).sum().backward()
    assert made.masks == 0
    assert made.elements <= 2048 * H * max(K, V)


@pytest.mark.parametrize("case", [{}, {"bias": alibi}, {"mask": True}, {"sinks": 2}])
def test_a_window_takes_memory_in_proportion_to_length(case):
    length = 4096
    given = inputs(length, B=1)
    with Largest() as made:
        attention(*given, window=W, **filled(case, 1, length)).sum().backward()
    assert made.elements <= length * H * max(2 * W + 2, 3 * V)


def test_a_sparse_layout_computes_its_blocks_only():
    length = 4096
    layout = torch.eye(256, dtype=torch.bool)
    layout[:, 0] = True
    with Largest() as made:
        attention(*inputs(length, B=1), layout=layout).sum().backward()
    assert made.elements <= length * 2 * H * 16


def test_the_definition_multiplies_every_pair():
    q, k, v = inputs(9, G=2)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, window=3, backend="reference")
    assert counter.get_total_flops() == 2 * B * H * 9 * 9 * (K + V)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (B, T, 3, K), "v": (B, T, 3, V)}, "n_heads=4 is not divisible by n_kv_heads=3"),
        ({"k": (B, T, H, K + 1)}, r"k is \(2, 37, 4, 6\)"),
        ({"v": (B, T - 1, H, V)}, r"v is \(2, 36, 4, 7\)"),
        ({"q": (T, H, K)}, r"q is \(37, 4, 5\); attention takes"),
        ({"q": (B, T + 1, H, K)}, "T=38 queries cannot be the last of S=37 keys"),
        ({"q": (B, 1, H, K), "causal": False, "window": 3}, "need T == S"),
        ({"mask": torch.ones(B, T - 1, dtype=torch.bool)}, "mask is"),
        ({"document": torch.ones(B, T - 1)}, "document is"),
        ({"layout": torch.ones(5, 5, dtype=torch.bool)}, "T=37 is not divisible by query blocks"),
        ({"layout": torch.ones(T, T)}, "it must be bool"),
        ({"bias": torch.ones(B, H, 1, T - 1)}, r"\(B, H, T, S\) here is"),
        ({"window": 0}, "window=0 is not allowed"),
        ({"sinks": -1}, "sinks=-1 is not allowed"),
        ({"softcap": -1.0}, "softcap=-1.0 is not allowed"),
        ({"backend": "native"}, "no backend of attention named 'native'"),
    ],
)
def test_wrong_shapes_and_options_are_refused_by_name(change, message):
    given = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V)} | change
    tensors = {n: torch.zeros(x) if n in ("q", "k", "v") else x for n, x in given.items()}
    with pytest.raises(ValueError, match=message):
        attention(tensors.pop("q"), tensors.pop("k"), tensors.pop("v"), **tensors)
