"""Decayed linear attention against a float64 loop over time, and against closed forms."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import seqzoo.kernels.decay.chunked as chunked
import seqzoo.kernels.decay.native as native
from seqzoo.kernels.decay import decay
from seqzoo.kernels.dispatch import BACKENDS
from tests.tolerances import EXACT, assert_close_to_reference, budget, law_budget, relative_error

HERE = [b for b in BACKENDS["decay"] if "triton" not in b.needs]  # Triton's have their own tests
NAMES = [b.name for b in HERE if not b.refusal("cpu", torch.float32, ())]
FAST = [name for name in NAMES if name != "reference"]
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 100)
KINDS = ("none", "scalar", "vector")
HALF = (torch.float16, torch.bfloat16)
# B, T, Hk, value heads of each, K, V
SHAPES = [(2, 70, 2, 1, 5, 7), (1, 65, 1, 9, 4, 3), (3, 33, 3, 1, 1, 1), (2, 40, 2, 2, 16, 8)]
READS = [("after", False), ("before", False), ("before", True)]


def inputs(
    B: int, T: int, Hk: int, R: int, K: int, V: int, *, kind: str, bonus: bool = False
) -> dict[str, Tensor]:
    """Float64; decays from mild to strong."""
    H = Hk * R
    made = {
        "q": torch.randn(B, T, Hk, K),
        "k": torch.randn(B, T, Hk, K),
        "v": torch.randn(B, T, H, V),
        "initial_state": torch.randn(B, H, K, V),
    }
    if kind != "none":
        shape = (B, T, H) if kind == "scalar" else (B, T, H, K)
        made["log_decay"] = -torch.rand(shape) * 2.0 ** torch.randint(-6, 3, shape)
    if bonus:
        made["bonus"] = torch.randn(H, K)
    return {name: x.double() for name, x in made.items()}


def flags(B: int, T: int) -> dict[str, Tensor]:
    """Junk in the middle, at the left and at the right; documents of every length, 1 included."""
    mask = torch.rand(B, T) < 0.7
    mask[0, : T // 5] = False
    mask[-1, T - T // 6 :] = False
    return {"mask": mask, "reset": (torch.rand(B, T) < 0.1) & mask}


def leaves(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As somebody would call it: with half-precision q, k and v, the others are float32."""
    wide = torch.promote_types(dtype, torch.float32)
    narrow = ("q", "k", "v")
    return {
        name: x.detach().to(dtype if name in narrow else wide).requires_grad_()
        for name, x in given.items()
    }


def everything(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output, last state and all gradients of one fixed function of both."""
    o, state = decay(**given, **options)
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


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "bonus"), READS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_are_the_loop_in_every_number_with_masks_and_resets(
    shape, read, bonus, kind, backend
):
    given = inputs(*shape, kind=kind, bonus=bonus)
    options = flags(*shape[:2]) | {"read": read, "scale": 0.7}
    found = everything(leaves(given, torch.float64), **options, backend=backend)
    compare(found, truth(given, **options), torch.float64)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("T", LENGTHS)
def test_every_length_around_chunk_borders(T, read, kind, backend):
    given = inputs(2, T, 2, 1, 3, 4, kind=kind)
    found = everything(leaves(given, torch.float64), read=read, backend=backend)
    compare(found, truth(given, read=read), torch.float64)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_stays_in_budget_on_the_same_rounded_inputs(kind, dtype, backend, poisoned_empty):
    given = leaves(inputs(2, 150, 2, 2, 24, 20, kind=kind, bonus=True), dtype)
    options = flags(2, 150) | {"read": "before"}
    compare(everything(given, **options, backend=backend), truth(given, **options), dtype)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("value", [-1e-3, -0.0123])
def test_error_does_not_grow_with_length_when_a_decay_near_one_is_constant(value, kind, backend):
    # a rounded exp(g) in each step would be off the same way thousands of times
    given = inputs(1, 2000, 1, 1, 2, 2, kind=kind)
    given["log_decay"] = torch.full_like(given["log_decay"], value)
    given = {name: x.float() for name, x in given.items()}
    found = everything(leaves(given, torch.float32), backend=backend)
    compare(found, truth(given), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_error_stays_in_budget_over_many_chunks(kind):
    given = inputs(1, 16384, 1, 1, 5, 4, kind=kind)
    given = {name: x.float() for name, x in given.items()}
    compare(everything(leaves(given, torch.float32), backend="native"), truth(given), torch.float32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("value", [0.0, -1e-8, -20.0, -88.0, -1e4, -torch.inf])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_hostile_decays_everywhere_are_finite_and_exact(kind, value, backend):
    given = inputs(2, 70, 2, 1, 4, 3, kind=kind)
    given["log_decay"] = torch.full_like(given["log_decay"], value)
    found = everything(leaves(given, torch.float32), backend=backend)
    assert all(x.isfinite().all() for x in found.values())
    rounded = {name: x.float() for name, x in given.items()}
    wanted = truth(rounded)
    compare(found, wanted, torch.float32)
    # its own scale, not that of the other gradients: sums that cancel would leave noise here
    allowed = budget(torch.float32, gradient=True)
    name = "gradient of log_decay"
    assert (found[name] - wanted[name]).norm() <= allowed * wanted[name].norm() + 1e-38


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_one_strong_decay_does_not_spoil_mild_ones_beside_it(kind, backend):
    # exp(G_i - G_j) with sums from the chunk's start loses all digits behind a -1e4
    given = inputs(2, 128, 1, 1, 4, 4, kind=kind)
    given["log_decay"] = -0.05 * torch.rand_like(given["log_decay"])
    for t, value in ((0, -1e4), (31, -88.0), (32, -torch.inf), (40, -1e4), (63, -1e4), (64, -1e4)):
        given["log_decay"][:, t] = value
    given = {name: x.float() for name, x in given.items()}
    found = everything(leaves(given, torch.float32), backend=backend)
    compare(found, truth(given), torch.float32)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "bonus"), READS)
def test_a_reset_row_is_separate_documents_bit_by_bit_of_state(read, bonus, kind, backend):
    T, cuts = 90, (0, 1, 2, 31, 32, 64, 90)
    given = inputs(1, T, 2, 1, 3, 4, kind=kind, bonus=bonus)
    given["initial_state"] = 1e6 * given["initial_state"]  # what leaks shows
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[:, list(cuts[:-1])] = True
    o, state = decay(**given, read=read, reset=reset, backend=backend)
    for start, stop in pairwise(cuts):
        alone = cut(given, slice(start, stop)) | {"initial_state": None}
        wanted, last = decay(**alone, read=read, backend="reference")
        assert relative_error(o[:, start:stop], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "bonus"), READS)
def test_masked_tokens_are_as_if_they_were_not_there(read, bonus, kind, backend):
    given = inputs(1, 80, 2, 1, 3, 4, kind=kind, bonus=bonus)
    mask = flags(1, 80)["mask"]
    junk = {
        name: torch.where(mask.view(1, 80, *[1] * (x.ndim - 2)), x, -1e3) if in_time(name) else x
        for name, x in given.items()
    }
    o, state = decay(**junk, read=read, mask=mask, backend=backend)
    wanted, last = decay(**cut(given, mask[0]), read=read, backend="reference")
    assert o.isfinite().all()
    assert relative_error(o[:, mask[0]], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT


def in_time(name: str) -> bool:
    return name not in ("bonus", "initial_state")


def cut(given: dict[str, Tensor], tokens: slice | Tensor) -> dict[str, Tensor]:
    return {name: x[:, tokens] if in_time(name) else x for name, x in given.items()}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "bonus"), READS)
@pytest.mark.parametrize("sizes", [(1,) * 40, (1, 2, 31, 6), (0, 33, 7, 0)], ids=str)
def test_any_split_is_one_pass_in_outputs_state_and_gradients(sizes, read, bonus, kind, backend):
    given = inputs(2, 40, 2, 1, 3, 4, kind=kind, bonus=bonus)
    options = flags(2, 40)
    results = []
    for parts in ((40,), sizes):
        x = {name: y.clone().requires_grad_() for name, y in given.items()}
        state, outputs, start = x["initial_state"], [], 0
        for size in parts:
            span = slice(start, start + size)
            now = cut(x, span) | {"initial_state": state}
            now |= {name: x[:, span] for name, x in options.items()}
            o, state = decay(**now, read=read, backend=backend)
            outputs.append(o)
            start += size
        o = torch.where(options["mask"][..., None, None], torch.cat(outputs, dim=1), 0)
        loss = (o * o.detach().sin()).sum() + (state * state.detach().cos()).sum()
        results.append([o, state, *torch.autograd.grad(loss, list(x.values()))])
    for whole, split in zip(*results, strict=True):
        assert relative_error(split, whole) <= law_budget(torch.float64)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("T", [1, 2, 64, 65, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, T, backend):
    given = inputs(1, T, 1, 2, 2, 2, kind=kind, bonus=True)
    options = flags(1, T)
    tensors = leaves(given, torch.float64)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(tensors, values, strict=True))
        return decay(**inputs, read="before", **options, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)
    del tensors["bonus"]

    def run_after(*values: Tensor) -> tuple[Tensor, Tensor]:
        return decay(**dict(zip(tensors, values, strict=True)), **options, backend=backend)

    assert torch.autograd.gradcheck(run_after, tuple(tensors.values()), fast_mode=T > 2)


@pytest.mark.parametrize("backend", FAST)
def test_only_the_last_state_or_only_the_outputs_may_be_used(backend):
    given = leaves(inputs(2, 40, 1, 1, 3, 4, kind="vector"), torch.float64)
    for which in (0, 1):
        found, wanted = (
            torch.autograd.grad(
                decay(**given, backend=name)[which].square().sum(),
                list(given.values()),
                materialize_grads=True,
            )
            for name in (backend, "reference")
        )
        assert all(relative_error(a, b) <= 2 * EXACT for a, b in zip(found, wanted, strict=True))


def test_scalar_decay_is_the_attention_matrix_of_the_paper():
    # Dao and Gu, equation (16): Y = (L o C B^T) X, L_ij = a_{j+1} ... a_i
    given = inputs(2, 50, 2, 1, 4, 3, kind="scalar") | {"initial_state": None}
    q, k, v, g = (given[name].transpose(1, 2) for name in ("q", "k", "v", "log_decay"))
    G = g.cumsum(-1)
    L = (G[..., :, None] - G[..., None, :]).exp().tril()
    wanted = ((L * (q @ k.mT)) @ v).transpose(1, 2)
    assert relative_error(decay(**given)[0], wanted) <= 1e-11


def test_heads_that_share_keys_and_queries_are_repeated_in_runs():
    given = inputs(2, 40, 2, 3, 4, 3, kind="scalar")
    copied = given | {n: given[n].repeat_interleave(3, dim=2) for n in ("q", "k")}
    found, wanted = decay(**given), decay(**copied)
    assert all(relative_error(a, b) <= EXACT for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_never_read(kind, backend):
    given = inputs(2, 100, 1, 1, 4, 3, kind=kind)
    o = decay(**given, backend=backend)[0]
    for t in (1, 31, 32, 50, 99):
        other = {
            name: torch.cat([x[:, :t], 1e4 * x[:, t:]], dim=1) if in_time(name) else x
            for name, x in given.items()
        }
        assert torch.equal(decay(**other, backend=backend)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("T", [0, 1, 40])
@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("backend", NAMES)
def test_no_rows_and_no_tokens_leave_the_state(backend, B, T):
    given = inputs(B, T, 2, 1, 3, 4, kind="vector")
    o, state = decay(**given, backend=backend)
    assert o.shape == (B, T, 2, 4)
    assert state.shape == (B, 2, 3, 4)
    if T == 0:
        assert torch.equal(state, given["initial_state"])


@pytest.mark.parametrize("backend", NAMES)
def test_half_precision_keeps_a_float32_state_and_autocast_does_not_reach_the_products(backend):
    given = leaves(inputs(2, 70, 1, 2, 4, 3, kind="scalar"), torch.bfloat16)
    o, state = decay(**given, backend=backend)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    wide = {name: x.detach().float() for name, x in given.items()}
    plain = decay(**wide, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decay(**wide, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_autocast_around_the_backward_pass_does_not_reach_it(backend):
    given = {n: x.float() for n, x in inputs(2, 70, 1, 2, 4, 3, kind="vector").items()}
    plain = everything(leaves(given, torch.float32), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(leaves(given, torch.float32), backend=backend)
    assert all(torch.equal(inside[name], plain[name]) for name in plain)


@pytest.mark.parametrize("backend", FAST)
def test_layout_in_memory_changes_nothing(backend):
    given = inputs(2, 70, 2, 1, 4, 6, kind="vector")
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in given.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    found = everything(leaves(given, torch.float64), backend=backend)
    leaf = {name: x.requires_grad_() for name, x in strided.items()}
    for name, other in everything(leaf, backend=backend).items():
        assert torch.equal(other, found[name])


def test_work_in_parts_is_work_at_once(monkeypatch):
    given = inputs(2, 200, 2, 1, 4, 6, kind="vector")
    found = everything(leaves(given, torch.float64), backend="chunked")
    monkeypatch.setattr(chunked, "CACHED", 1)
    for name, other in everything(leaves(given, torch.float64), backend="chunked").items():
        assert relative_error(other, found[name]) <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind):
    given = inputs(1, 130, 1, 10, 40, 30, kind=kind)  # ten heads of a key: more tasks than keys
    one = everything(leaves(given, torch.float32), backend="native")
    torch.set_num_threads(2)
    two = everything(leaves(given, torch.float32), backend="native")
    assert all(torch.equal(two[name], one[name]) for name in one)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_widths_beside_whole_vectors(kind):
    for K, V in ((5, 7), (16, 17), (33, 64), (70, 16)):
        given = inputs(1, 70, 1, 2, K, V, kind=kind)
        given = {name: x.float() for name, x in given.items()}
        compare(
            everything(leaves(given, torch.float32), backend="native"), truth(given), torch.float32
        )


@pytest.mark.parametrize("T", [1, 2, 33, 100])
@pytest.mark.parametrize("read", ["after", "before"])
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(T, read):
    given = leaves(inputs(2, T, 2, 2, 4, 6, kind="scalar"), torch.bfloat16)
    real = decay(**given, read=read)
    meta = decay(**{name: x.detach().to("meta") for name, x in given.items()}, read=read)
    for a, b in zip(meta, real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


@pytest.mark.parametrize(("kind", "T"), [("scalar", 1), ("vector", 70)])
def test_compiled_without_graph_breaks_it_is_the_same(kind, T):
    given = leaves(inputs(2, T, 1, 1, 4, 3, kind=kind, bonus=True), torch.float64)
    options = flags(2, T)

    def run(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return decay(**given, read="before", **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, wanted = (
        [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], list(given.values()))]
        for outputs in (compiled(given), run(given))
    )
    assert all(relative_error(a, b) <= EXACT for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("kind", "T"), [("scalar", 40), ("vector", 2)])
def test_opcheck(kind, T, backend):
    given = leaves(inputs(2, T, 2, 1, 4, 3, kind=kind), torch.float64)
    g = given["log_decay"].detach().view(2, T, 2, -1).requires_grad_()
    arguments = (given["q"], given["k"], given["v"], g, given["initial_state"], backend)
    torch.library.opcheck(torch.ops.seqzoo.decay.default, arguments)


@pytest.mark.parametrize(
    ("backend", "chunk"), [("native", native.CHUNK), ("chunked", chunked.CHUNK)]
)
def test_what_is_kept_for_the_backward_pass_is_inputs_and_chunk_states_only(backend, chunk):
    B, T, H, K, V = 2, 500, 2, 8, 8
    given = leaves(inputs(B, T, H, 1, K, V, kind="vector"), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        decay(**given, backend=backend)
    chunks = -(-T // chunk)
    allowed = sum(x.numel() for x in given.values()) + (chunks + 1) * B * H * K * V
    assert sum(x.numel() for x in kept) <= allowed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q": (2, 9, 2, 3)}, "q is"),
        ({"v": (2, 9, 3, 4)}, "not divisible by heads of k=2; nearest: 2, 4"),
        ({"log_decay": (2, 9, 1)}, "log_decay is"),
        ({"log_decay": (2, 9, 4, 1)}, "log_decay is"),
        ({"initial_state": (2, 4, 4, 3)}, "initial_state is"),
        ({"bonus": (4, 5)}, 'needs read="before"'),
        ({"bonus": (2, 5), "read": "before"}, "bonus is"),
        ({"read": "befor"}, "nearest: before"),
        ({"reset": (2, 8)}, "reset is"),
        ({"mask": (1, 9)}, "mask is"),
        ({"backend": "other"}, "no backend of decay"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changed, words):
    shapes = {"q": (2, 9, 2, 5), "k": (2, 9, 2, 5), "v": (2, 9, 4, 3), **changed}
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        decay(**given)
