"""wkv in vectorised torch: exponentials a block at a time, then two fused steps a token.

Only the states at block borders outlive the forward pass; the backward pass computes each block
again. Blocks are time-major, and numerator and denominator share a dimension: (S, B, 2, D). The
running maximum is float64 inside a block: rounded at each step to float32 it would lose the low
digits of the decay, always the same ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # steps


class Block(NamedTuple):
    """One block, in the dtype of the inputs; (S, B, 2, D) are sums, (S, B, 1, D) weights.

    Attributes:
        values: (v, 1), what a token adds to the sums.
        before: the sums before each token.
        old: weight of those in the output, `new` of the token itself.
        kept: weight of those in the next state, `added` of the token itself.
        wins: (S, B, D), the token sets a new maximum.
        scale: (B, 1, D), by what the last rounding of the maximum changes the sums.
        end: (B, 3, D), the state after the block.
    """

    values: Tensor
    before: Tensor
    old: Tensor
    new: Tensor
    kept: Tensor
    added: Tensor
    wins: Tensor
    scale: Tensor
    end: Tensor

    def outputs(self) -> Tensor:
        """Numerator and denominator of y, (S, B, 2, D)."""
        return torch.addcmul(self.new * self.values, self.old, self.before)


def forward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output y, the last state, and the states before each block (blocks, B, 3, D); one dtype."""
    y = torch.empty_like(k, memory_format=torch.contiguous_format)
    state, borders = initial_state.clone(), []
    for start in range(0, k.shape[1], BLOCK):
        borders.append(state)
        span = slice(start, start + BLOCK)
        block = _block(k, v, w, u, state, reset, mask, span)
        numerator, denominator = block.outputs().unbind(2)
        y[:, span] = (numerator / denominator).transpose(0, 1)
        state = block.end
    if mask is not None:
        y.masked_fill_(~mask[..., None], 0)
    stacked = torch.stack(borders) if borders else state.new_empty(0, *state.shape)
    return y, state.clone(), stacked


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
    """Gradients of k, v, w, u and the initial state.

    The first two of `dstate` and of what is returned for the initial state are gradients of a and b
    with p held; the third belongs to whatever gives p its value. With z = (v, 1), s the sums, and
    (numerator, denominator)_t = old_t s_{t-1} + new_t z_t, which gets o_t = (dy_t, -y_t dy_t) /
    denominator, the gradient of s_{t-1} is kept_t times that of s_t, plus old_t o_t.
    """
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    dw, du = (torch.zeros_like(x, dtype=torch.float64) for x in (w, u))
    carry, route = dstate[:, :2], dstate[:, 2]
    starts = range(0, k.shape[1], BLOCK)
    for start, border in zip(reversed(starts), reversed(borders.unbind(0)), strict=True):
        span = slice(start, start + BLOCK)
        block = _block(k, v, w, u, border, reset, mask, span)
        numerator, denominator = block.outputs().unbind(2)
        q = dy[:, span].transpose(0, 1) / denominator
        there = None if mask is None else mask[:, span].T[..., None]
        q = q if there is None else torch.where(there, q, 0)
        o = torch.stack([q, -q * numerator / denominator], dim=2)
        g = torch.empty_like(o)
        carry = carry * block.scale
        steps = zip(*(x.unbind(0) for x in (g, block.kept, block.old * o)), strict=True)
        for g_t, kept_t, o_t in reversed(list(steps)):
            g_t.copy_(carry)
            carry = torch.addcmul(o_t, kept_t, carry)
        # A new maximum takes what goes to p; a token that sets none hands it on through its decay.
        later = block.wins.flip(0).cumsum(0).flip(0) - block.wins.long()
        routes = torch.where(later == 0, route, 0)
        won, lost = torch.where(block.wins, routes, 0), torch.where(block.wins, 0, routes)
        route = torch.where(block.wins.any(0), 0, route)
        bonus = (block.new * o * block.values).sum(2)
        g_new = block.added * g
        dv[:, span] = (block.new[:, :, 0] * q + g_new[:, :, 0]).transpose(0, 1)
        dk[:, span] = (bonus + (g_new * block.values).sum(2) + won).transpose(0, 1)
        du += bonus.sum((0, 1), dtype=torch.float64)
        lost = lost + (block.kept * g * block.before).sum(2)
        lost = lost if there is None else torch.where(there, lost, 0)
        dw -= lost.sum((0, 1), dtype=torch.float64)
    return dk, dv, dw.to(w.dtype), du.to(u.dtype), torch.cat([carry, route[:, None]], dim=1)


def _block(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    span: slice,
) -> Block:
    """The tokens of one span from the state before them."""
    narrow, v = v.dtype, v[:, span].transpose(0, 1)
    k, w = k[:, span].transpose(0, 1).double(), w.double()
    decay = w.expand_as(k)
    entering = k
    if mask is not None:
        there = mask[:, span].T[..., None]
        decay, entering = torch.where(there, decay, 0), torch.where(there, k, -torch.inf)
    tops = torch.cat([state[None, :, 2].double(), k])  # before the first token, after each
    if reset is not None:
        begins = reset[:, span].T[..., None]
        decay = torch.where(begins, torch.inf, decay)
    for top, next_top, k_t, decay_t in zip(tops[:-1], tops[1:], entering, decay, strict=True):
        torch.maximum(top - decay_t, k_t, out=next_top)
    top = tops[:-1] if reset is None else torch.where(begins, -torch.inf, tops[:-1])
    highest = torch.maximum(top, k + u)
    weights = (top - highest, k + u - highest, top - decay - tops[1:], entering - tops[1:])
    old, new, kept, added = (x.to(narrow).exp_()[:, :, None] for x in weights)
    values = torch.stack([v, torch.ones_like(v)], dim=2)
    sums = torch.cat([state[None, :, :2], added * values])
    for before, after, kept_t in zip(sums[:-1], sums[1:], kept, strict=True):
        after.addcmul_(kept_t, before)
    p = tops[-1].to(narrow)
    # Where digits of p are apart by more than 1, what is lost means nothing.
    scale = (tops[-1] - p).clamp(-1, 1).exp().to(narrow)[:, None]
    end = torch.cat([sums[-1] * scale, p[:, None]], dim=1)
    wins = entering > tops[:-1] - decay
    return Block(values, sums[:-1], old, new, kept, added, wins, scale, end)
