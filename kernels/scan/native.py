"""The diagonal recurrence through `native.c`."""

from ctypes import CDLL
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import REALS, build, call, threads

SOURCE = Path(__file__).with_name("native.c").read_text()


def forward(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.scan.scan`; all tensors share one dtype, real or complex."""
    a, b, start = a.contiguous(), b.contiguous(), initial_state.contiguous()
    h, state = torch.empty_like(b), torch.empty_like(start)
    B, T, D = b.shape
    shape = (B, T, D, int(reverse), threads(h.numel()))
    call(*_function(b.dtype, "forward"), a, b, start, h, state, *shape)
    return h, state


def backward(
    a: Tensor, h: Tensor, initial_state: Tensor, dh: Tensor, dstate: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial state."""
    given = [x.contiguous() for x in (a, h, initial_state, dh, dstate)]
    da, db, dstart = (torch.empty_like(x) for x in (given[1], given[1], given[2]))
    B, T, D = h.shape
    shape = (B, T, D, int(reverse), threads(h.numel()))
    call(*_function(h.dtype, "backward"), *given, da, db, dstart, *shape)
    return da, db, dstart


def _function(dtype: torch.dtype, direction: str) -> tuple[CDLL, str]:
    kind = "scan_complex" if dtype.is_complex else "scan"
    return build(SOURCE, REALS[dtype.to_real()]), f"{kind}_{direction}"
