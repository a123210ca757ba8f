"""The diagonal linear recurrence, h_t = a_t h_{t-1} + b_t, elementwise, real or complex.

Carries LRU, RG-LRU (Hawk and Griffin), HGRN, S5, the moving average of MEGA, minGRU, and the
stepping of S4D and DSS.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import Backend, accumulator, choose, declare
from seqzoo.kernels.errors import check_shape
from seqzoo.kernels.operator import operator
from seqzoo.kernels.scan.reference import scan as reference_scan

REAL = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)
declare(
    "scan",
    Backend("native", ("cpu",), (*REAL, *HALF, *COMPLEX), needs=("compiler",)),
    Backend("fused", ("cuda",), (torch.float32, *HALF), needs=("triton",)),
    Backend("chunked"),
    Backend("reference"),
)


def scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t.

    O(T) time; Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length",
    arXiv:1709.04057.

    Args:
        a: decay, (B, T, D) or broadcastable to `b`.
        b: input, (B, T, D), any floating or complex dtype.
        initial_state: h before the first token, (B, D); zero when None.
        reset: (B, T) bool; True empties the state before the token.
        mask: (B, T) bool; False leaves the state untouched, and h there repeats it.
        reverse: run from the last token to the first.
        backend: `native`, `fused`, `chunked` or `reference`; chosen by device and dtype when None.

    Returns:
        h: (B, T, D) in the dtype of `b`.
        state: (B, D), the last h, in float32 or wider. Both are differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    if b.ndim != 3:
        raise ValueError(f"b is {tuple(b.shape)}; scan takes (B, T, D)")
    B, T, D = b.shape
    a = _broadcast(a, b)
    if a.is_complex() != b.is_complex():
        raise ValueError(f"a is {a.dtype} and b is {b.dtype}; both must be real, or both complex")
    if reset is not None:
        check_shape("reset", reset.shape, (B, T), "(B, T)")
        a = torch.where(reset[..., None], 0, a)
    if mask is not None:
        check_shape("mask", mask.shape, (B, T), "(B, T)")
        a, b = torch.where(mask[..., None], a, 1), torch.where(mask[..., None], b, 0)
    wide = accumulator(torch.promote_types(a.dtype, b.dtype))
    if initial_state is None:
        initial_state = torch.zeros(B, D, device=b.device, dtype=wide)
    check_shape("initial_state", initial_state.shape, (B, D), "(B, D)")
    given, initial_state = b.dtype, initial_state.to(wide)
    if wide != torch.float32:
        a, b = a.to(wide), b.to(wide)
    chosen = choose("scan", b, backend)
    if chosen != "fused":  # which widens in registers
        a, b = a.to(wide), b.to(wide)
    if chosen == "reference":
        h, state = reference_scan(a, b, initial_state, reverse)
    else:
        h, state = _scan(a, b, initial_state, reverse, chosen)
    return h.to(given), state


def _broadcast(a: Tensor, b: Tensor) -> Tensor:
    try:
        return torch.broadcast_to(a, b.shape)
    except RuntimeError as error:
        shapes = f"a is {tuple(a.shape)} and does not broadcast to b {tuple(b.shape)}"
        raise ValueError(shapes) from error


@operator("seqzoo::scan", like=("b", "initial_state"))
def _scan(
    a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    h, state = _module(backend).forward(a, b, initial_state, reverse)
    return h, state


@operator("seqzoo::scan_backward", like=("a", "h", "initial_state"))
def _scan_backward(
    a: Tensor,
    h: Tensor,
    initial_state: Tensor,
    dh: Tensor,
    dstate: Tensor,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dstart = _module(backend).backward(a, h, initial_state, dh, dstate, reverse)
    return da, db, dstart


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    a, _, initial_state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(a, output[0], initial_state)


def _differentiate(ctx: Any, dh: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    a, h, initial_state = ctx.saved_tensors
    return *_scan_backward(a, h, initial_state, dh, dstate, ctx.reverse, ctx.backend), None, None


_scan.register_autograd(_differentiate, setup_context=_save)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
