"""Gradients of a diagonal-plus-low-rank state in Triton, for all chunks at once.

From the states, from Y and its gradient, a program works on a chunk of one head; what the tokens of
a chunk give each other goes by blocks of one size, as in `fused_reads.py`.
"""

import triton
import triton.language as tl

from seqzoo.kernels.decay.tiles import sum_before, sum_behind, sums
from seqzoo.kernels.delta.fused_keys import LEVELS, block, log_decays
from seqzoo.kernels.delta_lowrank.fused_reads import apart, channels, climb, load


@triton.jit
def corrections(
    v,
    do,
    ak,
    inverse,
    reads,
    states,
    found,
    dfound,
    dqk,
    dqb,
    dak,
    dab,
    T,
    H,
    K,
    V,
    N,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Again Y, what was found; gradients of what tokens have to do with each other."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    rows = tl.cast(tl.num_programs(0), tl.int64) // N
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    here = mine * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    tile = reads.dtype.element_ty
    square = here[:, None] * BLOCK_T + i[None, :]
    dM = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    dN = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for first in range(0, V, BLOCK_V):
        w = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_V)
        at, there = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        v_t = tl.load(v + at, mask=there, other=0.0).to(tile)
        y = tl.dot(tl.load(ak + square), v_t, input_precision=PRECISION)
        for part in range(0, WIDTH, BLOCK_K):
            c, state, inside = block(n * rows + row, part, w, K, V, BLOCK_K)
            S = tl.load(states + state, mask=inside, other=0.0).to(tile)
            a_t = tl.load(reads + here[:, None] * WIDTH + c[None, :])
            y += tl.dot(a_t, S, input_precision=PRECISION)
        y = tl.dot(tl.load(inverse + square), y, input_precision=PRECISION).to(tile)
        wide, to = (w < V)[None, :], here[:, None] * V + w[None, :]
        tl.store(found + to, y, mask=wide)
        dy = tl.load(dfound + to, mask=wide, other=0.0)
        dM += tl.dot(dy, tl.trans(v_t), input_precision=PRECISION)
        dN += tl.dot(dy, tl.trans(y), input_precision=PRECISION)
    tl.store(dak + square, tl.where(i[:, None] > i[None, :], dM, 0.0))
    tl.store(dab + square, tl.where(i[:, None] > i[None, :], dN, 0.0))
    tl.debug_barrier()  # Y is read again: a second loop, for registers
    dA_k = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    dA_b = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for first in range(0, V, BLOCK_V):
        w = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_V)
        at, there = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        do_t = tl.load(do + at, mask=there, other=0.0).to(tile)
        v_t = tl.load(v + at, mask=there, other=0.0).to(tile)
        dA_k += tl.dot(do_t, tl.trans(v_t), input_precision=PRECISION)
        to = here[:, None] * V + w[None, :]
        y = tl.load(found + to, mask=(w < V)[None, :], other=0.0)
        dA_b += tl.dot(do_t, tl.trans(y), input_precision=PRECISION)
    tl.store(dqk + square, tl.where(i[:, None] >= i[None, :], dA_k, 0.0))
    tl.store(dqb + square, tl.where(i[:, None] >= i[None, :], dA_b, 0.0))


@triton.jit
def _both(x, y, square, inside, x_of, y_of, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """Two matrices, of each what is inside, times a factor each."""
    of_x = tl.load(x + square, mask=inside, other=0.0).to(x_of.dtype)
    of_y = tl.load(y + square, mask=inside, other=0.0).to(x_of.dtype)
    if TURNED:
        of_x, of_y = tl.trans(of_x), tl.trans(of_y)
    made = tl.dot(of_x, x_of, input_precision=PRECISION)
    return tl.dot(of_y, y_of, made, input_precision=PRECISION)


@triton.jit
def _by_states(
    x,
    index,
    t,
    T,
    states,
    chunk,
    first,
    K,
    V,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X times a transposed state, where row i of X is row `index`[i] of x (..., V)."""
    begin = tl.cast(index, tl.int64)[:, None] * V
    made = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, V, BLOCK_V):
        w = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_V)
        _, at, inside = block(chunk, first, w, K, V, BLOCK_K)
        S = tl.trans(tl.load(states + at, mask=inside, other=0.0).to(TILE))
        real = (t < T)[:, None] & (w < V)[None, :]
        x_t = tl.load(x + begin + w[None, :], mask=real, other=0.0).to(TILE)
        made += tl.dot(x_t, S, input_precision=PRECISION)
    return made


@triton.jit
def _into_rows(
    x_t,
    k_t,
    b_t,
    g_t,
    dx_t,
    of_k,
    of_b,
    square,
    READS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of x, which is q or with READS a, and its part in that of log decays.

    From the gradients dx_t of x decayed since the chunk began, and of the weights in its rows.
    """
    i = tl.arange(0, BLOCK_T)
    left_of = apart(i[:, None], i[None, :])
    counted = apart(i[None, :], i[:, None])
    if not READS:
        counted = tl.where(i[:, None] == i[None, :], 0, counted)
    dx_t *= tl.exp(sum_before(g_t, BLOCK_T, not READS))
    dlog = sums(counted >= 0, dx_t * x_t, PRECISION)
    early, until = tl.zeros_like(g_t), tl.zeros_like(g_t)
    for level in range(LEVELS):
        left, here = tl.exp(until), left_of >> level == 1
        k_left, b_left = (k_t * left).to(TILE), (b_t * left).to(TILE)
        into = _both(of_k, of_b, square, here, k_left, b_left, False, PRECISION)
        into *= tl.exp(early if READS else early + g_t)
        dx_t += into
        dlog += sums(counted >> level == 0, into * x_t, PRECISION)
        early, until = climb(early, until, g_t, level, BLOCK_T)
    return dx_t, dlog


@triton.jit
def _into_columns(
    x_t,
    q_t,
    a_t,
    g_t,
    of_q,
    of_a,
    square,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the weights in its columns give x, which is k or b, and log decays."""
    i = tl.arange(0, BLOCK_T)
    left_of = apart(i[:, None], i[None, :])
    made, dlog = tl.zeros_like(g_t), tl.zeros_like(g_t)
    early, until = tl.zeros_like(g_t), tl.zeros_like(g_t)
    for level in range(LEVELS):
        q_left, a_left = (q_t * tl.exp(early + g_t)).to(TILE), (a_t * tl.exp(early)).to(TILE)
        here = left_of >> level == 1
        into = _both(of_q, of_a, square, here, q_left, a_left, True, PRECISION)
        into *= tl.exp(until)
        made += into
        dlog += sums(left_of >> level == 0, into * x_t, PRECISION)
        early, until = climb(early, until, g_t, level, BLOCK_T)
    return made, dlog


@triton.jit
def of_rows(
    q,
    k,
    a,
    b,
    g,
    states,
    dstates,
    do,
    dfound,
    dqk,
    dqb,
    dak,
    dab,
    dq,
    da,
    dg,
    T,
    H,
    K,
    V,
    N,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q and a; their part in that of log decays, and that of whole chunks."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    chunk = n * (tl.cast(tl.num_programs(0), tl.int64) // N) + row
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    here = mine * BLOCK_T + i
    first = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K
    _, at, there = channels(token, first, t, T, K, BLOCK_K)
    tile = dfound.dtype.element_ty
    g_t, k_t, b_t = log_decays(g, at, there), load(k, at, there), load(b, at, there)
    square = here[:, None] * BLOCK_T + i[None, :]
    q_t = load(q, at, there)
    dq_t = _by_states(
        do, token, t, T, states, chunk, first, K, V, tile, BLOCK_T, BLOCK_K, BLOCK_V, PRECISION
    )
    dq_t, dlog = _into_rows(
        q_t, k_t, b_t, g_t, dq_t, dqk, dqb, square, False, tile, BLOCK_T, PRECISION
    )
    dq_t += tl.load(dqk + here * BLOCK_T + i)[:, None] * k_t
    dq_t += tl.load(dqb + here * BLOCK_T + i)[:, None] * b_t
    tl.store(dq + at, dq_t, mask=there)
    a_t = load(a, at, there)
    da_t = _by_states(
        dfound, here, t, T, states, chunk, first, K, V, tile, BLOCK_T, BLOCK_K, BLOCK_V, PRECISION
    )
    da_t, part = _into_rows(
        a_t, k_t, b_t, g_t, da_t, dak, dab, square, True, tile, BLOCK_T, PRECISION
    )
    tl.store(da + at, da_t, mask=there)
    dover = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, V, BLOCK_V):
        w = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_V)
        _, state, inside = block(chunk, first, w, K, V, BLOCK_K)
        dS = tl.load(dstates + state, mask=inside, other=0.0)
        dover += tl.sum(dS * tl.load(states + state, mask=inside, other=0.0), 1)
    dlog += part + (dover * tl.exp(tl.sum(g_t, 0)))[None, :]
    tl.store(dg + at, dlog, mask=there)


@triton.jit
def of_columns(
    x,
    q,
    a,
    g,
    z,
    dfound,
    dstates,
    of_q,
    of_a,
    dx,
    dg,
    T,
    H,
    K,
    V,
    N,
    KEYS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of x, and its part in that of log decays, which is added.

    With KEYS x is k and z is v, else x is b and z is Y.
    """
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    chunk = n * (tl.cast(tl.num_programs(0), tl.int64) // N) + row
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    here = mine * BLOCK_T + i
    first = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K
    _, at, there = channels(token, first, t, T, K, BLOCK_K)
    tile = dfound.dtype.element_ty
    x_t, q_t, a_t = load(x, at, there), load(q, at, there), load(a, at, there)
    g_t = log_decays(g, at, there)
    square = here[:, None] * BLOCK_T + i[None, :]
    made, dlog = _into_columns(x_t, q_t, a_t, g_t, of_q, of_a, square, tile, BLOCK_T, PRECISION)
    index = token if KEYS else here
    dx_t = _by_states(
        z, index, t, T, dstates, chunk, first, K, V, tile, BLOCK_T, BLOCK_K, BLOCK_V, PRECISION
    )
    dx_t *= tl.exp(sum_behind(g_t, BLOCK_T, False))
    dlog += sums(i[:, None] > i[None, :], dx_t * x_t, PRECISION)
    dx_t += made + tl.load(of_q + here * BLOCK_T + i)[:, None] * q_t
    tl.store(dx + at, dx_t, mask=there)
    tl.store(dg + at, dlog + tl.load(dg + at, mask=there, other=0.0), mask=there)
