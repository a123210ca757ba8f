"""The Triton kernels against the definition in float64: on a GPU, or under the interpreter."""

import pytest
import torch

from seqzoo.kernels.dispatch import choose, interpreting
from seqzoo.kernels.scan import scan
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
