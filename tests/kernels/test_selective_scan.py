"""The selective scan against a float64 loop over time, and against its solution in closed form."""

import dataclasses
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.dispatch import BACKENDS, accumulator, choose
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.selective_scan.chunked import BLOCK
from seqzoo.kernels.selective_scan.reference import selective_scan as reference_selective_scan
from tests.tolerances import assert_close_to_reference, budget, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# (B, T, D, N): less than a block, exactly one, several; channels that fill no vector, some, and
# more than native.c gives to one thread
SHAPES = [(2, 3, 5, 4), (3, BLOCK, 1, 1), (1, 2 * BLOCK + 5, 33, 16), (2, 97, 270, 3)]
USED = [(), ("reset",), ("mask",), ("mask", "reset")]
FAST = [b.name for b in BACKENDS["selective_scan"] if b.name in ("native", "chunked")]


def serves(backend: str, dtype: torch.dtype) -> bool:
    chosen = next(b for b in BACKENDS["selective_scan"] if b.name == backend)
    return not chosen.refusal("cpu", accumulator(dtype), ())


def inputs(B: int, T: int, D: int, N: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {
        "u": torch.randn(B, T, D),
        "dt": torch.rand(B, T, D) * 0.3,
        "A": -torch.arange(1.0, N + 1).expand(D, N) * torch.rand(D, N),
        "B": torch.randn(B, T, N),
        "C": torch.randn(B, T, N),
        "D": torch.randn(D),
        "initial_state": torch.randn(B, D, N),
    }
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def flags(B: int, T: int) -> dict[str, Tensor]:
    mask = torch.rand(B, T) < 0.6
    return {"mask": mask, "reset": (torch.rand(B, T) < 0.2) & mask}


def weights(x: Tensor) -> Tensor:
    """Numbers that every dtype holds exactly."""
    return ((torch.arange(x.numel()) * 7 % 13 - 4) / 8).view_as(x).to(x.dtype)


def differentiated(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Every number; outputs at masked tokens, which mean nothing, are left out."""
    y, state = selective_scan(**given, **options)
    if "mask" in options:
        y = torch.where(options["mask"][..., None], y, 0)
    loss = sum((r * weights(r)).sum().double() for r in (y, state))
    grads = torch.autograd.grad(loss, given.values(), materialize_grads=True)
    results = {"y": y, "state": state}
    return results | {f"gradient of {k}": g for k, g in zip(given, grads, strict=True)}


def widened(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in given.items()}


@pytest.mark.parametrize("used", USED, ids="+".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b in FAST for d in DTYPES if serves(b, d)], ids=str
)
def test_every_number_is_within_budget_of_the_float64_loop(
    backend, dtype, shape, used, poisoned_empty
):
    given = inputs(*shape, dtype)
    options = {k: v for k, v in flags(*shape[:2]).items() if k in used}
    found = differentiated(given, **options, backend=backend)
    wanted = differentiated(widened(given), **options, backend="reference")
    for name, value in found.items():
        gradient = name.startswith("gradient")
        allowed = torch.float32 if name == "state" and dtype != torch.float64 else dtype
        assert_close_to_reference(value, wanted[name], allowed, gradient=gradient, name=name)


@pytest.mark.parametrize("hostile", [0.0, 1e-30, 1.0, 88.0, 1e4])
@pytest.mark.parametrize(("D", "T"), [(6, 40), (32, 80)])
@pytest.mark.parametrize("backend", FAST)
def test_steps_of_nothing_and_huge_steps_stay_finite_and_right(backend, D, T, hostile):
    given = inputs(2, T, D, 4, torch.float32)
    with torch.no_grad():
        given["dt"][:, :40:3, :6] = hostile  # other lanes and later blocks are ordinary
        given["dt"][:, 5:8, :6:2] = hostile
    found = differentiated(given, backend=backend)
    wanted = differentiated(widened(given), backend="reference")
    for name, value in found.items():
        gradient = name.startswith("gradient")
        assert_close_to_reference(value, wanted[name], gradient=gradient, name=name)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_the_loop_itself_agrees_with_the_solution_written_out(backend):
    """y_t = D u_t + sum_{s <= t} C_t . exp(A sum_{s < r <= t} dt_r) B_s dt_s u_s, in float64."""
    dtype = torch.float64 if serves(backend, torch.float64) else torch.float32
    given = {k: v.detach() for k, v in inputs(2, 21, 5, 4, dtype).items()}
    u, dt, A, B, C, D, h0 = (v.double() for v in given.values())
    total = dt.cumsum(1)
    span = total[:, :, None] - total[:, None]  # (B, t, s, D)
    decay = torch.exp(span[..., None] * A) * torch.ones(21, 21).tril()[..., None, None]
    y = D * u + torch.einsum("btn,btsdn,bsn,bsd->btd", C, decay, B, dt * u)
    y = y + torch.einsum("btn,btdn,bdn->btd", C, torch.exp(total[..., None] * A), h0)
    assert_close_to_reference(selective_scan(**given, backend=backend)[0], y)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("where", ["left", "inside", "right"])
def test_a_masked_token_leaves_the_state_untouched(where, backend):
    given, slots = inputs(4, 40, 5, 4, torch.float32), torch.arange(40)
    lengths = torch.tensor([40, 17, 1, 0])[:, None]
    inside = torch.rand(4, 40) < 0.5
    mask = {"left": slots >= 40 - lengths, "right": slots < lengths, "inside": inside}[where]
    junk = {k: torch.where(mask[..., None], given[k], 1e3) for k in ("u", "dt", "B", "C")}
    y, state = selective_scan(**(given | junk), mask=mask, backend=backend)
    assert y.isfinite().all()
    for row in range(4):
        alone = {k: v[row : row + 1] if v.ndim == 3 else v for k, v in given.items()}
        alone |= {k: alone[k][:, mask[row]] for k in ("u", "dt", "B", "C")}
        wanted, its_state = selective_scan(**alone, backend="reference")
        assert_close_to_reference(y[row : row + 1, mask[row]], wanted)
        assert_close_to_reference(state[row : row + 1], its_state)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_no_state_crosses_into_the_next_document(backend):
    given, lengths = inputs(2, 44, 5, 4, torch.float32), (BLOCK, 1, 7, 20)
    reset = torch.zeros(2, 44, dtype=torch.bool)
    reset[:, [0, BLOCK, BLOCK + 1, BLOCK + 8]] = True
    y, state = selective_scan(**given, reset=reset, backend=backend)
    pieces = zip(*(given[k].split(lengths, dim=1) for k in ("u", "dt", "B", "C")), strict=True)
    alone = [
        selective_scan(u, dt, given["A"], B, C, given["D"], backend="reference")
        for u, dt, B, C in pieces
    ]
    assert_close_to_reference(y, torch.cat([y for y, _ in alone], dim=1))
    assert_close_to_reference(state, alone[-1][1])


@pytest.mark.parametrize("used", USED, ids="+".join)
@pytest.mark.parametrize("split", [(1,) * 40, (0, 3, BLOCK, 21), (39, 1)], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_the_state_between_chunks_is_all_that_later_tokens_need(backend, split, used):
    given = inputs(2, 40, 5, 4, torch.float32)
    options = {k: v for k, v in flags(2, 40).items() if k in used}
    whole = differentiated(given, **options, backend=backend)
    state, pieces, start = given["initial_state"], [], 0
    for n in split:
        part = {k: v[:, start : start + n] for k, v in options.items()}
        piece = {k: given[k][:, start : start + n] for k in ("u", "dt", "B", "C")}
        piece = given | piece | {"initial_state": state}
        y, state = selective_scan(**piece, **part, backend=backend)
        pieces.append(y)
        start += n
    y = torch.cat(pieces, dim=1)
    if "mask" in used:
        y = torch.where(options["mask"][..., None], y, 0)
    assert_close_to_reference(y, whole["y"])
    assert_close_to_reference(state, whole["state"])
    loss = sum((r * weights(r)).sum().double() for r in (y, state))
    for (name, source), grad in zip(
        given.items(), torch.autograd.grad(loss, given.values()), strict=True
    ):
        assert source.shape == grad.shape
        assert_close_to_reference(grad, whole[f"gradient of {name}"], gradient=True, name=name)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4), (0, 0, 3, 4), (0, 1, 3, 4)], ids=str)
def test_nothing_in_gives_nothing_out_and_the_state_back(shape, backend):
    given = inputs(*shape, torch.float32)
    for options in ({}, flags(*shape[:2])):
        found = differentiated(given, **options, backend=backend)
        assert found["y"].shape == given["u"].shape
        assert torch.equal(found["state"], given["initial_state"])


def test_gradients_are_derivatives():
    given, options = inputs(2, BLOCK + 3, 2, 2), flags(2, BLOCK + 3)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(given, values, strict=True)), **options, backend="chunked")

    assert torch.autograd.gradcheck(run, tuple(given.values()), fast_mode=True)
    given = {
        k: v[:, :3].detach().requires_grad_() if v.ndim == 3 and k != "initial_state" else v
        for k, v in given.items()
    }
    options = {k: v[:, :3] for k, v in options.items()}
    assert torch.autograd.gradcheck(run, tuple(given.values()))


def test_autocast_does_not_reach_the_sums():
    given = inputs(2, 40, 8, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiated(given)
    wanted = differentiated(widened(given), backend="reference")
    for name, value in found.items():
        gradient = name.startswith("gradient")
        assert_close_to_reference(value, wanted[name], gradient=gradient, name=name)


def test_the_state_is_float32_when_the_inputs_are_not():
    y, state = selective_scan(**inputs(1, 3, 4, 2, torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_strides_change_nothing(backend):
    given = inputs(2, 40, 8, 4, torch.float32)
    strided = {
        k: v.detach().mT.contiguous().mT.requires_grad_() if v.ndim > 1 else v
        for k, v in given.items()
    }
    assert not strided["u"].is_contiguous()
    found = differentiated(strided, backend=backend)
    for name, wanted in differentiated(given, backend=backend).items():
        assert relative_error(found[name], wanted) <= budget(torch.float32), name


@pytest.mark.parametrize("used", [(), ("mask", "reset")], ids="+".join)
@pytest.mark.parametrize("backend", FAST)
def test_compiles_without_a_graph_break(backend, used):
    options = {k: v for k, v in flags(2, 40).items() if k in used}
    torch.compiler.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    for T in (40, 30):
        given = inputs(2, T, 8, 4, torch.float32)
        cut = {k: v[:, :T] for k, v in options.items()}
        found = compiled(**given, **cut, backend=backend)
        wanted = selective_scan(**given, **cut, backend=backend)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
        a, b = (torch.autograd.grad(y.square().sum(), given["dt"])[0] for y, _ in (found, wanted))
        assert torch.equal(a, b)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_steps_without_gradients_keep_no_states_and_change_no_bit(backend, reset, monkeypatch):
    kept, module = [], import_module(f"seqzoo.kernels.selective_scan.{backend}")
    forward = module.forward

    def spied(*given: object, **options: object) -> tuple[Tensor, ...]:
        made = forward(*given, **options)
        kept.append(made[2].numel())
        return made

    monkeypatch.setattr(module, "forward", spied)
    given, options = inputs(2, 70, 20, 4, torch.float32), {}
    if reset:
        options["reset"] = flags(2, 70)["reset"]
    wanted = selective_scan(**given, **options, backend=backend)
    with torch.no_grad():
        found = selective_scan(**given, **options, backend=backend)
    assert kept[0] > 0
    assert backend != "native" or kept[1] == 0
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_the_operator_declares_what_it_does(backend, reset):
    u, dt, A, B, C, _, start = inputs(2, BLOCK + 4, 3, 4, torch.float32).values()
    flag = flags(2, BLOCK + 4)["reset"] if reset else None
    torch.library.opcheck(
        torch.ops.seqzoo.selective_scan.default, (u, dt, A, B, C, start, flag, backend)
    )
    if backend == "native":
        alone = tuple(x.detach() for x in (u, dt, A, B, C, start))
        torch.library.opcheck(
            torch.ops.seqzoo.selective_scan.default, (*alone, flag, backend, False)
        )


def test_more_states_than_native_holds_are_refused_there_and_served_elsewhere():
    given = inputs(1, 5, 2, 65, torch.float32)
    wanted, _ = selective_scan(**widened(given), backend="reference")
    assert_close_to_reference(selective_scan(**given)[0], wanted)
    with pytest.raises(ValueError, match=r"64 states.* use chunked or reference"):
        selective_scan(**given, backend="native")


@pytest.mark.parametrize("name", ["u", "dt", "A", "B", "C", "initial_state"])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_what_is_not_a_number_does_not_vanish(backend, name):
    given = {k: v.detach() for k, v in inputs(1, 20, 3, 4, torch.float32).items()}
    given[name].view(-1)[0] = torch.nan
    assert selective_scan(**given, backend=backend)[0].isnan().any()


def test_meta_tensors_give_shapes():
    given = {k: v.to("meta") for k, v in inputs(2, 50, 8, 4, torch.float32).items()}
    for options in ({}, {k: v.to("meta") for k, v in flags(2, 50).items()}):
        y, state = selective_scan(**given, **options)
        assert (y.shape, state.shape) == (given["u"].shape, given["initial_state"].shape)


def test_what_does_not_fit_is_refused_by_name():
    given, options = inputs(2, 5, 3, 4), flags(2, 5)
    for wrong, words in [
        ({"u": torch.zeros(5, 3)}, "selective_scan takes"),
        ({"A": torch.zeros(3)}, "selective_scan takes"),
        ({"A": torch.zeros(4, 4)}, "A is"),
        ({"dt": torch.zeros(2, 5, 1)}, "dt is"),
        ({"B": torch.zeros(2, 5, 3)}, "B is"),
        ({"C": torch.zeros(2, 4, 4)}, "C is"),
        ({"D": torch.zeros(4)}, "D is"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "initial_state is"),
        ({"mask": options["mask"][:, :4]}, "mask is"),
        ({"reset": options["reset"][:1]}, "reset is"),
        ({"backend": "nonesuch"}, "backend of selective_scan"),
    ]:
        with pytest.raises(ValueError, match=words):
            selective_scan(**(given | wrong))


@pytest.fixture
def packaged(monkeypatch):
    """The package mamba-ssm as its README has it, in torch, and a device that it may serve."""

    def selective_scan_fn(u, delta, A, B, C, return_last_state=False):
        assert all(x.is_contiguous() and x.dtype == u.dtype for x in (u, delta, B, C))
        assert A.dtype == torch.float32
        rows = (x.transpose(1, 2).float() for x in (u, delta, B, C))
        u_, dt, B, C = rows
        start = A.new_zeros(len(u), *A.shape)
        y, last = reference_selective_scan(u_, dt, A, B, C, start, None)
        y = y.transpose(1, 2).to(u.dtype)
        return (y, last.detach()) if return_last_state else y

    module = ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    (served,) = (b for b in BACKENDS["selective_scan"] if b.name == "mamba_ssm")
    here = dataclasses.replace(served, devices=("cpu",), needs=())
    others = [b for b in BACKENDS["selective_scan"] if b.name != "mamba_ssm"]
    monkeypatch.setitem(BACKENDS, "selective_scan", (*others, here))


def test_the_package_is_given_what_it_expects_and_never_by_default(packaged):
    given = inputs(2, 9, 4, 3, torch.float32)
    del given["initial_state"]
    made = {}
    for backend in ("mamba_ssm", "reference"):
        y, state = selective_scan(**given, backend=backend)
        made[backend] = [y, state, *torch.autograd.grad(y.sum(), list(given.values()))]
    for found, wanted in zip(*made.values(), strict=True):
        assert_close_to_reference(found, wanted, gradient=True)
    assert choose("selective_scan", given["u"]) != "mamba_ssm"


def test_a_gradient_that_the_package_lacks_is_refused_and_not_zero(packaged):
    given = inputs(2, 9, 4, 3, torch.float32)
    start = given.pop("initial_state")
    _, state = selective_scan(**given, backend="mamba_ssm")
    with pytest.raises(RuntimeError, match="no gradient of the last state; use fused"):
        state.sum().backward()
    with pytest.raises(ValueError, match="cannot do initial_state; use native"):
        selective_scan(**given, initial_state=start, backend="mamba_ssm")
