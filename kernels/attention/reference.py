"""Softmax attention as it is defined: every score, who sees whom, a softmax, a sum."""

from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    layout: Tensor | None,
    bias: Tensor | Callable[[Tensor], Tensor] | None,
    document: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """See `seqzoo.kernels.attention.attention`; q, k and v share one dtype."""
    T, H = q.shape[1:3]
    S, G = k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    scores = scale * torch.einsum("bthk,bshk->bhts", q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if callable(bias):
        index = _count(mask, k) if index is None else index
        bias = bias(index[:, S - T :, None] - index[:, None, :])
    if bias is not None:
        scores = scores + bias
    visible = _visible(k, T, causal, window, document, mask, sinks)
    if layout is not None:
        rows, columns = T // layout.shape[0], S // layout.shape[1]
        visible = visible & layout.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    visible = visible[:, None]
    seen = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & seen, -torch.inf)  # a row of -inf would be NaN
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1) * seen, v)


def _visible(
    k: Tensor,
    T: int,
    causal: bool,
    window: int | None,
    document: Tensor | None,
    mask: Tensor | None,
    sinks: int,
) -> Tensor:
    """(B, T, S): which keys each query sees."""
    B, S = k.shape[:2]
    key = torch.arange(S, device=k.device)
    visible = torch.ones(B, T, S, dtype=torch.bool, device=k.device)
    if causal:
        visible = visible & (key <= key[S - T :, None])
    if mask is not None:
        visible = visible & mask[:, None, :]
        if causal or T == S:
            visible = visible & mask[:, S - T :, None]
    if document is not None:
        visible = visible & (document[:, S - T :, None] == document[:, None, :])
    if window is not None:
        count = _count(mask, k)
        near = (count[:, S - T :, None] - count[:, None, :]).abs() < window
        same = torch.ones(B, S, S, dtype=torch.bool, device=k.device).tril(-1)
        if mask is not None:
            same = same & mask[:, None, :]
        if document is not None:
            same = same & (document[:, :, None] == document[:, None, :])
        visible = visible & (near | (same.sum(-1) < sinks)[:, None, :])
    return visible


def _count(mask: Tensor | None, k: Tensor) -> Tensor:
    """(B, S): how many real tokens there are up to each slot."""
    if mask is None:
        return torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])
    return mask.long().cumsum(1)
