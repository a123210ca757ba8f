"""The diagonal recurrence through `native.c`."""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import REALS, build, call, threads

SOURCE = Path(__file__).with_name("native.c").read_text()


def forward(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.scan.scan`; all tensors share one real dtype."""
    a, b, start = a.contiguous(), b.contiguous(), initial_state.contiguous()
    h, state = torch.empty_like(b), torch.empty_like(start)
    B, T, D = b.shape
    library = build(SOURCE, REALS[b.dtype])
    shape = (B, T, D, int(reverse), threads(h.numel()))
    call(library, "scan_forward", a, b, start, h, state, *shape)
    return h, state


def backward(
    a: Tensor, h: Tensor, initial_state: Tensor, dh: Tensor, dstate: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial state."""
    given = [x.contiguous() for x in (a, h, initial_state, dh, dstate)]
    da, db, dstart = (torch.empty_like(x) for x in (given[1], given[1], given[2]))
    B, T, D = h.shape
    library = build(SOURCE, REALS[h.dtype])
    shape = (B, T, D, int(reverse), threads(h.numel()))
    call(library, "scan_backward", *given, da, db, dstart, *shape)
    return da, db, dstart
