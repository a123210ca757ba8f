"""The delta rule in chunks: a triangular inverse, matrix products, a short loop between chunks.

Let D_ij be the decay from token j to token i, and S the state where the chunk begins. What token i
writes is its key times u_i = beta_i (v_i - (D_i0 k_i)^T S - sum_{j < i} (k_i . D_ij k_j) u_j), that
is, U = T beta (V - K' S) with T = (1 + tril(beta K D K^T, -1))^-1, unit lower triangular (the UT
transform of the WY representation, Yang et al., arXiv:2406.06484, section 3.3; with decays,
arXiv:2412.06464 and arXiv:2510.26692). The outputs are those of decayed linear attention with
values U, and the decays within a chunk its halves, see `seqzoo.kernels.decay.chunked`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, split

from seqzoo.kernels.decay.chunked import (
    Decays,
    Pair,
    _add_matmul,
    _chunks,
    _decays,
    _decays_backward,
    _load,
    _matmul,
    _scores,
    _scores_backward,
    _sizes,
    _store,
    _totals,
    chunk_count,
)


class Scores(NamedTuple):
    """Decayed products with the keys, (..., C, C), and what their gradients need.

    Attributes:
        queries: q_i . D_ij k_j for j <= i, zero elsewhere.
        keys: the same of the keys with themselves.
        halves: of the queries and of the keys; of ones where the decay is a scalar.
        scalar: D, q_i . k_j and k_i . k_j where the decay is a scalar.
    """

    queries: Tensor
    keys: Tensor
    halves: tuple[list[Pair], list[Pair]]
    scalar: tuple[Tensor, Tensor, Tensor] | None


class Writes(NamedTuple):
    """T as above, T beta K', and what a chunk writes when it begins empty, T beta V."""

    T: Tensor
    W: Tensor
    U: Tensor


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, (B, 1, ...)."""
    q, k, v, beta, g = (x[:, 0].to(state.dtype) for x in (q, k, v, beta, g))
    S = g.exp()[..., None] * state
    error = v[:, :, None] - k[:, :, None] @ S
    new = torch.addcmul(S, k[..., None], beta[..., None] * error)
    return (q[:, :, None] @ new).transpose(1, 2), new


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `seqzoo.kernels.delta.delta`, in the dtype of `initial_state`.

    Args:
        q: (B, T, H, K), T >= 2.
        k: (B, T, H, K).
        v: (B, T, H, V).
        beta: (B, T, H, 1).
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
    for *given, to in zip(*(split(x, span, 1) for x in (q, k, v, beta, g, o)), strict=True):
        Q, K, V, b, G = _load(given, chunk, wide)
        decays = _decays(G)
        scores = _products(Q, K, decays)
        _, W, U = _writes(K * decays.since, V, b, scores.keys)
        S = states[n : n + len(Q) + 1].view(-1, *V.shape[1:4], *initial_state.shape[2:])
        Ku = (K * decays.until).mT
        for total, Ku_n, W_n, U_n, before, after in zip(
            _totals(decays), Ku, W, U, S, S[1:], strict=False
        ):
            _add_matmul(U_n, W_n, before)
            torch.mul(total, before, out=after)
            _add_matmul(after, Ku_n, U_n)
        _store(to, _add_matmul(scores.queries @ U, Q * decays.since, S[:-1]))
        n += len(Q)
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
    """Gradients of q, k, v, beta, g and the initial state, from the states of `forward`."""
    chunk, span = _sizes(v, k.shape[-1])
    dq, dk, dv, db, dg = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta, g)
    )
    wide, n = states.dtype, len(states) - 1
    tensors = (q, k, v, beta, g, do, dq, dk, dv, db, dg)
    parts = zip(*(split(x, span, 1) for x in tensors), strict=True)
    for *given, do_, dq_, dk_, dv_, db_, dg_ in reversed(list(parts)):
        Q, K, V, b, G = _load(given, chunk, wide)
        dO = _chunks(do_, chunk, wide).view(V.shape)
        decays = _decays(G)
        scores = _products(Q, K, decays)
        Qs, Ks, Ku = Q * decays.since, K * decays.since, K * decays.until
        T, W, U = _writes(Ks, V, b, scores.keys)
        n -= len(Q)
        S = states[n : n + len(Q)].view(-1, *V.shape[1:4], *states.shape[-2:])
        _add_matmul(U, W, S)
        dU = scores.queries.mT @ dO
        dS = torch.empty_like(states[n : n + len(Q) + 1]).view(-1, *S.shape[1:])
        _matmul(Qs, dO, dS[:-1])
        dS[-1] = dstate.reshape(S.shape[1:])
        for i, total in reversed(list(enumerate(_totals(decays)))):
            _add_matmul(dU[i], Ku[i], dS[i + 1])
            _add_matmul(dS[i].addcmul_(total, dS[i + 1]), W[i].mT, dU[i])
        dstate, dS = dS[0], dS[1:]
        R = T.mT @ dU
        bR = b * R
        _store(dv_, bR)
        dM = (R @ U.mT).neg_().tril_(-1)
        error = V - Ks @ S
        _store(db_, (R * error).sum(-1, keepdim=True) + (dM * scores.keys).sum(-1, keepdim=True))
        dQ, dK, dlevels = _products_backward(Q, K, decays, scores, dO @ U.mT, b * dM)
        dQs, dKs, dKu = dO @ S.mT, (bR @ S.mT).neg_(), U @ dS.mT
        _store(dq_, dQ.addcmul_(dQs, decays.since))
        _store(dk_, dK.addcmul_(dKs, decays.since).addcmul_(dKu, decays.until))
        dsince = dQs.mul_(Qs).addcmul_(dKs, Ks).sum_to_size(G.shape)
        dtotal = ((S * dS).sum(-1, keepdim=True) * _totals(decays)).mT
        dsince[..., -1:, :] += dtotal.sum_to_size(G[..., -1:, :].shape)
        _store(dg_, _decays_backward(dlevels, dsince, dKu.mul_(Ku).sum_to_size(G.shape)))
    return dq, dk, dv, db, dg, dstate.reshape(states.shape[1:]).clone()


def _products(q: Tensor, k: Tensor, decays: Decays) -> Scores:
    if decays.since.shape[-1] == k.shape[-1]:
        (A, right), (M, left) = _scores(q, k, decays), _scores(k, k, decays)
        return Scores(A, M, (right, left), None)
    ones, qk, kk = k.new_ones(k.shape[-2], 1), q @ k.mT, k @ k.mT
    D, halves = _scores(ones, ones, decays)
    return Scores(D * qk, D * kk, (halves, halves), (D, qk, kk))


def _products_backward(
    q: Tensor, k: Tensor, decays: Decays, scores: Scores, dA: Tensor, dM: Tensor
) -> tuple[Tensor, Tensor, list[Pair]]:
    """Gradients of q, k and the exponents of `decays.levels` from those of queries and keys."""
    if scores.scalar is None:
        dq, dk, dlevels = _scores_backward(q, k, decays, scores.halves[0], dA)
        dright, dleft, others = _scores_backward(k, k, decays, scores.halves[1], dM)
        for d, other in zip(dlevels, others, strict=True):
            d.right.add_(other.right)
            d.left.add_(other.left)
        return dq, dk.add_(dright).add_(dleft), dlevels
    D, qk, kk = scores.scalar
    ones = k.new_ones(k.shape[-2], 1)
    _, _, dlevels = _scores_backward(ones, ones, decays, scores.halves[0], dA * qk + dM * kk)
    dA, dM = dA * D, dM * D
    return dA @ k, dA.mT @ q + (dM + dM.mT) @ k, dlevels


def _writes(Ks: Tensor, V: Tensor, beta: Tensor, products: Tensor) -> Writes:
    """From keys decayed since the chunk began, and keys' products; W is negative, to be added."""
    T = inverse(beta * products)
    bT = T * beta.mT
    return Writes(T, (bT @ Ks).neg_(), bT @ V)


def inverse(M: Tensor) -> Tensor:
    """(1 + tril(M, -1))^-1, unit lower triangular."""
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)
    T: Tensor = torch.linalg.solve_triangular(M, eye, upper=False, unitriangular=True)
    return T
