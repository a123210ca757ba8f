"""Decayed linear attention through `native.c`."""

from ctypes import CDLL
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import BACKWARD, FORWARD, PRELUDE, REALS, build, call, threads

SOURCE = (
    PRELUDE
    + Path(__file__).with_name("weights.c").read_text()
    + Path(__file__).with_name("native.c").read_text()
)
CHUNK = 64  # as in weights.c
TASKS = 8  # heads that share a key are split among tasks until there are so many


def chunk_count(length: int) -> int:
    """Into how many chunks a sequence is cut."""
    return -(-length // CHUNK)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.decay.chunked.forward`."""
    given = _wide(initial_state.dtype, q, k, v, g, initial_state)
    o = torch.empty_like(given[2])
    states = o.new_empty(1 + chunk_count(v.shape[1]), *initial_state.shape)
    library, room, sizes = _prepared(q, v, g, initial_state.dtype, FORWARD)
    call(library, "decay_forward", *given, o, states, room, *sizes)
    return o, states


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor, do: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.decay.chunked.backward`."""
    given = _wide(states.dtype, q, k, v, g, states, do, dstate)
    library, room, sizes = _prepared(q, v, g, states.dtype, BACKWARD)
    parts = -(-sizes[3] // sizes[-2])
    dq, dk = (x.new_empty(parts, *q.shape) for x in given[:2])
    dv, dg, dstart = (torch.empty_like(given[i]) for i in (2, 3, 6))
    call(library, "decay_backward", *given, dq, dk, dv, dg, dstart, room, *sizes)
    dq, dk = (x[0] if parts == 1 else x.sum(0) for x in (dq, dk))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dstart


def _wide(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.to(dtype).contiguous() for x in tensors]


def _prepared(
    q: Tensor, v: Tensor, g: Tensor, dtype: torch.dtype, half: tuple[str, ...]
) -> tuple[CDLL, Tensor, tuple[int, ...]]:
    """Room for the workers, and the sizes.

    How work is split depends on shapes alone, so that the number of threads changes no bit.
    """
    (B, T, Hk, K), (H, V) = q.shape, v.shape[2:]
    R, library = H // Hk, build(SOURCE, REALS[dtype], half)
    parts = min(R, -(-TASKS // (B * Hk)))
    per = -(-R // parts)
    workers = min(threads(v.numel() * K), B * Hk * -(-R // per))
    room = torch.empty(1, dtype=torch.int64)
    call(library, "decay_room", room, K, V, per)
    channels = int(g.shape[-1] != 1 or K == 1)
    sizes = (B, T, Hk, R, K, V, channels, per, workers)
    return library, v.new_empty(workers * int(room), dtype=dtype), sizes
