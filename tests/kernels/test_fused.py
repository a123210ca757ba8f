"""The Triton kernels against the definition in float64: on a GPU, or under the interpreter."""

from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.dispatch import choose, interpreting
from seqzoo.kernels.fused import GAIN, LEAST, PROGRAMS, stretch
from seqzoo.kernels.scan import scan
from seqzoo.kernels.selective_scan import selective_scan
from tests.tolerances import assert_close_to_reference

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.float16]  # the interpreter computes nonsense in bfloat16


def assert_right(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, reverse: bool
) -> None:
    B, _, D = shape
    a, b = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
    start, dh, dstate = torch.randn(B, D), torch.randn(shape).to(dtype), torch.randn(B, D)
    made = []
    for wide in (False, True):
        where = {"device": "cpu", "dtype": torch.float64} if wide else {"device": device}
        leaves = [x.to(**where).requires_grad_() for x in (a, b, start)]
        backend = "reference" if wide else "fused"
        out = scan(*leaves[:2], initial_state=leaves[2], reverse=reverse, backend=backend)
        wanted = (dh.to(**where), dstate.to(**where))
        grads = torch.autograd.grad(out, leaves, wanted, materialize_grads=True)
        made.append([x.cpu() for x in (*out, *grads)])
    for i, name in enumerate(("h", "state", "da", "db", "dstart")):
        assert_close_to_reference(made[0][i], made[1][i], dtype, gradient=i > 1, name=name)
    assert [x.dtype for x in made[0]] == [dtype, torch.float32, dtype, dtype, torch.float32]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 5), (1, 16, 3), (1, 65, 3), (1, 17, 33)], ids=str)
def test_scan(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    reverse: bool,
    fused_device: str,
    poisoned_empty: None,
) -> None:
    assert_right(shape, dtype, fused_device, reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_scan_cut_along_time_carries_states_and_gradients_from_stretch_to_stretch(
    reverse: bool, fused_device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = cut_every(16, "scan", monkeypatch)
    monkeypatch.setitem(fused.LONG, "BLOCK_T", 8)
    assert_right((2, 43, 3), torch.float32, fused_device, reverse)


def cut_every(steps: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fused = import_module(f"seqzoo.kernels.{kernel}.fused")
    monkeypatch.setattr(fused, "stretch", lambda length, programs, multiple: steps)
    return fused


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)], ids=str)
def test_scan_of_nothing(shape: tuple[int, int, int], fused_device: str) -> None:
    assert_right(shape, torch.float32, fused_device, False)


def test_scan_of_a_wide_decay_and_narrow_inputs_keeps_each_gradient_in_its_dtype(
    fused_device: str,
) -> None:
    a = torch.rand(1, 4, 3, device=fused_device, requires_grad=True)
    b = torch.randn(1, 4, 3, device=fused_device).half().requires_grad_()
    h, _ = scan(a, b, backend="fused")
    h.float().sum().backward()
    true = [x.detach().double().requires_grad_() for x in (a, b)]
    scan(*true, backend="reference")[0].sum().backward()
    for made, want in zip((a, b), true, strict=True):
        assert made.grad.dtype == made.dtype
        assert_close_to_reference(made.grad, want.grad, torch.float16, gradient=True)


def test_scan_of_a_float64_decay_is_refused_and_not_narrowed(fused_device: str) -> None:
    a = torch.rand(1, 4, 3, device=fused_device, dtype=torch.float64)
    with pytest.raises(ValueError, match="not float64; use"):
        scan(a, a.float(), backend="fused")


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_only_by_name_and_never_bfloat16() -> None:
    b = torch.zeros(1, 2, 3)
    assert choose("scan", b) == "native"
    with pytest.raises(ValueError, match="bfloat16; use native or chunked"):
        scan(b.bfloat16(), b.bfloat16(), backend="fused")


def test_scan_keeps_its_promises_to_torch(fused_device: str) -> None:
    a = torch.rand(1, 2, 3, device=fused_device)
    given = (a, a.clone(), a[:, 0].clone(), False, "fused")
    torch.library.opcheck(torch.ops.seqzoo.scan.default, given)


def selective_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    B, T, D, N = shape
    made = {"u": torch.randn(B, T, D).to(dtype), "dt": torch.rand(B, T, D).to(dtype)}
    made |= {"A": -4 * torch.rand(D, N), "B": torch.randn(B, T, N).to(dtype)}
    made |= {"C": torch.randn(B, T, N).to(dtype), "D": torch.randn(D)}
    return made | {"initial_state": torch.randn(B, D, N)}


def assert_selective_right(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, resets: bool
) -> None:
    given = selective_inputs(shape, dtype)
    dy, dstate = torch.randn(shape[:3]).to(dtype), torch.randn_like(given["initial_state"])
    reset = (torch.arange(shape[1]) % 7 == 4).expand(shape[:2]) if resets else None
    made = []
    for wide in (False, True):
        where = {"device": "cpu", "dtype": torch.float64} if wide else {"device": device}
        leaves = {k: v.to(**where).requires_grad_() for k, v in given.items()}
        at = None if reset is None else reset.to(where["device"])
        out = selective_scan(**leaves, reset=at, backend="reference" if wide else "fused")
        wanted = (dy.to(**where), dstate.to(**where))
        grads = torch.autograd.grad(out, list(leaves.values()), wanted, materialize_grads=True)
        made.append([x.cpu() for x in (*out, *grads)])
    for i, name in enumerate(("y", "state", *given)):
        assert_close_to_reference(made[0][i], made[1][i], dtype, gradient=i > 1, name=name)
    kept = [dtype, torch.float32, *(x.dtype for x in given.values())]
    assert [x.dtype for x in made[0]] == kept


@pytest.mark.parametrize(
    ("shape", "dtype", "resets"),
    [
        ((2, 5, 3, 4), torch.float16, False),
        ((1, 6, 33, 16), torch.float16, True),
        ((1, 69, 2, 20), torch.float32, True),
        ((1, 3, 2, 50), torch.float32, False),
    ],
    ids=["filled up", "two groups of channels", "two blocks of time", "most states"],
)
def test_selective_scan(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    resets: bool,
    fused_device: str,
    poisoned_empty: None,
) -> None:
    assert_selective_right(shape, dtype, fused_device, resets)


@pytest.mark.parametrize("resets", [False, True], ids=["one document", "several"])
def test_selective_scan_cut_along_time_carries_states_and_gradients_from_stretch_to_stretch(
    resets: bool, fused_device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = cut_every(4, "selective_scan", monkeypatch)
    monkeypatch.setattr(fused, "BLOCK", 4)
    assert_selective_right((1, 11, 2, 3), torch.float32, fused_device, resets)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2), (2, 0, 3, 2)], ids=str)
def test_selective_scan_of_nothing(shape: tuple[int, int, int, int], fused_device: str) -> None:
    assert_selective_right(shape, torch.float32, fused_device, False)


def test_selective_scan_of_wide_steps_and_narrow_inputs_keeps_each_gradient_in_its_dtype(
    fused_device: str,
) -> None:
    given = selective_inputs((1, 3, 2, 2), torch.float16)
    given["dt"] = torch.rand(1, 3, 2)
    leaves = {k: v.to(fused_device).requires_grad_() for k, v in given.items()}
    true = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    selective_scan(**leaves, backend="fused")[0].float().sum().backward()
    selective_scan(**true, backend="reference")[0].sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        gradient = leaf.grad.cpu()
        assert_close_to_reference(gradient, true[name].grad, torch.float16, gradient=True)


@pytest.mark.skipif(not interpreting(), reason="a GPU computes in bfloat16, the interpreter cannot")
def test_the_interpreter_serves_selective_scan_only_by_name_and_never_bfloat16() -> None:
    assert choose("selective_scan", torch.zeros(1, 2, 3)) == "native"
    with pytest.raises(ValueError, match="bfloat16; use native or chunked"):
        selective_scan(**selective_inputs((1, 2, 3, 2), torch.bfloat16), backend="fused")


def test_selective_scan_keeps_its_promises_to_torch(fused_device: str) -> None:
    given = selective_inputs((1, 2, 3, 2), torch.float16)
    del given["D"]
    tensors = [x.to(fused_device) for x in given.values()]
    reset = torch.tensor([[False, True]], device=fused_device)
    operator = torch.ops.seqzoo.selective_scan.default
    torch.library.opcheck(operator, (*tensors, reset, "fused"))


@pytest.mark.parametrize("length", [1024, 1025, 4096, 100_003])
def test_stretches_fill_a_gpu_and_no_more(length: int) -> None:
    steps = stretch(length, 8, 64)
    assert steps % 64 == 0
    assert GAIN <= -(-length // steps) <= PROGRAMS // 8
    assert stretch(length, PROGRAMS, 64) == length
    assert stretch(LEAST * GAIN - 1, 1, 64) == LEAST * GAIN - 1
    assert stretch(0, 0, 64) == 0
