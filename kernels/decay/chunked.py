"""Decayed linear attention in chunks: matrix products inside a chunk, a short loop between chunks.

Inside a chunk, o_i = sum_{j <= i} (q_i * exp(g_{j+1} + ... + g_i)) . k_j  v_j. The decay from the
left half of a block of tokens to its right half is a product of two factors that meet at the border
between them, exp(g_{border+1} + ... + g_i) and exp(g_{j+1} + ... + g_border). Every exponent is a
sum of log decays and never a difference, so none is above zero, nothing cancels and -inf is an
ordinary value. A chunk of 32 takes five halvings; the backward pass sums its gradients along the
same tree. A scalar decay is the tree over keys and queries of ones, times q k^T.

Chunks are worked on a few at a time so that they stay in the cache. Their tensors are
(N, B, Hk, R, C, K), R value heads for each of Hk key heads; R or K is 1 where it is shared.
"""

from typing import NamedTuple

import torch
from torch import Tensor, split, unflatten
from torch.nn.functional import pad

CHUNK = 32
CACHED = 1 << 18  # elements of each tensor of the chunks worked on at a time, on a CPU
TILE = 8  # rows of the smallest matrix product; smaller blocks share one


class Pair(NamedTuple):
    """Something of the right halves of all blocks of one size, and of the left; (..., n, h, K)."""

    right: Tensor
    left: Tensor


class Decays(NamedTuple):
    """What is left of a key, (..., C, K).

    Attributes:
        levels: for blocks of 2, 4, ... tokens, in the right half what came through the border, and
            at the border what the left half had.
        since: of what the chunk began with, after each token's own decay.
        until: of each token's write, at the end of the chunk.
    """

    levels: list[Pair]
    since: Tensor
    until: Tensor


class Weights(NamedTuple):
    """Weight A (..., C, C) of each value in each output, and what its gradient needs."""

    A: Tensor
    halves: list[Pair]
    scalar: (
        tuple[Tensor, Tensor] | None
    )  # decay from j to i and q_i . k_j, where A is their product


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, before: bool
) -> tuple[Tensor, Tensor]:
    """One token, (B, 1, ...), which reads the state before or after its own write."""
    B, H, K, V = state.shape
    q, k, v, g = (x[:, 0].to(state.dtype) for x in (q, k, v, g))
    q, k = (x[:, :, None].expand(-1, -1, H // k.shape[1], -1).reshape(B, H, K) for x in (q, k))
    new = torch.addcmul(g.exp()[..., None] * state, k[..., None], v[:, :, None])
    o = q[:, :, None] @ (state if before else new)
    return o.view(B, 1, H, V), new


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.decay.decay`; reads after the write, in the dtype of `initial_state`.

    Args:
        q: (B, T, Hk, K), T >= 2.
        k: (B, T, Hk, K).
        v: (B, T, H, V).
        g: log decay, (B, T, H, 1 or K).
        initial_state: (B, H, K, V).

    Returns:
        o: (B, T, H, V).
        states: before, between and after the chunks, (N + 1, B, H, K, V).
    """
    chunk, span = _sizes(v, k.shape[-1])
    wide, n = initial_state.dtype, 0
    states = initial_state.new_empty(1 + chunk_count(v.shape[1]), *initial_state.shape)
    states[0] = initial_state
    o = torch.empty(v.shape, dtype=wide, device=v.device)
    for *given, to in zip(*(split(x, span, 1) for x in (q, k, v, g, o)), strict=True):
        Q, K, V, G = _load(given, chunk, wide)
        decays = _decays(G)
        A = _weights(Q, K, decays).A
        S = states[n : n + len(Q) + 1].view(-1, *V.shape[1:4], *initial_state.shape[2:])
        _matmul(K * decays.until, V, S[1:])
        for S_n, S_next, total in zip(S, S[1:], _totals(decays), strict=False):
            S_next.addcmul_(total, S_n)
        _store(to, _add_matmul(A @ V, Q * decays.since, S[:-1]))
        n += len(Q)
    return o, states


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, states: Tensor, do: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the initial state, from the states of `forward`."""
    chunk, span = _sizes(v, k.shape[-1])
    dq, dk, dv, dg = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g)
    )
    wide, n = states.dtype, len(states) - 1
    parts = zip(*(split(x, span, 1) for x in (q, k, v, g, do, dq, dk, dv, dg)), strict=True)
    for *given, do_, dq_, dk_, dv_, dg_ in reversed(list(parts)):
        Q, K, V, G = _load(given, chunk, wide)
        dO = _chunks(do_, chunk, wide).view(V.shape)
        decays = _decays(G)
        weights = _weights(Q, K, decays)
        Qs, Ks = Q * decays.since, K * decays.until
        n -= len(Q)
        S = states[n : n + len(Q)].view(-1, *V.shape[1:4], *states.shape[-2:])
        dS = torch.empty_like(states[n : n + len(Q) + 1]).view(-1, *S.shape[1:])
        _matmul(Qs, dO, dS[:-1])
        dS[-1] = dstate.reshape(S.shape[1:])
        for i, total in reversed(list(enumerate(_totals(decays)))):
            dS[i].addcmul_(total, dS[i + 1])
        dstate, dS = dS[0], dS[1:]
        _store(dv_, _add_matmul(weights.A.mT @ dO, Ks, dS))
        dQ, dK, dlevels = _weights_backward(Q, K, decays, weights, dO @ V.mT)
        dQs, dKs = dO @ S.mT, V @ dS.mT
        _store(dq_, dQ.add_((dQs * decays.since).sum_to_size(dQ.shape)))
        _store(dk_, dK.add_((dKs * decays.until).sum_to_size(dK.shape)))
        dsince, duntil = (dQs.mul_(Qs).sum_to_size(G.shape), dKs.mul_(Ks).sum_to_size(G.shape))
        dtotal = ((S * dS).sum(-1, keepdim=True) * _totals(decays)).mT
        dsince[..., -1:, :] += dtotal.sum_to_size(G[..., -1:, :].shape)
        _store(dg_, _decays_backward(dlevels, dsince, duntil))
    return dq, dk, dv, dg, dstate.reshape(states.shape[1:]).clone()


def _totals(decays: Decays) -> Tensor:
    """Decay over each whole chunk, (..., 1 or K, 1)."""
    return decays.since[..., -1, :, None]


def _matmul(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Write x^T y to contiguous memory."""
    torch.bmm(x.flatten(0, -3).mT, y.flatten(0, -3), out=out.flatten(0, -3))


def _add_matmul(to: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Add x y in place."""
    to.flatten(0, -3).baddbmm_(x.flatten(0, -3), y.flatten(0, -3))
    return to


def _decays(g: Tensor) -> Decays:
    """Takes over the memory of the log decays g, (..., C, 1 or K)."""
    since, until, levels, h = g, torch.zeros_like(g), [], 1
    while h < g.shape[-2]:
        begun, going = _halves(since, h), _halves(until, h)
        levels.append(Pair(begun.right.exp(), going.left.exp()))
        going.left.add_(begun.right[..., -1:, :])
        begun.right.add_(begun.left[..., -1:, :])
        h *= 2
    return Decays(levels, since.exp_(), until.exp_())


def _decays_backward(dlevels: list[Pair], dsince: Tensor, duntil: Tensor) -> Tensor:
    """Gradient of g from those of the exponents in `Decays`; takes over the memory of `dsince`."""
    for d in reversed(dlevels):
        begun, going = _halves(dsince, d.right.shape[-2]), _halves(duntil, d.right.shape[-2])
        begun.left[..., -1, :] += begun.right.sum(-2)
        begun.right[..., -1, :] += going.left.sum(-2)
        begun.right.add_(d.right)
        going.left.add_(d.left)
    return dsince


def _weights(q: Tensor, k: Tensor, decays: Decays) -> Weights:
    if decays.since.shape[-1] == k.shape[-1]:
        return Weights(*_scores(q, k, decays), None)
    ones, products = k.new_ones(k.shape[-2], 1), q @ k.mT
    L, halves = _scores(ones, ones, decays)
    return Weights(L * products, halves, (L, products))


def _weights_backward(
    q: Tensor, k: Tensor, decays: Decays, weights: Weights, dA: Tensor
) -> tuple[Tensor, Tensor, list[Pair]]:
    """Gradients of q, k and the exponents of `decays.levels`."""
    if weights.scalar is None:
        return _scores_backward(q, k, decays, weights.halves, dA)
    L, products = weights.scalar
    ones = k.new_ones(k.shape[-2], 1)
    _, _, dlevels = _scores_backward(ones, ones, decays, weights.halves, dA * products)
    d = (dA * L).sum_to_size(products.shape)
    return d @ k, d.mT @ q, dlevels


def _scores(q: Tensor, k: Tensor, decays: Decays) -> tuple[Tensor, list[Pair]]:
    """(q_i * decay from j to i) . k_j for j <= i, zero elsewhere; and the decayed halves."""
    C, halves = q.shape[-2], []
    A = q.new_zeros(*decays.since.shape[:-1], C)
    A.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    for level in decays.levels:
        h = level.right.shape[-2]
        qs, ks = _halves(q, h).right * level.right, _halves(k, h).left * level.left
        _corners(A, h).copy_(_blocks(_tiles(qs, C) @ _tiles(ks, C).mT, h))
        halves.append(Pair(qs, ks))
    return A, halves


def _scores_backward(
    q: Tensor, k: Tensor, decays: Decays, halves: list[Pair], dA: Tensor
) -> tuple[Tensor, Tensor, list[Pair]]:
    C, dlevels = q.shape[-2], []
    diagonal = dA.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk = diagonal * k, diagonal * q
    for level, (qs, ks) in zip(decays.levels, halves, strict=True):
        h = level.right.shape[-2]
        qt, kt = _tiles(qs, C), _tiles(ks, C)
        d = qt.new_zeros(*qt.shape[:-1], qt.shape[-2])
        _blocks(d, h).copy_(_corners(dA, h))
        dqs, dks = (d @ kt).view(qs.shape), (d.mT @ qt).view(ks.shape)
        _halves(dq, h).right.addcmul_(dqs, level.right)
        _halves(dk, h).left.addcmul_(dks, level.left)
        dlevels.append(Pair(dqs.mul_(qs), dks.mul_(ks)))
    return dq, dk, dlevels


def chunk_count(length: int) -> int:
    """Into how many chunks a sequence is cut."""
    return -(-length // CHUNK)


def _sizes(v: Tensor, K: int) -> tuple[int, int]:
    """Tokens of a chunk (32, or the power of two that holds them all), and of those worked on."""
    B, T, H, V = v.shape
    chunk = CHUNK
    while chunk >= 2 * T:
        chunk //= 2
    if v.device.type != "cpu":
        return chunk, T
    return chunk, max(1, CACHED // max(1, B * H * chunk * max(K, V, chunk))) * chunk


def _load(given: list[Tensor], chunk: int, dtype: torch.dtype) -> list[Tensor]:
    heads = given[1].shape[2]
    return [unflatten(_chunks(x, chunk, dtype), 2, (heads, -1)) for x in given]


def _chunks(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, t, H, K) -> (N, B, H, C, K), with zeros behind the end."""
    if x.shape[1] % chunk:
        x = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    x = unflatten(x, 1, (-1, chunk)).permute(1, 0, 3, 2, 4)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _store(to: Tensor, x: Tensor) -> None:
    """Write chunks to where they came from, (B, t, H, K), summed over the heads that share one."""
    if x.shape[2] * x.shape[3] != to.shape[2]:
        x = x.sum(3, keepdim=True)
    x = x.flatten(2, 3).permute(1, 0, 3, 2, 4)
    if to.shape[1] == x.shape[1] * x.shape[2]:
        unflatten(to, 1, x.shape[1:3]).copy_(x)
    else:
        to.copy_(x.flatten(1, 2)[:, : to.shape[1]])


def _halves(x: Tensor, h: int) -> Pair:
    """Views of the halves of all blocks of 2 h tokens."""
    left, right = unflatten(x, -2, (-1, 2, h)).unbind(-3)
    return Pair(right, left)


def _tiles(x: Tensor, C: int) -> Tensor:
    """(..., n, h, K) -> (..., m, s h, K): s small blocks side by side, for one matrix product."""
    h = x.shape[-2]
    return unflatten(x.flatten(-3, -2), -2, (-1, min(max(h, TILE), C // 2)))


def _blocks(x: Tensor, h: int) -> Tensor:
    """View of the h x h blocks on the diagonals of tiles, (..., h, h, s, m)."""
    x = unflatten(unflatten(x, -1, (-1, h)), -3, (-1, h))
    return x.diagonal(dim1=-4, dim2=-2).movedim(-4, -1)


def _corners(A: Tensor, h: int) -> Tensor:
    """View of the weights of right halves on left halves as `_blocks` has it, (..., h, h, s, m)."""
    A = unflatten(unflatten(A, -1, (-1, 2, h)), -4, (-1, 2, h))
    corner = A.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :]  # (..., h, h, n)
    C = 2 * h * corner.shape[-1]
    return unflatten(corner, -1, (-1, min(max(h, TILE), C // 2) // h)).mT
