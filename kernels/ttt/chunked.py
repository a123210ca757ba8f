"""Test-time training one mini-batch at a time, in its dual form.

All gradients g_j of a mini-batch are taken at the W it began with, so they come from one matrix
product, and what token i reads is q_i W - s_i (q_i G + sum_{j <= i} (q_i . k_j) eta_j g_j), where G
is what the pass before left of an unfinished mini-batch: matrix products again, without a W for
each token (Sun et al., arXiv:2407.04620, section 2.5). Rows whose masks and documents differ end
their mini-batches at different tokens, so tokens are gathered mini-batch by mini-batch first; a
place without a token reads a token of zeros, which writes nothing because its rate is zero.

The backward pass computes the W of every mini-batch again, then goes through them from the last.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64  # mini-batches gathered at a time


class Layout(NamedTuple):
    """Which tokens make up the mini-batches of each row; N of them in the row that has most.

    Attributes:
        tokens: (N, B, C) indices in time; T where there is no token.
        ends: (N, B, 1, 1, 1), whether the last place is taken, so that W moves.
        fresh: the same shape, whether the state is emptied before; None when it never is.
    """

    tokens: Tensor
    ends: Tensor
    fresh: Tensor | None


class Norm(NamedTuple):
    """Of Z, the output of W: normed, the error weight x + bias - v, and 1 / std."""

    x: Tensor
    error: Tensor
    r: Tensor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    W: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor,
    last: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One token, (B, 1, ...), as `seqzoo.kernels.ttt.reference.ttt` takes it."""
    if reset is not None:
        state = torch.where(reset[..., None, None, None], 0, state)
    learned, G = state.unbind(1)
    q, k, v, rate, share = (x.transpose(1, 2) for x in (q, k, v, rate, share))
    now = W + learned
    after = G + k.mT @ (rate * _gradient(_norm(k @ now, v, weight, bias, eps), weight))
    moved = share * after
    ends = last[..., None, None]
    new = torch.stack(
        [torch.where(ends, learned - moved, learned), torch.where(ends, 0, after)], dim=1
    )
    if mask is not None:
        new = torch.where(mask[..., None, None, None], new, state)
    return (q @ (now - moved)).transpose(1, 2), new


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    W: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    layout: Layout,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.ttt.ttt`, in the dtype of `initial_state`.

    Args:
        q: (B, T, H, K), its last channel one.
        k: (B, T, H, K), likewise.
        v: (B, T, H, V).
        rate: (B, T, H, 1).
        share: (B, T, H, 1).
        W: (H, K, V).
        weight: (H, 1, V).
        bias: (H, 1, V).
        initial_state: (B, 2, H, K, V).
        layout: from `arrange`.
        eps: of the norm.

    Returns:
        o: (B, T, H, V), zero at masked tokens.
        state: (B, 2, H, K, V).
    """
    learned, G = initial_state.unbind(1)
    wide, (B, T, H, V) = initial_state.dtype, v.shape
    o = torch.zeros(B, T + 1, H, V, device=v.device, dtype=wide)
    rows = torch.arange(B, device=v.device)[:, None]
    for start in range(0, len(layout.tokens), GROUP):
        tokens = layout.tokens[start : start + GROUP]
        Q, K, values, rates, shares = (_gather(x, tokens, wide) for x in (q, k, v, rate, share))
        A = (Q @ K.mT).tril_()
        for n in range(len(tokens)):
            learned, G = _emptied(layout, start + n, learned, G)
            now = W + learned
            norm = _norm(K[n] @ now, values[n], weight, bias, eps)
            U = rates[n] * _gradient(norm, weight)
            P = A[n] @ U
            if start + n == 0:  # a later one has not begun before
                P += Q[n] @ G
            o[rows, tokens[n]] = (Q[n] @ now - shares[n] * P).transpose(1, 2)
            G = G + K[n].mT @ U
            learned = learned - shares[n][:, :, -1:] * G  # zero where the last place is empty
            G = torch.where(layout.ends[start + n], 0, G)
    return o[:, :T].contiguous(), torch.stack([learned, G], dim=1)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    W: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    layout: Layout,
    eps: float,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, rate, share, W, weight, bias and the initial state."""
    wide, (B, T) = initial_state.dtype, v.shape[:2]
    inputs = (q, k, v, rate, share)
    states = _states(k, v, rate, share, W, weight, bias, initial_state, layout, eps)
    given = [torch.zeros(B, T + 1, *x.shape[2:], device=x.device, dtype=wide) for x in inputs]
    dW = torch.zeros_like(W)
    dweight, dbias = (torch.zeros(B, *x.shape, device=x.device, dtype=wide) for x in (weight, bias))
    rows = torch.arange(B, device=v.device)[:, None]
    dlearned, dG = dstate.unbind(1)
    for n in reversed(range(len(layout.tokens))):
        tokens, now = layout.tokens[n], W + states[n]
        Q, K, values, rates, shares, dO = (_gather(x, tokens[None], wide)[0] for x in (*inputs, do))
        norm = _norm(K @ now, values, weight, bias, eps)
        g = _gradient(norm, weight)
        U, A = rates * g, (Q @ K.mT).tril_()
        P, written = A @ U, K.mT @ U
        if n == 0:
            G = _emptied(layout, n, initial_state[:, 1])[0]
            P, written = P + Q @ G, written + G
        ends, last = layout.ends[n], shares[:, :, -1:]
        dshares = -(dO * P).sum(-1, keepdim=True)
        dshares[:, :, -1:] -= (written * dlearned).sum((-1, -2), keepdim=True)
        dG = torch.where(ends, -last * dlearned, dG)  # of G after this mini-batch's writes
        dP = -shares * dO
        dA = (dP @ U.mT).tril_()
        dU = A.mT @ dP + K @ dG
        dQ = dO @ now.mT + dA @ K
        dK = dA.mT @ Q + U @ dG.mT
        if n == 0:
            dQ += dP @ G.mT
            dG = dG + Q.mT @ dP
        dZ, de = _gradient_backward(norm, g, rates * dU, weight)
        dK += dZ @ now.mT
        dnow = Q.mT @ dO + K.mT @ dZ
        dlearned, dG = _emptied(layout, n, dlearned + dnow, dG)
        dW += dnow.sum(0)
        dweight += (de * (norm.error + weight * norm.x)).sum(-2, keepdim=True)
        dbias += (weight * de).sum(-2, keepdim=True)
        drates = (dU * g).sum(-1, keepdim=True)
        for to, d in zip(given, (dQ, dK, -weight * de, drates, dshares), strict=True):
            to[rows, tokens] = d.transpose(1, 2)
    parts = (x[:, :T].contiguous() for x in given)
    return *parts, dW, dweight.sum(0), dbias.sum(0), torch.stack([dlearned, dG], dim=1)


def arrange(slot: Tensor, reset: Tensor | None, mask: Tensor | None, size: int) -> Layout:
    """Mini-batches of `size` from the place of each token in its own, (B, T)."""
    B, T = slot.shape
    real = torch.ones_like(slot, dtype=torch.bool) if mask is None else mask
    batch = (real & (slot == 0)).cumsum(1)
    batch = batch - torch.where(real, batch, T + 1).amin(1, keepdim=True)  # the first one is 0
    count = int(torch.where(real, batch, -1).max()) + 1
    place = torch.where(real, batch * size + slot, count * size)
    tokens = slot.new_full((B, count * size + 1), T)
    tokens.scatter_(1, place, torch.arange(T, device=slot.device).expand(B, T))
    tokens = tokens[:, :-1].view(B, count, size).transpose(0, 1)
    fresh = None
    if reset is not None:
        flags = torch.zeros(B, count + 1, device=slot.device, dtype=torch.bool)
        flags.scatter_(1, torch.where(real & reset, batch, count), True)
        fresh = flags[:, :-1].T[..., None, None, None]
    return Layout(tokens, (tokens[..., -1] < T)[..., None, None, None], fresh)


def _states(
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor,
    W: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor,
    layout: Layout,
    eps: float,
) -> Tensor:
    """What was learned before each mini-batch, (N, B, H, K, V)."""
    learned, G = initial_state.unbind(1)
    states = initial_state.new_empty(len(layout.tokens), *learned.shape)
    for n, tokens in enumerate(layout.tokens):
        learned, G = _emptied(layout, n, learned, G)
        states[n] = learned
        K, values, rates, shares = (
            _gather(x, tokens[None], learned.dtype)[0] for x in (k, v, rate, share)
        )
        norm = _norm(K @ (W + learned), values, weight, bias, eps)
        G = G + K.mT @ (rates * _gradient(norm, weight))
        learned = learned - shares[:, :, -1:] * G
        G = torch.where(layout.ends[n], 0, G)
    return states


def _gather(x: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, H, K) by (N, B, C) as (N, B, H, C, K); zeros where there is no token."""
    T = x.shape[1]
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    picked = x[rows, tokens.clamp(max=T - 1)].to(dtype)
    return torch.where((tokens < T)[..., None, None], picked, 0).transpose(2, 3)


def _emptied(layout: Layout, n: int, *parts: Tensor) -> tuple[Tensor, ...]:
    if layout.fresh is None:
        return parts
    return tuple(torch.where(layout.fresh[n], 0, x) for x in parts)


def _norm(Z: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Norm:
    centred = Z - Z.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    x = centred * r
    return Norm(x, weight * x + bias - v, r)


def _gradient(norm: Norm, weight: Tensor) -> Tensor:
    """See `seqzoo.kernels.ttt.reference.gradient`."""
    x, r, e = norm.x, norm.r, weight * norm.error
    return r * (e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True))


def _gradient_backward(norm: Norm, g: Tensor, dg: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Z and of weight * error from that of g."""
    x, r, e = norm.x, norm.r, weight * norm.error
    dh = r * dg
    along = (dh * x).mean(-1, keepdim=True)
    de = dh - dh.mean(-1, keepdim=True) - x * along
    dx = weight.square() * de - dh * (e * x).mean(-1, keepdim=True) - e * along
    # r times the derivative of a norm, and g = r (...) has its own r
    spread = (dx * x + dg * g).mean(-1, keepdim=True)
    return r * (dx - dx.mean(-1, keepdim=True) - x * spread), de
