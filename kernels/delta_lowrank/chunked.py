"""A diagonal-plus-low-rank state in chunks, as `seqzoo.kernels.delta.chunked` has the delta rule.

Let D_ij be the decay from token j to token i, and S the state where the chunk begins. Token i reads
y_i = S_{i-1}^T a_i before its own decay, that is, where token i - 1 left the state: the weights of
a are those of a query one token earlier, moved down by one row, N = down(up(a) D b^T) and
M = down(up(a) D k^T), strictly lower triangular. Then Y = T (M V + A' S) with T = (1 - N)^-1 and
A' = a decayed from the chunk's start to the token before, and the chunk writes b y^T + k v^T.
"""

from typing import NamedTuple

import torch
from torch import Tensor, split
from torch.nn.functional import pad

from seqzoo.kernels.decay.chunked import (
    Decays,
    Pair,
    Weights,
    _add_matmul,
    _chunks,
    _decays,
    _decays_backward,
    _load,
    _matmul,
    _sizes,
    _store,
    _totals,
    _weights,
    _weights_backward,
    chunk_count,
)
from seqzoo.kernels.delta.chunked import inverse


class Reads(NamedTuple):
    """What the tokens of a chunk read, (..., C, C) unless said otherwise.

    Attributes:
        qk: weights of the values in the outputs.
        qb: of what a has read in the outputs.
        ak: of the values in what a reads, one row up.
        ab: of what a has read in what a reads, one row up.
        T: from what a reads of others to what it reads in all.
        M: `ak` in its own rows.
        As: a decayed since the chunk began, without its own token's decay, (..., C, K).
        W: T As.
        Y: what a reads when the chunk begins empty, (..., C, V).
    """

    qk: Weights
    qb: Weights
    ak: Weights
    ab: Weights
    T: Tensor
    M: Tensor
    As: Tensor
    W: Tensor
    Y: Tensor


class Near(NamedTuple):
    """Gradients by way of `qk`, `qb`, `ak`, `ab`; that of a one row up, and of the levels."""

    q: Tensor
    k: Tensor
    a: Tensor
    b: Tensor
    levels: list[Pair]


def step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, (B, 1, ...)."""
    q, k, v, a, b, g = (x[:, 0].to(state.dtype) for x in (q, k, v, a, b, g))
    new = torch.addcmul(g.exp()[..., None] * state, b[..., None], a[:, :, None] @ state)
    new = torch.addcmul(new, k[..., None], v[:, :, None])
    return (q[:, :, None] @ new).transpose(1, 2), new


def forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.delta_lowrank.delta_lowrank`, in the dtype of `initial_state`.

    Args:
        q: (B, T, H, K), T >= 2; k, a and b alike.
        k: keys.
        v: (B, T, H, V).
        a: what is read.
        b: where it is written.
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
    for *given, to in zip(*(split(x, span, 1) for x in (q, k, v, a, b, g, o)), strict=True):
        Q, K, V, A, B, G = _load(given, chunk, wide)
        decays = _decays(G)
        reads = _reads(Q, K, V, A, B, decays)
        S = states[n : n + len(Q) + 1].view(-1, *V.shape[1:4], *initial_state.shape[2:])
        _matmul(K * decays.until, V, S[1:])
        Bu = (B * decays.until).mT
        for total, Bu_n, W_n, Y_n, before, after in zip(
            _totals(decays), Bu, reads.W, reads.Y, S, S[1:], strict=False
        ):
            _add_matmul(Y_n, W_n, before)
            _add_matmul(after.addcmul_(total, before), Bu_n, Y_n)
        out = _add_matmul(reads.qk.A @ V, reads.qb.A, reads.Y)
        _store(to, _add_matmul(out, Q * decays.since, S[:-1]))
        n += len(Q)
    return o, states


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    states: Tensor,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, g and the initial state, from the states of `forward`."""
    chunk, span = _sizes(v, k.shape[-1])
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, a, b, g)]
    wide, n = states.dtype, len(states) - 1
    parts = zip(*(split(x, span, 1) for x in (q, k, v, a, b, g, do, *made)), strict=True)
    for *given, do_, dq_, dk_, dv_, da_, db_, dg_ in reversed(list(parts)):
        Q, K, V, A, B, G = _load(given, chunk, wide)
        dO = _chunks(do_, chunk, wide).view(V.shape)
        decays = _decays(G)
        reads = _reads(Q, K, V, A, B, decays)
        Qs, Ku, Bu = Q * decays.since, K * decays.until, B * decays.until
        n -= len(Q)
        S = states[n : n + len(Q)].view(-1, *V.shape[1:4], *states.shape[-2:])
        Y = _add_matmul(reads.Y, reads.W, S)
        dY = reads.qb.A.mT @ dO
        dS = torch.empty_like(states[n : n + len(Q) + 1]).view(-1, *S.shape[1:])
        _matmul(Qs, dO, dS[:-1])
        dS[-1] = dstate.reshape(S.shape[1:])
        for i, total in reversed(list(enumerate(_totals(decays)))):
            _add_matmul(dY[i], Bu[i], dS[i + 1])
            _add_matmul(dS[i].addcmul_(total, dS[i + 1]), reads.W[i].mT, dY[i])
        dstate, dS = dS[0], dS[1:]
        R = reads.T.mT @ dY
        _store(dv_, _add_matmul(_add_matmul(reads.qk.A.mT @ dO, reads.M.mT, R), Ku, dS))
        near = _near(Q, K, _up(A), B, decays, reads, dO, _up(R), V, Y)
        dQs, dAs, dKu, dBu = dO @ S.mT, R @ S.mT, V @ dS.mT, Y @ dS.mT
        _store(dq_, near.q.addcmul_(dQs, decays.since))
        _store(dk_, near.k.addcmul_(dKu, decays.until))
        _store(da_, _down(near.a).addcmul_(dAs, _since_before(decays)))
        _store(db_, near.b.addcmul_(dBu, decays.until))
        dsince = dQs.mul_(Qs).add_(_up(dAs.mul_(reads.As))).sum_to_size(G.shape)
        duntil = dKu.mul_(Ku).addcmul_(dBu, Bu).sum_to_size(G.shape)
        dtotal = ((S * dS).sum(-1, keepdim=True) * _totals(decays)).mT
        dsince[..., -1:, :] += dtotal.sum_to_size(G[..., -1:, :].shape)
        _store(dg_, _decays_backward(near.levels, dsince, duntil))
    dq, dk, dv, da, db, dg = made
    return dq, dk, dv, da, db, dg, dstate.reshape(states.shape[1:]).clone()


def _reads(Q: Tensor, K: Tensor, V: Tensor, A: Tensor, B: Tensor, decays: Decays) -> Reads:
    early = _up(A)
    qk, qb, ak, ab = (_weights(x, y, decays) for x in (Q, early) for y in (K, B))
    T, M, As = inverse(-_down(ab.A)), _down(ak.A), A * _since_before(decays)
    return Reads(qk, qb, ak, ab, T, M, As, T @ As, T @ (M @ V))


def _near(
    Q: Tensor,
    K: Tensor,
    early: Tensor,
    B: Tensor,
    decays: Decays,
    reads: Reads,
    dO: Tensor,
    dX: Tensor,
    V: Tensor,
    Y: Tensor,
) -> Near:
    """From gradients of the outputs and, one row up, of what a reads of others."""
    dq, dk, levels = _weights_backward(Q, K, decays, reads.qk, dO @ V.mT)
    dq_b, db, of_qb = _weights_backward(Q, B, decays, reads.qb, dO @ Y.mT)
    da, dk_a, of_ak = _weights_backward(early, K, decays, reads.ak, dX @ V.mT)
    da_b, db_a, of_ab = _weights_backward(early, B, decays, reads.ab, dX @ Y.mT)
    for level, *others in zip(levels, of_qb, of_ak, of_ab, strict=True):
        for other in others:
            level.right.add_(other.right)
            level.left.add_(other.left)
    return Near(dq.add_(dq_b), dk.add_(dk_a), da.add_(da_b), db.add_(db_a), levels)


def _up(x: Tensor) -> Tensor:
    """Row i has what row i + 1 had; zeros in the last."""
    return pad(x[..., 1:, :], (0, 0, 0, 1))


def _down(x: Tensor) -> Tensor:
    """Row i has what row i - 1 had; zeros in the first."""
    return pad(x[..., :-1, :], (0, 0, 1, 0))


def _since_before(decays: Decays) -> Tensor:
    """`since` of the token before; of the first token 1."""
    return pad(decays.since[..., :-1, :], (0, 0, 1, 0), value=1.0)
