"""The delta rule against a float64 loop over time, closed forms, and flash-linear-attention."""

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import seqzoo.kernels.decay.chunked as shared
from seqzoo.kernels.delta import delta
from tests.tolerances import EXACT, assert_close_to_reference, law_budget, relative_error

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 100)
KINDS = ("none", "scalar", "vector")
HALF = (torch.float16, torch.bfloat16)
SHAPES = [(2, 70, 2, 5, 3), (1, 65, 3, 4, 7), (3, 33, 1, 1, 1)]  # B, T, H, K, V


def inputs(B: int, T: int, H: int, K: int, V: int, *, kind: str) -> dict[str, Tensor]:
    """Float64; keys of norm 1, betas in (0, 2), decays from mild to strong."""
    made = {
        "q": torch.randn(B, T, H, K),
        "k": normalize(torch.randn(B, T, H, K), dim=-1),
        "v": torch.randn(B, T, H, V),
        "beta": 2 * torch.rand(B, T, H),
        "initial_state": torch.randn(B, H, K, V),
    }
    if kind != "none":
        shape = (B, T, H) if kind == "scalar" else (B, T, H, K)
        made["log_decay"] = -torch.rand(shape) * 2.0 ** torch.randint(-6, 3, shape)
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
    return {
        name: x.detach().to(dtype if name in ("q", "k", "v") else wide).requires_grad_()
        for name, x in given.items()
    }


def everything(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output, last state and all gradients of one fixed function of both."""
    o, state = delta(**given, **options)
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
        assert_close_to_reference(
            out, wanted[name], dtype, family="delta", gradient=gradient, name=name
        )


def cut(given: dict[str, Tensor], tokens: slice | Tensor) -> dict[str, Tensor]:
    return {name: x if name == "initial_state" else x[:, tokens] for name, x in given.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_are_the_loop_in_every_number_with_masks_and_resets(shape, kind):
    given = inputs(*shape, kind=kind)
    options = flags(*shape[:2]) | {"scale": 0.7}
    found = everything(leaves(given, torch.float64), **options)
    compare(found, truth(given, **options), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", LENGTHS)
def test_every_length_around_chunk_borders(T, kind):
    given = inputs(2, T, 2, 3, 4, kind=kind)
    compare(everything(leaves(given, torch.float64)), truth(given), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_stays_in_budget_on_the_same_rounded_inputs(kind, dtype, poisoned_empty):
    given = leaves(inputs(2, 150, 2, 24, 20, kind=kind), dtype)
    options = flags(2, 150)
    compare(everything(given, **options), truth(given, **options), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_identical_keys_and_constant_betas_do_not_blow_up_the_triangular_inverse(beta, kind):
    # at 2 each write turns the sign of what the key holds: nothing ever decays
    given = {name: x.float() for name, x in inputs(2, 200, 2, 16, 8, kind=kind).items()}
    given["k"] = torch.full_like(given["k"], 0.25)  # of norm 1, exactly
    given["beta"] = torch.full_like(given["beta"], beta)
    compare(everything(leaves(given, torch.float32)), truth(given), torch.float32)


@pytest.mark.parametrize("value", [0.0, -1e-8, -88.0, -1e4, -torch.inf])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_hostile_decays_everywhere_are_finite_and_exact(kind, value):
    given = {name: x.float() for name, x in inputs(2, 70, 2, 4, 3, kind=kind).items()}
    given["log_decay"] = torch.full_like(given["log_decay"], value)
    found = everything(leaves(given, torch.float32))
    assert all(x.isfinite().all() for x in found.values())
    compare(found, truth(given), torch.float32)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_one_strong_decay_does_not_spoil_mild_ones_beside_it(kind):
    # exp(G_i - G_j) with sums from the chunk's start loses all digits behind a -1e4
    given = {name: x.float() for name, x in inputs(2, 128, 1, 4, 4, kind=kind).items()}
    given["log_decay"] = -0.05 * torch.rand_like(given["log_decay"])
    for t, value in ((0, -1e4), (31, -88.0), (32, -torch.inf), (40, -1e4), (63, -1e4), (64, -1e4)):
        given["log_decay"][:, t] = value
    compare(everything(leaves(given, torch.float32)), truth(given), torch.float32)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_row_is_separate_documents(kind, backend):
    T, cuts = 90, (0, 1, 2, 31, 32, 64, 90)
    given = inputs(1, T, 2, 3, 4, kind=kind)
    given["initial_state"] = 1e6 * given["initial_state"]  # what leaks shows
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[:, list(cuts[:-1])] = True
    o, state = delta(**given, reset=reset, backend=backend)
    for start, stop in pairwise(cuts):
        alone = cut(given, slice(start, stop)) | {"initial_state": None}
        wanted, last = delta(**alone, backend="reference")
        assert relative_error(o[:, start:stop], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_as_if_they_were_not_there(kind, backend):
    given = inputs(1, 80, 2, 3, 4, kind=kind)
    mask = flags(1, 80)["mask"]
    junk = {
        name: x
        if name == "initial_state"
        else torch.where(mask.view(1, 80, *[1] * (x.ndim - 2)), x, -1e30)
        for name, x in given.items()
    }
    o, state = delta(**junk, mask=mask, backend=backend)
    wanted, last = delta(**cut(given, mask[0]), backend="reference")
    assert relative_error(o[:, mask[0]], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT
    if backend == "chunked":
        assert o.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1,) * 40, (1, 2, 31, 6), (0, 33, 7, 0)], ids=str)
def test_any_split_is_one_pass_in_outputs_state_and_gradients(sizes, kind):
    given = inputs(2, 40, 2, 3, 4, kind=kind)
    options = flags(2, 40)
    results = []
    for parts in ((40,), sizes):
        x = {name: y.clone().requires_grad_() for name, y in given.items()}
        state, outputs, start = x["initial_state"], [], 0
        for size in parts:
            span = slice(start, start + size)
            now = cut(x, span) | {"initial_state": state}
            o, state = delta(**now, **{n: f[:, span] for n, f in options.items()})
            outputs.append(o)
            start += size
        o = torch.where(options["mask"][..., None, None], torch.cat(outputs, dim=1), 0)
        loss = (o * o.detach().sin()).sum() + (state * state.detach().cos()).sum()
        results.append([o, state, *torch.autograd.grad(loss, list(x.values()))])
    for whole, split in zip(*results, strict=True):
        assert relative_error(split, whole) <= law_budget(torch.float64)


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, T):
    tensors = leaves(inputs(1, T, 2, 2, 2, kind=kind), torch.float64)
    options = flags(1, T)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return delta(**dict(zip(tensors, values, strict=True)), **options)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=T > 2)


def test_only_the_last_state_or_only_the_outputs_may_be_used():
    given = leaves(inputs(2, 40, 1, 3, 4, kind="vector"), torch.float64)
    for which in (0, 1):
        found, wanted = (
            torch.autograd.grad(
                delta(**given, backend=backend)[which].square().sum(),
                list(given.values()),
                materialize_grads=True,
            )
            for backend in ("chunked", "reference")
        )
        assert all(relative_error(a, b) <= 2 * EXACT for a, b in zip(found, wanted, strict=True))


def test_orthonormal_keys_with_beta_one_are_a_dictionary():
    # what a key held is replaced, and every other key's value stays
    keys = torch.linalg.qr(torch.randn(8, 8).double())[0]
    order = torch.randint(0, 8, (100,))
    v = torch.randn(1, 100, 1, 3).double()
    k = keys[order].view(1, 100, 1, 8)
    _, state = delta(k, k, v, torch.ones(1, 100, 1).double())
    for i in order.unique():
        last = int((order == i).nonzero().max())
        assert relative_error(keys[i] @ state[0, 0], v[0, last, 0]) <= 1e-12


def naive(rule: str) -> ModuleType:
    """Their loops and chunks, from their own file: the package around it wants a GPU."""
    package = importlib.util.find_spec("fla")
    places = [] if package is None else list(package.submodule_search_locations or ())
    files = [p for place in places if (p := Path(place) / f"ops/{rule}/naive.py").is_file()]
    if not files:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{rule}", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_equals_the_recurrence_and_the_chunks_of_deltanet_in_flash_linear_attention():
    given = {n: x.float() for n, x in inputs(2, 96, 2, 8, 4, kind="none").items()}
    theirs = naive("delta_rule")
    start = given["initial_state"]
    turned = [given[n].transpose(1, 2) for n in ("q", "k", "v", "beta")]
    wanted, last = theirs.delta_rule_recurrence(*turned, initial_state=start)
    o, state = delta(**given, scale=8**-0.5)
    assert relative_error(o, wanted.transpose(1, 2)) <= 1e-5
    assert relative_error(state, last) <= 1e-5
    wanted = theirs.delta_rule_chunkwise(*turned)[0].transpose(1, 2)
    assert (
        relative_error(delta(**given | {"initial_state": None}, scale=8**-0.5)[0], wanted) <= 1e-5
    )


@pytest.mark.parametrize(
    ("rule", "loop", "kind", "order"),
    [
        ("gated_delta_rule", "naive_recurrent_gated_delta_rule", "scalar", ("beta", "log_decay")),
        ("kda", "naive_recurrent_kda", "vector", ("log_decay", "beta")),
    ],
    ids=["gated", "kda"],
)
def test_equals_the_gated_recurrences_of_flash_linear_attention(rule, loop, kind, order):
    given = {n: x.float() for n, x in inputs(2, 96, 2, 8, 4, kind=kind).items()}
    wanted, last = getattr(naive(rule), loop)(
        *(given[n] for n in ("q", "k", "v", *order)),
        initial_state=given["initial_state"],
        output_final_state=True,
    )
    o, state = delta(**given, scale=8**-0.5)
    assert relative_error(o, wanted) <= 1e-5
    assert relative_error(state, last) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_never_read(kind):
    given = inputs(2, 100, 1, 4, 3, kind=kind)
    o = delta(**given)[0]
    for t in (1, 31, 32, 50, 99):
        later = {n: x * (1 if n in ("k", "beta") else 1e4) for n, x in given.items()}
        other = {
            name: x if name == "initial_state" else torch.cat([x[:, :t], y[:, t:].flip(1)], dim=1)
            for (name, x), y in zip(given.items(), later.values(), strict=True)
        }
        assert torch.equal(delta(**other)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("T", [0, 1, 40])
@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_no_rows_and_no_tokens_leave_the_state(backend, B, T):
    given = inputs(B, T, 2, 3, 4, kind="vector")
    o, state = delta(**given, backend=backend)
    assert o.shape == (B, T, 2, 4)
    assert state.shape == (B, 2, 3, 4)
    if T == 0:
        assert torch.equal(state, given["initial_state"])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_half_precision_keeps_a_float32_state_and_autocast_does_not_reach_the_products(backend):
    given = leaves(inputs(2, 70, 2, 4, 3, kind="scalar"), torch.bfloat16)
    o, state = delta(**given, backend=backend)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    wide = {name: x.detach().float() for name, x in given.items()}
    plain = everything(leaves(wide, torch.float32), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(leaves(wide, torch.float32), backend=backend)
    names = ("output", "state") if backend == "reference" else plain
    assert all(torch.equal(inside[name], plain[name]) for name in names)


def test_layout_in_memory_changes_nothing():
    given = inputs(2, 70, 2, 4, 6, kind="vector")
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in given.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    found = everything(leaves(given, torch.float64))
    for name, other in everything({n: x.requires_grad_() for n, x in strided.items()}).items():
        assert torch.equal(other, found[name])


def test_work_in_parts_is_work_at_once(monkeypatch):
    given = inputs(2, 200, 2, 4, 6, kind="vector")
    found = everything(leaves(given, torch.float64))
    monkeypatch.setattr(shared, "CACHED", 1)
    for name, other in everything(leaves(given, torch.float64)).items():
        assert relative_error(other, found[name]) <= EXACT


@pytest.mark.parametrize("T", [1, 2, 33, 100])
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(T):
    given = leaves(inputs(2, T, 2, 4, 6, kind="scalar"), torch.bfloat16)
    real = delta(**given)
    meta = delta(**{name: x.detach().to("meta") for name, x in given.items()})
    for a, b in zip(meta, real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


@pytest.mark.parametrize(("kind", "T"), [("scalar", 1), ("vector", 70)])
def test_compiled_without_graph_breaks_it_is_the_same(kind, T):
    given = leaves(inputs(2, T, 1, 4, 3, kind=kind), torch.float64)
    options = flags(2, T)

    def run(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return delta(**given, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, wanted = (
        [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], list(given.values()))]
        for outputs in (compiled(given), run(given))
    )
    assert all(relative_error(a, b) <= EXACT for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("kind", "T"), [("scalar", 40), ("vector", 2)])
def test_opcheck(kind, T):
    given = leaves(inputs(2, T, 2, 4, 3, kind=kind), torch.float64)
    beta, g = (given[n].detach().view(2, T, 2, -1).requires_grad_() for n in ("beta", "log_decay"))
    arguments = (given["q"], given["k"], given["v"], beta, g, given["initial_state"])
    torch.library.opcheck(torch.ops.seqzoo.delta.default, (*arguments, "chunked"))


def test_what_is_kept_for_the_backward_pass_is_inputs_and_chunk_states_only():
    B, T, H, K, V = 2, 500, 2, 8, 8
    given = leaves(inputs(B, T, H, K, V, kind="vector"), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        delta(**given)
    chunks = shared.chunk_count(T)
    allowed = sum(x.numel() for x in given.values()) + (chunks + 1) * B * H * K * V
    assert sum(x.numel() for x in kept) <= allowed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q": (2, 9, 2, 3)}, "q is"),
        ({"k": (2, 9, 10)}, "delta takes"),
        ({"v": (2, 9, 3, 4)}, "k is"),
        ({"beta": (2, 9, 2, 1)}, "beta is"),
        ({"log_decay": (2, 9, 1)}, "log_decay is"),
        ({"log_decay": (2, 9, 2, 1)}, "log_decay is"),
        ({"initial_state": (2, 2, 4, 3)}, "initial_state is"),
        ({"reset": (2, 8)}, "reset is"),
        ({"mask": (1, 9)}, "mask is"),
        ({"backend": "native"}, "no backend of delta"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changed, words):
    shapes = {"q": (2, 9, 2, 5), "k": (2, 9, 2, 5), "v": (2, 9, 2, 3), "beta": (2, 9, 2), **changed}
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        delta(**given)
