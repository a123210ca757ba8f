"""Test-time training against a float64 loop over time, flash-linear-attention, and autograd."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from seqzoo.kernels.ttt import chunked, ttt
from seqzoo.kernels.ttt.reference import gradient
from tests.fla_naive import fla_naive
from tests.tolerances import EXACT, assert_close_to_reference, law_budget, relative_error

TOKENS = ("q", "k", "v", "rate", "share")
SHAPES = [(2, 70, 2, 5, 8), (3, 33, 1, 4, 6), (1, 16, 3, 2, 7)]  # B, T, H, K, V


def inputs(B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Float64, with the gradients of an unfinished mini-batch in the state."""
    made = {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "rate": torch.rand(B, T, H) / 4,
        "share": torch.rand(B, T, H),
        "W": torch.randn(H, K, V) / 4,
        "b": torch.randn(H, V) / 4,
        "norm_weight": 1 + torch.randn(H, V) / 4,
        "norm_bias": torch.randn(H, V) / 4,
        "initial_state": torch.randn(B, 2, H, K + 1, V) / 4,
    }
    return {name: x.double() for name, x in made.items()}


def slots(T: int, size: int, start: Tensor, **flags: Tensor) -> Tensor:
    """The place of each token, counted one by one."""
    rows = []
    for row, count in enumerate(start.tolist()):
        places = []
        for t in range(T):
            if "reset" in flags and flags["reset"][row, t]:
                count = 0
            places.append(count)
            if "mask" not in flags or flags["mask"][row, t]:
                count = (count + 1) % size
        rows.append(places)
    return torch.tensor(rows).view(len(start), T)


def options(B: int, T: int, size: int, flagged: bool = True) -> dict[str, object]:
    """Rows that go on with a mini-batch at different places; masks and documents of any length."""
    flags = {}
    if flagged:
        mask = torch.rand(B, T) < 0.7
        mask[0, : T // 5] = False
        mask[-1, T - T // 6 :] = False
        flags = {"mask": mask, "reset": (torch.rand(B, T) < 0.1) & mask}
    start = torch.arange(3, 3 + B) % size
    return {"mini_batch": size, "slot": slots(T, size, start, **flags), **flags}


def leaves(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: x.detach().to(dtype if name in ("q", "k", "v") else wide).requires_grad_()
        for name, x in given.items()
    }


def everything(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output, last state and all gradients of one fixed function of both."""
    o, state = ttt(**given, **options)
    if (mask := options.get("mask")) is not None:
        o = torch.where(mask[..., None, None], o, 0)
    loss = sum((x * exact(x)).sum().double() for x in (o, state))
    grads = torch.autograd.grad(loss, list(given.values()), materialize_grads=True)
    named = {f"gradient of {name}": g for name, g in zip(given, grads, strict=True)}
    return {"output": o.detach(), "state": state.detach(), **named}


def exact(x: Tensor) -> Tensor:
    """Numbers that every dtype holds exactly."""
    return ((torch.arange(x.numel()) * 7 % 13 - 4) / 8).view(x.shape).to(x.dtype)


def truth(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    return everything(leaves(given, torch.float64), **options, backend="reference")


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, out in found.items():
        gradient = name.startswith("gradient")
        assert_close_to_reference(out, wanted[name], dtype, gradient=gradient, name=name)


def cut(given: dict[str, Tensor], tokens: slice | Tensor) -> dict[str, Tensor]:
    return {name: x[:, tokens] if name in TOKENS else x for name, x in given.items()}


def test_the_gradient_is_that_of_the_loss():
    Z, v = torch.randn(2, 7, 5).double().requires_grad_(), torch.randn(2, 7, 5).double()
    weight, bias = torch.randn(2, 1, 5).double(), torch.randn(2, 1, 5).double()
    loss = (weight * layer_norm(Z, (5,), eps=1e-3) + bias - v).square().sum() / 2
    (wanted,) = torch.autograd.grad(loss, Z)
    assert relative_error(gradient(Z, v, weight, bias, 1e-3), wanted) <= EXACT


@pytest.mark.parametrize("T", [64, 70, 5])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_equals_flash_linear_attention_with_its_eta_at_the_token_that_reads(backend, T):
    given = {n: x.float() for n, x in inputs(2, T, 2, 6, 6).items()}
    given["rate"], given["initial_state"] = torch.ones_like(given["rate"]), None
    base, size = torch.cat([given["W"], given["b"][:, None]], dim=1), 16
    wanted, W, b = fla_naive("ttt").chunk_ttt_linear_ref(
        given["q"].clone(),  # they scale it in place
        given["k"],
        given["v"] + given["k"],  # theirs is to be answered with v - k
        given["norm_weight"],
        given["norm_bias"],
        given["share"][..., None].clone(),
        scale=1.0,
        mini_batch_size=size,
        initial_state=given["W"].expand(2, -1, -1, -1),
        initial_state_bias=given["b"][None, :, None].expand(2, -1, -1, -1),
        output_final_state=True,
    )
    slot = slots(T, size, torch.zeros(2, dtype=torch.long))
    o, state = ttt(**given, slot=slot, mini_batch=size, backend=backend)
    size = o.shape[-1:]
    normed = given["norm_weight"] * layer_norm(o, size, eps=1e-6) + given["norm_bias"]
    assert relative_error(o + normed, wanted) <= 1e-5
    if T % 16 == 0:  # they close the last mini-batch, whatever is in it
        last = base + state[:, 0]
        assert relative_error(last, torch.cat([W, b], dim=2)) <= 1e-5
        assert (state[:, 1] == 0).all()


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mini_batches_are_the_loop_in_every_number_with_masks_and_resets(shape, size):
    given, rest = inputs(*shape), options(*shape[:2], size)
    found = everything(leaves(given, torch.float64), **rest)
    compare(found, truth(given, **rest), torch.float64)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 40])
def test_every_length_around_the_borders_of_mini_batches(T):
    given, rest = inputs(2, T, 2, 3, 4), options(2, T, 16, flagged=False)
    compare(everything(leaves(given, torch.float64), **rest), truth(given, **rest), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_stays_in_budget_on_the_same_rounded_inputs(dtype, poisoned_empty):
    given, rest = leaves(inputs(2, 150, 2, 16, 12), dtype), options(2, 150, 16)
    compare(everything(given, **rest), truth(given, **rest), dtype)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_reset_row_is_separate_documents(backend):
    T, cuts = 90, (0, 1, 2, 18, 34, 64, 90)
    given = inputs(1, T, 2, 3, 4)
    given["initial_state"] = 1e6 * given["initial_state"]  # what leaks shows
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[:, list(cuts[:-1])] = True
    slot = slots(T, 16, torch.tensor([7]), reset=reset)
    o, state = ttt(**given, slot=slot, reset=reset, backend=backend)
    for start, stop in pairwise(cuts):
        alone = cut(given, slice(start, stop)) | {"initial_state": None}
        slot = slots(stop - start, 16, torch.zeros(1, dtype=torch.long))
        wanted, last = ttt(**alone, slot=slot, backend="reference")
        assert relative_error(o[:, start:stop], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_masked_tokens_are_as_if_they_were_not_there(backend):
    given, rest = inputs(1, 80, 2, 3, 4), options(1, 80, 16)
    mask = rest["mask"]
    junk = {
        name: torch.where(mask.view(1, 80, *[1] * (x.ndim - 2)), x, torch.nan)
        if name in TOKENS
        else x
        for name, x in given.items()
    }
    rest["slot"] = torch.where(mask, slots(80, 16, torch.tensor([3]), mask=mask), 15)
    o, state = ttt(**junk, slot=rest["slot"], mask=mask, backend=backend)
    alone = cut(given, mask[0])
    slot = slots(int(mask.sum()), 16, torch.tensor([3]))
    wanted, last = ttt(**alone, slot=slot, backend="reference")
    assert relative_error(o[:, mask[0]], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT


@pytest.mark.parametrize("sizes", [(1,) * 40, (1, 2, 31, 6), (0, 33, 7, 0)], ids=str)
def test_any_split_is_one_pass_in_outputs_state_and_gradients(sizes):
    given, rest = inputs(2, 40, 2, 3, 4), options(2, 40, 8)
    results = []
    for parts in ((40,), sizes):
        x = {name: y.clone().requires_grad_() for name, y in given.items()}
        state, outputs, start = x["initial_state"], [], 0
        for size in parts:
            span = slice(start, start + size)
            flags = {n: f if n == "mini_batch" else f[:, span] for n, f in rest.items()}
            o, state = ttt(**cut(x, span) | {"initial_state": state}, **flags)
            outputs.append(o)
            start += size
        o = torch.where(rest["mask"][..., None, None], torch.cat(outputs, dim=1), 0)
        loss = (o * o.detach().sin()).sum() + (state * state.detach().cos()).sum()
        results.append([o, state, *torch.autograd.grad(loss, list(x.values()))])
    for whole, split in zip(*results, strict=True):
        assert relative_error(split, whole) <= law_budget(torch.float64)


@pytest.mark.parametrize("T", [1, 2, 9])
def test_gradcheck(T):
    tensors, rest = leaves(inputs(1, T, 2, 2, 3), torch.float64), options(1, T, 4)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ttt(**dict(zip(tensors, values, strict=True)), **rest)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=T > 2)


def test_only_the_last_state_or_only_the_outputs_may_be_used():
    given, rest = leaves(inputs(2, 40, 1, 3, 4), torch.float64), options(2, 40, 16)
    for which in (0, 1):
        found, wanted = (
            torch.autograd.grad(
                ttt(**given, **rest, backend=backend)[which][0].square().sum(),
                list(given.values()),
                materialize_grads=True,
            )
            for backend in ("chunked", "reference")
        )
        assert all(relative_error(a, b) <= 2 * EXACT for a, b in zip(found, wanted, strict=True))


def test_the_future_is_never_read():
    given, rest = inputs(2, 50, 1, 4, 3), options(2, 50, 16, flagged=False)
    o = ttt(**given, **rest)[0]
    for t in (1, 13, 16, 31, 49):
        other = {
            name: torch.cat([x[:, :t], 10 * x[:, t:].flip(1)], dim=1) if name in TOKENS else x
            for name, x in given.items()
        }
        assert torch.equal(ttt(**other, **rest)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("T", [0, 1, 40])
@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_no_rows_and_no_tokens_leave_the_state(backend, B, T):
    given, slot = inputs(B, T, 2, 3, 4), torch.zeros(B, T, dtype=torch.long)
    o, state = ttt(**given, slot=slot, backend=backend)
    assert o.shape == (B, T, 2, 4)
    assert state.shape == (B, 2, 2, 4, 4)
    if T == 0:
        assert torch.equal(state, given["initial_state"])
    _, state = ttt(**given, slot=slot, mask=slot > 0, backend=backend)
    assert torch.equal(state, given["initial_state"])


def test_work_in_groups_is_work_at_once(monkeypatch):
    given, rest = inputs(2, 100, 2, 3, 4), options(2, 100, 8)
    found = everything(leaves(given, torch.float64), **rest)
    monkeypatch.setattr(chunked, "GROUP", 2)
    for name, other in everything(leaves(given, torch.float64), **rest).items():
        assert relative_error(other, found[name]) <= EXACT


def test_half_precision_keeps_a_float32_state_and_autocast_does_not_reach_the_products():
    given, rest = leaves(inputs(2, 40, 2, 4, 3), torch.bfloat16), options(2, 40, 16)
    o, state = ttt(**given, **rest)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    wide = leaves(given, torch.float32)
    plain = everything(wide, **rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(wide, **rest)
    assert all(torch.equal(inside[name], plain[name]) for name in plain)


@pytest.mark.parametrize("T", [1, 40])
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(T):
    given, rest = leaves(inputs(2, T, 2, 4, 6), torch.bfloat16), options(2, T, 16, flagged=False)
    real = ttt(**given, **rest)
    rest["slot"] = rest["slot"].to("meta")
    meta = ttt(**{name: x.detach().to("meta") for name, x in given.items()}, **rest)
    for a, b in zip(meta, real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


@pytest.mark.parametrize("T", [1, 40])
def test_compiled_without_graph_breaks_it_is_the_same(T):
    given, rest = leaves(inputs(2, T, 1, 4, 3), torch.float64), options(2, T, 16)

    def run(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ttt(**given, **rest)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, wanted = (
        [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], list(given.values()))]
        for outputs in (compiled(given), run(given))
    )
    assert all(relative_error(a, b) <= EXACT for a, b in zip(found, wanted, strict=True))


def test_opcheck():
    given, rest = leaves(inputs(2, 20, 2, 4, 3), torch.float64), options(2, 20, 8)
    rate, share = (given[n].detach()[..., None].requires_grad_() for n in ("rate", "share"))
    weight, bias = (
        given[f"norm_{n}"].detach()[:, None].requires_grad_() for n in ("weight", "bias")
    )
    W = torch.randn(2, 5, 3).double().requires_grad_()
    q, k = (torch.randn(2, 20, 2, 5).double().requires_grad_() for _ in range(2))
    model = (W, weight, bias, given["initial_state"])
    flags = (rest["slot"], rest["reset"], rest["mask"], 8, 1e-6)
    torch.library.opcheck(
        torch.ops.seqzoo.ttt.default, (q, k, given["v"], rate, share, *model, *flags)
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q": (2, 9, 2, 3)}, "q is"),
        ({"k": (2, 9, 10)}, "ttt takes"),
        ({"v": (2, 9, 3, 4)}, "k is"),
        ({"rate": (2, 9, 2, 1)}, "rate is"),
        ({"share": (2, 9)}, "share is"),
        ({"slot": (2, 8)}, "slot is"),
        ({"W": (2, 5, 4)}, "W is"),
        ({"b": (2, 4)}, "b is"),
        ({"norm_bias": (3,)}, "norm_bias is"),
        ({"initial_state": (2, 2, 2, 5, 3)}, "initial_state is"),
        ({"mask": (1, 9)}, "mask is"),
        ({"backend": "native"}, "no backend of ttt"),
        ({"mini_batch": 0}, "mini_batch=0 is not allowed"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changed, words):
    shapes = {
        "q": (2, 9, 2, 5),
        "k": (2, 9, 2, 5),
        "v": (2, 9, 2, 3),
        "rate": (2, 9, 2),
        "share": (2, 9, 2),
        "slot": (2, 9),
        "W": (2, 5, 3),
        "b": (2, 3),
        "norm_weight": (2, 3),
        "norm_bias": (2, 3),
        **changed,
    }
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        ttt(**given)
