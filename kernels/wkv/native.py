"""wkv through `native.c`."""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import BACKWARD, FORWARD, REALS, build, call, threads

SOURCE = Path(__file__).with_name("native.c").read_text()
BLOCK = 32  # STEPS in the source


def forward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.wkv.chunked.forward`; all tensors share one real dtype."""
    given = [x.contiguous() for x in (k, v, w, u, initial_state)]
    y, state = torch.empty_like(given[0]), torch.empty_like(given[4])
    borders = state.new_empty((k.shape[1] + BLOCK - 1) // BLOCK, *state.shape)
    flags = (_flags(reset, k), _flags(mask, k))
    library = build(SOURCE, REALS[k.dtype], FORWARD)
    call(library, "wkv_forward", *given, *flags, y, state, borders, *_sizes(k, reset, mask))
    return y, state, borders


def backward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.wkv.chunked.backward`."""
    k, v, w, u, borders, dy, dstate = (x.contiguous() for x in (k, v, w, u, borders, dy, dstate))
    dk, dv, dstart = (torch.empty_like(x) for x in (k, v, dstate))
    dw, du = (w.new_empty(k.shape[0], *w.shape) for _ in range(2))  # by row of the batch
    given = (k, v, w, u, _flags(reset, k), _flags(mask, k), borders, dy, dstate)
    library = build(SOURCE, REALS[k.dtype], BACKWARD)
    call(library, "wkv_backward", *given, dk, dv, dw, du, dstart, *_sizes(k, reset, mask))
    return dk, dv, dw.sum(0), du.sum(0), dstart


def _flags(flags: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.bool) if flags is None else flags.contiguous()


def _sizes(k: Tensor, reset: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    asked = int(reset is not None), int(mask is not None)
    return *k.shape, *asked, threads(2 * k.numel())  # an element costs as much as two of a scan
