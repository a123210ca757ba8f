"""Both delta rules against a float64 loop over time; the plain one against its closed form and fla.

What is special to the low-rank one is in `test_delta_lowrank.py`.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import seqzoo.kernels.decay.chunked as shared
from seqzoo.kernels.delta import delta
from tests.kernels.delta_rules import (
    ALL,
    FAST,
    GATED,
    backends,
    compare,
    cut,
    everything,
    flags,
    inputs,
    leaves,
    naive,
    over,
    rule,
    truth,
)
from tests.tolerances import EXACT, law_budget, relative_error

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 100)
HALF = (torch.float16, torch.bfloat16)
SHAPES = [(2, 70, 2, 5, 3), (1, 65, 3, 4, 7), (3, 33, 1, 1, 1)]  # B, T, H, K, V


@over(FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_are_the_loop_in_every_number_with_masks_and_resets(shape, kind, backend):
    given = inputs(*shape, kind=kind)
    options = flags(*shape[:2]) | {"scale": 0.7}
    found = everything(leaves(given, torch.float64), **options, backend=backend)
    compare(found, truth(given, **options), torch.float64)


@over(FAST)
@pytest.mark.parametrize("T", LENGTHS)
def test_every_length_around_chunk_borders(T, kind, backend):
    given = inputs(2, T, 2, 3, 4, kind=kind)
    found = everything(leaves(given, torch.float64), backend=backend)
    compare(found, truth(given), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@over(FAST)
def test_error_stays_in_budget_on_the_same_rounded_inputs(kind, backend, dtype, poisoned_empty):
    given = leaves(inputs(2, 150, 2, 24, 20, kind=kind), dtype)
    options = flags(2, 150)
    compare(everything(given, **options, backend=backend), truth(given, **options), dtype)


@over(FAST)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_identical_keys_and_constant_betas_do_not_blow_up_the_triangular_inverse(
    beta, kind, backend
):
    # at 2 each write turns the sign of what the key holds: nothing ever decays
    given = {name: x.float() for name, x in inputs(2, 200, 2, 16, 8, kind=kind).items()}
    same = torch.full_like(given["k"], 0.25)  # of norm 1, exactly
    given |= {"k": same, "a": -same, "b": beta * same} if "a" in given else {"k": same}
    if "beta" in given:
        given["beta"] = torch.full_like(given["beta"], beta)
    elif beta == 2:  # here the two decay apart, and what is taken is more than what was there
        given["log_decay"] = torch.zeros_like(given["log_decay"])
    found = everything(leaves(given, torch.float32), backend=backend)
    compare(found, truth(given), torch.float32)


@pytest.mark.parametrize("value", [0.0, -1e-8, -20.0, -59.0, -88.0, -1e4, -torch.inf])
@over(GATED)
def test_hostile_decays_everywhere_are_finite_and_exact(kind, backend, value):
    given = {name: x.float() for name, x in inputs(2, 70, 2, 4, 3, kind=kind).items()}
    given["log_decay"] = torch.full_like(given["log_decay"], value)
    found = everything(leaves(given, torch.float32), backend=backend)
    assert all(x.isfinite().all() for x in found.values())
    compare(found, truth(given), torch.float32)


@over(GATED)
def test_one_strong_decay_does_not_spoil_mild_ones_beside_it(kind, backend):
    # exp(G_i - G_j) with sums from the chunk's start loses all digits behind a -1e4
    given = {name: x.float() for name, x in inputs(2, 128, 1, 4, 4, kind=kind).items()}
    given["log_decay"] = -0.05 * torch.rand_like(given["log_decay"])
    for t, value in ((0, -1e4), (31, -88.0), (32, -torch.inf), (40, -1e4), (63, -1e4), (64, -1e4)):
        given["log_decay"][:, t] = value
    found = everything(leaves(given, torch.float32), backend=backend)
    compare(found, truth(given), torch.float32)


@over(ALL)
def test_a_reset_row_is_separate_documents(kind, backend):
    T, cuts = 90, (0, 1, 2, 31, 32, 64, 90)
    given = inputs(1, T, 2, 3, 4, kind=kind)
    given["initial_state"] = 1e6 * given["initial_state"]  # what leaks shows
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[:, list(cuts[:-1])] = True
    o, state = rule(**given, reset=reset, backend=backend)
    for start, stop in pairwise(cuts):
        alone = cut(given, slice(start, stop)) | {"initial_state": None}
        wanted, last = rule(**alone, backend="reference")
        assert relative_error(o[:, start:stop], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT


@over(ALL)
def test_masked_tokens_are_as_if_they_were_not_there(kind, backend):
    given = inputs(1, 80, 2, 3, 4, kind=kind)
    mask = flags(1, 80)["mask"]
    junk = {
        name: x
        if name == "initial_state"
        else torch.where(mask.view(1, 80, *[1] * (x.ndim - 2)), x, -1e30)
        for name, x in given.items()
    }
    o, state = rule(**junk, mask=mask, backend=backend)
    wanted, last = rule(**cut(given, mask[0]), backend="reference")
    assert relative_error(o[:, mask[0]], wanted) <= EXACT
    assert relative_error(state, last) <= EXACT
    if backend != "reference":
        assert o.isfinite().all()


@over(FAST)
@pytest.mark.parametrize("sizes", [(1,) * 40, (1, 2, 31, 6), (0, 33, 7, 0)], ids=str)
def test_any_split_is_one_pass_in_outputs_state_and_gradients(sizes, kind, backend):
    given = inputs(2, 40, 2, 3, 4, kind=kind)
    options = flags(2, 40)
    results = []
    for parts in ((40,), sizes):
        x = {name: y.clone().requires_grad_() for name, y in given.items()}
        state, outputs, start = x["initial_state"], [], 0
        for size in parts:
            span = slice(start, start + size)
            now = cut(x, span) | {"initial_state": state}
            here = {n: f[:, span] for n, f in options.items()}
            o, state = rule(**now, **here, backend=backend)
            outputs.append(o)
            start += size
        o = torch.where(options["mask"][..., None, None], torch.cat(outputs, dim=1), 0)
        loss = (o * o.detach().sin()).sum() + (state * state.detach().cos()).sum()
        results.append([o, state, *torch.autograd.grad(loss, list(x.values()))])
    for whole, split in zip(*results, strict=True):
        assert relative_error(split, whole) <= law_budget(torch.float64)


@pytest.mark.parametrize("T", [1, 2, 33])
@over(FAST)
def test_gradcheck(kind, backend, T):
    tensors = leaves(inputs(1, T, 2, 2, 2, kind=kind), torch.float64)
    options = flags(1, T)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return rule(**dict(zip(tensors, values, strict=True)), **options, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=T > 2)


@over(FAST)
def test_only_the_last_state_or_only_the_outputs_may_be_used(kind, backend):
    given = leaves(inputs(2, 40, 1, 3, 4, kind=kind), torch.float64)
    for which in (0, 1):
        found, wanted = (
            torch.autograd.grad(
                rule(**given, backend=name)[which].square().sum(),
                list(given.values()),
                materialize_grads=True,
            )
            for name in (backend, "reference")
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


@over(FAST)
def test_the_future_is_never_read(kind, backend):
    given = inputs(2, 100, 1, 4, 3, kind=kind)
    o = rule(**given, backend=backend)[0]
    for t in (1, 31, 32, 50, 99):
        later = {n: x * (1 if n in ("k", "a", "b", "beta") else 1e4) for n, x in given.items()}
        other = {
            name: x if name == "initial_state" else torch.cat([x[:, :t], y[:, t:].flip(1)], dim=1)
            for (name, x), y in zip(given.items(), later.values(), strict=True)
        }
        assert torch.equal(rule(**other, backend=backend)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("T", [0, 1, 40])
@pytest.mark.parametrize("B", [0, 2])
@over([(kind, backend) for kind, backend in ALL if kind in ("vector", "lowrank")])
def test_no_rows_and_no_tokens_leave_the_state(kind, backend, B, T):
    given = inputs(B, T, 2, 3, 4, kind=kind)
    o, state = rule(**given, backend=backend)
    assert o.shape == (B, T, 2, 4)
    assert state.shape == (B, 2, 3, 4)
    if T == 0:
        assert torch.equal(state, given["initial_state"])


@over([(kind, backend) for kind, backend in ALL if "scalar" in kind])
def test_half_precision_keeps_a_float32_state_and_autocast_does_not_reach_the_products(
    kind, backend
):
    given = leaves(inputs(2, 70, 2, 4, 3, kind=kind), torch.bfloat16)
    o, state = rule(**given, backend=backend)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    wide = {name: x.detach().float() for name, x in given.items()}
    plain = everything(leaves(wide, torch.float32), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(leaves(wide, torch.float32), backend=backend)
    names = ("output", "state") if backend == "reference" else plain
    assert all(torch.equal(inside[name], plain[name]) for name in names)


@over(FAST)
def test_layout_in_memory_changes_nothing(kind, backend):
    given = inputs(2, 70, 2, 4, 6, kind=kind)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in given.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    found = everything(leaves(given, torch.float64), backend=backend)
    strided = {n: x.requires_grad_() for n, x in strided.items()}
    for name, other in everything(strided, backend=backend).items():
        assert torch.equal(other, found[name])


@pytest.mark.parametrize("kind", ["vector", "lowrank"])
def test_work_in_parts_is_work_at_once(kind, monkeypatch):
    given = inputs(2, 200, 2, 4, 6, kind=kind)
    found = everything(leaves(given, torch.float64), backend="chunked")
    monkeypatch.setattr(shared, "CACHED", 1)
    for name, other in everything(leaves(given, torch.float64), backend="chunked").items():
        assert relative_error(other, found[name]) <= EXACT


@pytest.mark.parametrize("T", [1, 2, 33, 100])
@over([(kind, backend) for kind, backend in FAST if "scalar" in kind])
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(kind, backend, T):
    given = leaves(inputs(2, T, 2, 4, 6, kind=kind), torch.bfloat16)
    real = rule(**given, backend=backend)
    meta = rule(**{n: x.detach().to("meta") for n, x in given.items()}, backend=backend)
    for a, b in zip(meta, real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


@pytest.mark.parametrize(("kind", "T"), [("scalar", 1), ("vector", 70), ("lowrank", 70)])
def test_compiled_without_graph_breaks_it_is_the_same(kind, T):
    given = leaves(inputs(2, T, 1, 4, 3, kind=kind), torch.float64)
    options = flags(2, T)

    def run(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return rule(**given, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, wanted = (
        [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], list(given.values()))]
        for outputs in (compiled(given), run(given))
    )
    assert all(relative_error(a, b) <= EXACT for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("kind", "T"), [("scalar", 40), ("vector", 2)])
@pytest.mark.parametrize("backend", backends("none")[:-1])
def test_opcheck(backend, kind, T):
    given = leaves(inputs(2, T, 2, 4, 3, kind=kind), torch.float64)
    beta, g = (given[n].detach().view(2, T, 2, -1).requires_grad_() for n in ("beta", "log_decay"))
    arguments = (given["q"], given["k"], given["v"], beta, g, given["initial_state"], backend)
    torch.library.opcheck(torch.ops.seqzoo.delta.default, arguments)


@over([(kind, backend) for kind, backend in FAST if kind in ("vector", "lowrank")])
def test_what_is_kept_for_the_backward_pass_is_inputs_and_chunk_states_only(kind, backend):
    B, T, H, K, V = 2, 500, 2, 8, 8
    given = leaves(inputs(B, T, H, K, V, kind=kind), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rule(**given, backend=backend)
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
        ({"backend": "other"}, "no backend of delta"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changed, words):
    shapes = {"q": (2, 9, 2, 5), "k": (2, 9, 2, 5), "v": (2, 9, 2, 3), "beta": (2, 9, 2), **changed}
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        delta(**given)
