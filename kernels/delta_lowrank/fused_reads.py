"""A diagonal-plus-low-rank state in Triton, what is worked out for all chunks at once.

A program owns a chunk of one head. Decays are as in `seqzoo.kernels.delta.fused_keys`: products of
log decays with matrices of zeros and ones, halves of a block meeting at the border between them.
What a token reads has not decayed at that token yet: its row of ones ends one token earlier.
"""

import triton
import triton.language as tl

from seqzoo.kernels.delta.fused_keys import LEVELS, between, block, corner, halfway, log_decays


@triton.jit
def before(border, BLOCK_T: tl.constexpr):
    """As `between`, for what reads before its own decay; nothing up to the border, nor behind."""
    i = tl.arange(0, BLOCK_T)
    return tl.where((i[None, :] > border[:, None]) & (i[None, :] < i[:, None]), 1.0, 0.0)


@triton.jit
def _decay(ones, g_t, PRECISION: tl.constexpr):
    return tl.exp(tl.dot(ones, g_t, input_precision=PRECISION))


@triton.jit
def _load(x, at, there):
    return tl.load(x + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _channels(token, first, t, T, K, BLOCK_K: tl.constexpr):
    """Key channels from `first` on, and where the tokens have them."""
    c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_K)
    return c, token[:, None] * K + c[None, :], (t < T)[:, None] & (c < K)[None, :]


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
    tile = queries.dtype.element_ty
    square = (mine * BLOCK_T + i)[:, None] * BLOCK_T + i[None, :]
    of_k = tl.zeros((BLOCK_T,), tl.float32)
    of_b = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        c, at, there = _channels(token, first, t, T, K, BLOCK_K)
        g_t = log_decays(g, at, there)
        to = (mine * BLOCK_T + i)[:, None] * WIDTH + c[None, :]
        q_t, k_t, b_t = _load(q, at, there), _load(k, at, there), _load(b, at, there)
        of_k += tl.sum(q_t * k_t, 1)
        of_b += tl.sum(q_t * b_t, 1)
        since = _decay(between(i * 0 - 1, BLOCK_T), g_t, PRECISION)
        tl.store(queries + to, (q_t * since).to(tile))
        until = _decay(between(i * 0 + BLOCK_T - 1, BLOCK_T), g_t, PRECISION)
        tl.store(keys + to, (k_t * until).to(tile))
        tl.store(writes + to, (b_t * until).to(tile))
        early = _decay(before(i * 0 - 1, BLOCK_T), g_t, PRECISION)
        tl.store(reads + to, (_load(a, at, there) * early).to(tile))
        tl.store(total + mine * WIDTH + c, tl.exp(tl.sum(g_t, 0)))
    own = i[:, None] == i[None, :]
    A_k, A_b = tl.where(own, of_k[:, None], 0.0), tl.where(own, of_b[:, None], 0.0)
    M = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    solved = tl.where(own, 1.0, 0.0)
    for level in range(LEVELS):
        border, here = halfway(1 << level, BLOCK_T), corner(1 << level, BLOCK_T)
        at_qk = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        at_qb = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        at_ak = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        at_ab = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for first in range(0, WIDTH, BLOCK_K):
            c, at, there = _channels(token, first, t, T, K, BLOCK_K)
            g_t = log_decays(g, at, there)
            left = _decay(between(border, BLOCK_T), g_t, PRECISION)
            early = _decay(before(border, BLOCK_T), g_t, PRECISION)
            q_t = (_load(q, at, there) * left).to(tile)
            a_t = (_load(a, at, there) * early).to(tile)
            k_t = tl.trans((_load(k, at, there) * left).to(tile))
            b_t = tl.trans((_load(b, at, there) * left).to(tile))
            at_qk += tl.dot(q_t, k_t, input_precision=PRECISION)
            at_qb += tl.dot(q_t, b_t, input_precision=PRECISION)
            at_ak += tl.dot(a_t, k_t, input_precision=PRECISION)
            at_ab += tl.dot(a_t, b_t, input_precision=PRECISION)
        A_k, A_b = tl.where(here, at_qk, A_k), tl.where(here, at_qb, A_b)
        M = tl.where(here, at_ak, M)
        # from the inverses of blocks on the diagonal those of blocks twice as large
        below = tl.dot(solved, tl.where(here, at_ab, 0.0), input_precision=PRECISION)
        solved += tl.dot(below, solved, input_precision=PRECISION)
    tl.store(qk + square, A_k)
    tl.store(qb + square, A_b)
    tl.store(ak + square, M)
    tl.store(inverse + square, solved)


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
def gradients(
    q,
    k,
    v,
    a,
    b,
    g,
    states,
    dstates,
    do,
    found,
    dfound,
    dqk,
    dqb,
    dak,
    dab,
    dq,
    dk,
    da,
    db,
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
    """Gradients of q, k, a, b and log decays: first by the states, then by the chunk's tokens."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    rows = tl.cast(tl.num_programs(0), tl.int64) // N
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    here = mine * BLOCK_T + i
    first = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K
    _, at, there = _channels(token, first, t, T, K, BLOCK_K)
    tile = found.dtype.element_ty
    dq_t = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    dk_t = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    da_t = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    db_t = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    dover = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, V, BLOCK_V):
        w = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_V)
        _, state, inside = block(n * rows + row, first, w, K, V, BLOCK_K)
        S = tl.load(states + state, mask=inside, other=0.0)
        dS = tl.load(dstates + state, mask=inside, other=0.0)
        dover += tl.sum(S * dS, 1)
        values, real = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        scratch, wide = here[:, None] * V + w[None, :], (w < V)[None, :]
        S, dS = tl.trans(S.to(tile)), tl.trans(dS.to(tile))
        do_t = tl.load(do + values, mask=real, other=0.0).to(tile)
        dq_t += tl.dot(do_t, S, input_precision=PRECISION)
        dy = tl.load(dfound + scratch, mask=wide, other=0.0)
        da_t += tl.dot(dy, S, input_precision=PRECISION)
        v_t = tl.load(v + values, mask=real, other=0.0).to(tile)
        dk_t += tl.dot(v_t, dS, input_precision=PRECISION)
        y = tl.load(found + scratch, mask=wide, other=0.0)
        db_t += tl.dot(y, dS, input_precision=PRECISION)
    q_t, k_t = _load(q, at, there), _load(k, at, there)
    a_t, b_t = _load(a, at, there), _load(b, at, there)
    g_t = log_decays(g, at, there)
    since, early = between(i * 0 - 1, BLOCK_T), before(i * 0 - 1, BLOCK_T)
    until = between(i * 0 + BLOCK_T - 1, BLOCK_T)
    dq_t *= _decay(since, g_t, PRECISION)
    da_t *= _decay(early, g_t, PRECISION)
    left = _decay(until, g_t, PRECISION)
    dk_t *= left
    db_t *= left
    dlog = (dover * tl.exp(tl.sum(g_t, 0)))[None, :] + tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    dlog += tl.dot(tl.trans(since), dq_t * q_t, input_precision=PRECISION)
    dlog += tl.dot(tl.trans(early), da_t * a_t, input_precision=PRECISION)
    dlog += tl.dot(tl.trans(until), dk_t * k_t + db_t * b_t, input_precision=PRECISION)
    of_k = tl.load(dqk + here * BLOCK_T + i)[:, None]
    of_b = tl.load(dqb + here * BLOCK_T + i)[:, None]
    dq_t += of_k * k_t + of_b * b_t
    dk_t += of_k * q_t
    db_t += of_b * q_t
    square = here[:, None] * BLOCK_T + i[None, :]
    for level in range(LEVELS):
        border, rest = halfway(1 << level, BLOCK_T), corner(1 << level, BLOCK_T)
        left = _decay(between(border, BLOCK_T), g_t, PRECISION)
        k_left, b_left = (k_t * left).to(tile), (b_t * left).to(tile)
        into = _both(dqk, dqb, square, rest, k_left, b_left, tile, PRECISION) * left
        dq_t += into
        ones = tl.trans(between(border, BLOCK_T))
        dlog += tl.dot(ones, into * q_t, input_precision=PRECISION)
        into = _both(dak, dab, square, rest, k_left, b_left, tile, PRECISION)
        into *= _decay(before(border, BLOCK_T), g_t, PRECISION)
        da_t += into
        ones = tl.trans(before(border, BLOCK_T))
        dlog += tl.dot(ones, into * a_t, input_precision=PRECISION)
    tl.store(dq + at, dq_t, mask=there)
    tl.store(da + at, da_t, mask=there)
    square = here[None, :] * BLOCK_T + i[:, None]
    for level in range(LEVELS):  # not in one loop, for registers
        border, rest = halfway(1 << level, BLOCK_T), tl.trans(corner(1 << level, BLOCK_T))
        left = _decay(between(border, BLOCK_T), g_t, PRECISION)
        q_left = (q_t * left).to(tile)
        a_left = (a_t * _decay(before(border, BLOCK_T), g_t, PRECISION)).to(tile)
        into_k = _both(dqk, dak, square, rest, q_left, a_left, tile, PRECISION) * left
        into_b = _both(dqb, dab, square, rest, q_left, a_left, tile, PRECISION) * left
        dk_t += into_k
        db_t += into_b
        ones = tl.trans(between(border, BLOCK_T))
        dlog += tl.dot(ones, into_k * k_t + into_b * b_t, input_precision=PRECISION)
    tl.store(dk + at, dk_t, mask=there)
    tl.store(db + at, db_t, mask=there)
    tl.store(dg + at, dlog, mask=there)


@triton.jit
def _both(x, y, square, inside, x_of, y_of, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """Two matrices, of each what is inside, times a factor each."""
    first = tl.load(x + square, mask=inside, other=0.0).to(TILE)
    second = tl.load(y + square, mask=inside, other=0.0).to(TILE)
    made = tl.dot(first, x_of, input_precision=PRECISION)
    return made + tl.dot(second, y_of, input_precision=PRECISION)
