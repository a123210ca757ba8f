"""A diagonal-plus-low-rank state in Triton, what is worked out for all chunks at once.

A program owns a chunk of one head. The decay between the halves of a block meets at the border
between them, as in `seqzoo.kernels.decay.chunked`: blocks of one size share a matrix product, of
which the corners are kept, for sizes 2, 4, ..., 32. Exponents climb from size to size by sums and
never differences, so none is above zero; their gradients are products with matrices of zeros and
ones.
"""

import triton
import triton.language as tl

from seqzoo.kernels.decay.tiles import is_right
from seqzoo.kernels.delta.fused_keys import LEVELS, log_decays


@triton.jit
def climb(early, until, g_t, level, BLOCK_T: tl.constexpr):
    """Exponents for blocks twice as large: from the border behind, and until the border ahead.

    `early` is without a token's own log decay g_t.
    """
    i, right = tl.arange(0, BLOCK_T), is_right(level, BLOCK_T)
    last = (((i >> level) ^ 1) << level) + (1 << level) - 1
    beside = tl.gather(early + g_t, tl.broadcast_to(last[:, None], early.shape), 0)
    return tl.where(right, early + beside, early), tl.where(right, until, until + beside)


@triton.jit
def apart(r, c):
    """Shifted by a level: 1 in the corners where c is left of the border and r right, 0 in a half.

    That is in one comparison, since AMD's mask registers are few. Below zero where c is not left.
    """
    return tl.where(c < r, c ^ r, -1)


@triton.jit
def load(x, at, there):
    """In float32, zero where there is nothing."""
    return tl.load(x + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def channels(token, first, t, T, K, BLOCK_K: tl.constexpr):
    """Key channels from `first` on, and where the tokens have them."""
    c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_K)
    return c, token[:, None] * K + c[None, :], (t < T)[:, None] & (c < K)[None, :]


@triton.jit
def _rows(
    x,
    k,
    b,
    g,
    decayed,
    keys,
    writes,
    total,
    token,
    t,
    T,
    K,
    READS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights of k and of b in rows of x, which is q, and x decayed since the chunk began.

    With READS x is a, which reads before its own decay and not what its token writes; and then k
    and b decayed until the chunk's end.
    """
    mine = tl.cast(tl.program_id(0), tl.int64)
    i = tl.arange(0, BLOCK_T)
    tile = decayed.dtype.element_ty
    left_of = apart(i[:, None], i[None, :])
    of_k = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    of_b = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    own_k = tl.zeros((BLOCK_T,), tl.float32)
    own_b = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        c, at, there = channels(token, first, t, T, K, BLOCK_K)
        g_t = log_decays(g, at, there)
        early, until = tl.zeros_like(g_t), tl.zeros_like(g_t)
        x_t, k_t, b_t = load(x, at, there), load(k, at, there), load(b, at, there)
        for level in range(LEVELS):
            x_left = (x_t * tl.exp(early if READS else early + g_t)).to(tile)
            left = tl.exp(until)
            k_left, b_left = tl.trans((k_t * left).to(tile)), tl.trans((b_t * left).to(tile))
            here = left_of >> level == 1
            of_k += tl.where(here, tl.dot(x_left, k_left, input_precision=PRECISION), 0.0)
            of_b += tl.where(here, tl.dot(x_left, b_left, input_precision=PRECISION), 0.0)
            early, until = climb(early, until, g_t, level, BLOCK_T)
        own_k += tl.sum(x_t * k_t, 1)
        own_b += tl.sum(x_t * b_t, 1)
        to = (mine * BLOCK_T + i)[:, None] * WIDTH + c[None, :]
        tl.store(decayed + to, (x_t * tl.exp(early if READS else early + g_t)).to(tile))
        if READS:
            left = tl.exp(until)
            tl.store(keys + to, (k_t * left).to(tile))
            tl.store(writes + to, (b_t * left).to(tile))
            tl.store(total + mine * WIDTH + c, tl.exp(tl.sum(g_t, 0)))
    if not READS:
        own = i[:, None] == i[None, :]
        of_k = tl.where(own, own_k[:, None], of_k)
        of_b = tl.where(own, own_b[:, None], of_b)
    return of_k, of_b


@triton.jit
def prepare(
    q,
    k,
    a,
    b,
    g,
    qk,
    qb,
    ak,
    inverse,
    queries,
    keys,
    reads,
    writes,
    total,
    T,
    H,
    K,
    N,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of q and a decayed since the chunk began, k and b until its end; qk, qb, M and T."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    square = (mine * BLOCK_T + i)[:, None] * BLOCK_T + i[None, :]
    M, above = _rows(
        a, k, b, g, reads, keys, writes, total, token, t, T, K,
        True, WIDTH, BLOCK_T, BLOCK_K, PRECISION,
    )  # fmt: skip
    tl.store(ak + square, M)
    left_of = apart(i[:, None], i[None, :])
    solved = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for level in range(LEVELS):  # from the inverses of blocks on the diagonal those of larger ones
        below = tl.where(left_of >> level == 1, above, 0.0)
        below = tl.dot(solved, below, input_precision=PRECISION)
        solved += tl.dot(below, solved, input_precision=PRECISION)
    tl.store(inverse + square, solved)
    A_k, A_b = _rows(
        q, k, b, g, queries, keys, writes, total, token, t, T, K,
        False, WIDTH, BLOCK_T, BLOCK_K, PRECISION,
    )  # fmt: skip
    tl.store(qk + square, A_k)
    tl.store(qb + square, A_b)
