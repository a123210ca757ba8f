"""How far a number may be from the truth: the one table, always fatal, without an absolute escape.

The truth is a float64 reference on the same rounded inputs. The distance is ||out - ref|| / ||ref||
of the whole tensor and of its worst row (a vector along the last dimension), whichever is larger:
one wrong block of 64k tokens hardly moves the norm of the whole.
"""

import torch
from torch import Tensor

BUDGETS = {
    "default": {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    "delta": {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2},
}
LAWS = {"default": 1e-5, "fft": 1e-4}  # one pass against any split; float32
EXACT = 1e-12  # float64 against float64
LAW_EXACT = 1e-10


def budget(dtype: torch.dtype, family: str = "default", gradient: bool = False) -> float:
    """The largest relative error allowed to a computation whose inputs are `dtype`."""
    dtype = dtype.to_real()
    allowed = EXACT if dtype == torch.float64 else BUDGETS[family][dtype]
    return 2 * allowed if gradient else allowed


def law_budget(dtype: torch.dtype, family: str = "default") -> float:
    """How far one pass may be from any split of it, and a padded pass from an unpadded one."""
    return LAW_EXACT if dtype.to_real() == torch.float64 else LAWS[family]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """The larger of the whole tensor's relative error and its worst row's; inf if not finite.

    A row weaker than the typical (root mean square) row is measured against that one: what is left
    of a sum after cancellation is not wrong by more than the sum was. Where the reference is zero
    throughout, the error is absolute.
    """
    assert out.shape == ref.shape, f"{tuple(out.shape)} is compared with {tuple(ref.shape)}"
    if ref.numel() == 0:
        return 0.0
    wide = torch.complex128 if out.is_complex() or ref.is_complex() else torch.float64
    out, ref = (x.detach().to(wide).reshape(-1, x.shape[-1] if x.ndim else 1) for x in (out, ref))
    wrong, right = (out - ref).norm(dim=1), ref.norm(dim=1)
    typical = right.square().mean().sqrt()
    if typical == 0:
        typical, right = torch.ones_like(typical), torch.ones_like(right)
    whole = wrong.norm() / right.norm()
    error = torch.maximum(whole, (wrong / right.clamp(min=typical)).max())
    return float(error) if error.isfinite() else float("inf")


def assert_close_to_reference(
    out: Tensor,
    ref: Tensor,
    dtype: torch.dtype | None = None,
    *,
    family: str = "default",
    gradient: bool = False,
    name: str = "output",
) -> None:
    """Fail when `out` is farther from `ref` than the budget of `dtype`, by default its own."""
    allowed = budget(dtype or out.dtype, family, gradient)
    error = relative_error(out, ref)
    assert error <= allowed, f"{name} is off by {error:.2e}; {allowed:.0e} is allowed"
