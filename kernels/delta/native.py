"""The delta rule through `native.c`."""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.decay.chunked import CHUNK, chunk_count
from seqzoo.kernels.native import BACKWARD, FORWARD, PRELUDE, REALS, build, call, threads

SOURCE = PRELUDE + Path(__file__).with_name("native.c").read_text()


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.delta.chunked.forward`."""
    given = [x.to(initial_state.dtype).contiguous() for x in (q, k, v, beta, g)]
    states = initial_state.new_empty(1 + chunk_count(v.shape[1]), *initial_state.shape)
    states[0] = initial_state
    o = torch.empty_like(given[2])
    library = build(SOURCE, REALS[states.dtype], FORWARD)
    call(library, "delta_forward", *given, o, states, *_sizes(given[1], given[2], g))
    return o, states


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `seqzoo.kernels.delta.chunked.backward`."""
    tensors = (q, k, v, beta, g)
    given = [x.to(states.dtype).contiguous() for x in tensors]
    made = [torch.empty_like(x) for x in given]
    do, dstate = do.contiguous(), dstate.contiguous()
    dstart, sizes = torch.empty_like(dstate), _sizes(given[1], given[2], g)
    library = build(SOURCE, REALS[states.dtype], BACKWARD)
    call(library, "delta_backward", *given, states, do, dstate, *made, dstart, *sizes)
    dq, dk, dv, dbeta, dg = (d.to(x.dtype) for d, x in zip(made, tensors, strict=True))
    return dq, dk, dv, dbeta, dg, dstart


def _sizes(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor | int, ...]:
    """Room for every thread's chunk, as `furnish` in the source lays it out, and all sizes."""
    (B, T, H, K), V = k.shape, v.shape[-1]
    lanes = 64 // k.element_size()
    wide_K, wide_V = (-(-n // lanes) * lanes for n in (K, V))
    halves, values = 2 * 15 + 9, 6
    each = CHUNK * (halves * wide_K // 2 + values * wide_V + 4 * CHUNK) + 4 * wide_K * wide_V
    each += 16 * lanes  # the betas
    workers = min(threads(v.numel() * K), B * H)
    space = k.new_empty(workers * each)
    return space, each, B, T, H, K, V, g.shape[-1], wide_K, wide_V, workers
