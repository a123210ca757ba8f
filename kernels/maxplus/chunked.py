"""The running maximum in chunks: doubling inside a chunk, and the same again over the chunks.

A span hands on max(a + what came in, b); two in a row do so with a = a1 + a2, b = max(a2 + b1, b2).
In a chunk spans of 1, 2, 4, ... tokens are put together, then the chunks are the tokens of a 32nd
of the sequence. O(T) work; every a is a sum of decays, never a difference. The gradient goes where
the maximum came from, which is a linear recurrence from the last token to the first.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.scan import scan

CHUNK = 32


def forward(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """See `seqzoo.kernels.maxplus.maxplus`; every m, (B, T, D)."""
    T = b.shape[1]
    chunk = min(CHUNK, T)
    behind = (0, 0, 0, -T % chunk)
    a = torch.unflatten(pad(a, behind), 1, (-1, chunk))
    m = torch.unflatten(pad(b, behind, value=-torch.inf), 1, (-1, chunk))
    a, m, span = a.clone(), m.clone(), 1  # (B, N, C, D)
    while span < chunk:
        # The right sides are made before anything is written.
        m[:, :, span:] = torch.maximum(a[:, :, span:] + m[:, :, :-span], m[:, :, span:])
        a[:, :, span:] = a[:, :, span:] + a[:, :, :-span]
        span *= 2
    starts = initial_state[:, None]
    if m.shape[1] > 1:
        ends = forward(a[:, :, -1], m[:, :, -1], initial_state)
        starts = torch.cat([starts, ends[:, :-1]], dim=1)
    return torch.maximum(a + starts[:, :, None], m).flatten(1, 2)[:, :T].contiguous()


def backward(
    a: Tensor, b: Tensor, m: Tensor, initial_state: Tensor, dm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial state; half to each of two that tie."""
    before = torch.cat([initial_state[:, None], m], dim=1)[:, :-1]
    carried = 0.5 + 0.5 * torch.sign(a + before - b)  # share of what came in: 0, 1/2 or 1
    ahead = torch.cat([carried[:, 1:], torch.zeros_like(carried[:, :1])], dim=1)
    total, _ = scan(ahead, dm, reverse=True)
    da = total * carried
    return da, total - da, da[:, :1].sum(1)
