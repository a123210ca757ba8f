"""The selective scan through `native.c`: float32, at most 64 states a channel."""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import BACKWARD, FORWARD, build, call, threads

SOURCE = Path(__file__).with_name("native.c").read_text()
BLOCK = 32  # STEPS in the source
CHANNELS = 256  # GROUP * LANES in the source


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.selective_scan.chunked.forward`; no borders unless they are to be kept.

    Inside, borders are (N, D) for each block and row, which is how vectors of channels leave them.
    """
    given = [x.contiguous() for x in (u, dt, A, B, C, initial_state)]
    flags = (u.new_empty(0, dtype=torch.bool) if reset is None else reset).contiguous()
    (rows, T, D), N = u.shape, A.shape[1]
    y, state = torch.empty_like(given[0]), torch.empty_like(given[5])
    borders = state.new_empty((T + BLOCK - 1) // BLOCK if keep else 0, *state.shape)
    sizes = (rows, T, D, N, int(reset is not None), int(keep), threads(u.numel() * N))
    library = build(SOURCE, "float", FORWARD)
    call(library, "selective_scan_forward", *given, flags, y, state, borders, *sizes)
    return y, state, borders


def backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reset: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.selective_scan.chunked.backward`."""
    u, dt, A, B, C, borders, dy, dstate = (
        x.contiguous() for x in (u, dt, A, B, C, borders, dy, dstate)
    )
    flags = (u.new_empty(0, dtype=torch.bool) if reset is None else reset).contiguous()
    (rows, T, D), N = u.shape, A.shape[1]
    du, ddt, dstart, dA = (torch.empty_like(x) for x in (u, dt, dstate, dstate))  # dA by row
    groups = (D + CHANNELS - 1) // CHANNELS
    dB, dC = B.new_empty(groups, *B.shape), C.new_empty(groups, *C.shape)
    sizes = (rows, T, D, N, int(reset is not None), threads(u.numel() * N))
    given, made = (u, dt, A, B, C, flags, borders, dy, dstate), (du, ddt, dA, dB, dC, dstart)
    library = build(SOURCE, "float", BACKWARD)
    call(library, "selective_scan_backward", *given, *made, *sizes)
    return du, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dstart
