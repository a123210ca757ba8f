"""The delta rule in Triton, what is worked out for all chunks at once.

A program owns a chunk of one head. Every exponent is a product of log decays with a matrix of zeros
and ones, so it is a sum and never a difference, none is above zero, and its gradient is the product
with the transposed matrix. The decay between the halves of a block meets at the border between
them, as in `seqzoo.kernels.decay.chunked`; blocks of one size share a matrix product, of which the
corners are kept.
"""

import triton
import triton.language as tl

CHUNK = 32
LEVELS = tl.constexpr(5)  # sizes of blocks within a chunk: 2, 4, ..., 32
EMPTY = tl.constexpr(-1e30)  # stands for a log decay of -inf: zero times it is zero


@triton.jit
def between(border, BLOCK_T: tl.constexpr):
    """(BLOCK_T, BLOCK_T) of ones where a token's decay lies between the row's token and a border.

    The border lies behind its token, the row's token before its decay is counted with what follows.
    """
    i = tl.arange(0, BLOCK_T)
    low, high = tl.minimum(i, border)[:, None], tl.maximum(i, border)[:, None]
    return tl.where((i[None, :] > low) & (i[None, :] <= high), 1.0, 0.0)


@triton.jit
def corner(size, BLOCK_T: tl.constexpr):
    """Where right halves of blocks of 2 * `size` tokens meet their left halves."""
    i = tl.arange(0, BLOCK_T)
    apart = i[:, None] ^ i[None, :]
    return (apart >= size) & (apart < 2 * size) & (i[:, None] > i[None, :])


@triton.jit
def halfway(size, BLOCK_T: tl.constexpr):
    """The last token of the left half of each token's block of 2 * `size`."""
    return (tl.arange(0, BLOCK_T) | (2 * size - 1)) - size


@triton.jit
def log_decays(g, at, mask):
    """Read as numbers that may be multiplied by zero."""
    x = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(x < EMPTY, EMPTY, x)


@triton.jit
def pairs(g, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr):
    """Decay from token j to token i of a scalar decay, (BLOCK_T, BLOCK_T); zero where j > i."""
    i = tl.arange(0, BLOCK_T)
    until = tl.where(i[None, :] <= i[:, None], g[None, :], 0.0)
    after = tl.where(i[:, None] > i[None, :], 1.0, 0.0)
    exponent = tl.dot(until, after, input_precision=PRECISION)
    return tl.where(i[:, None] >= i[None, :], tl.exp(exponent), 0.0)


@triton.jit
def _part(q, k, token, first, T, K, t, BLOCK_K: tl.constexpr):
    """Queries and keys of a block of channels, and where they lie."""
    c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_K)
    at, there = token[:, None] * K + c[None, :], (t < T)[:, None] & (c < K)[None, :]
    q_t = tl.load(q + at, mask=there, other=0.0).to(tl.float32)
    k_t = tl.load(k + at, mask=there, other=0.0).to(tl.float32)
    return q_t, k_t, at, there


@triton.jit
def block(row, first, w, K, V, BLOCK_K: tl.constexpr):
    """Key channels from `first` on, and where the state of a head lies for them and values w."""
    c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_K)
    return c, (row * K + c)[:, None] * V + w[None, :], (c < K)[:, None] & (w < V)[None, :]


@triton.jit
def prepare(
    q,
    k,
    beta,
    g,
    weights,
    products,
    inverse,
    queries,
    keys,
    writes,
    total,
    T,
    H,
    K,
    N,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries and keys decayed since the chunk began, keys until its end; A, M and T."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    tile = queries.dtype.element_ty
    begun, ended = between(i * 0 - 1, BLOCK_T), between(i * 0 + BLOCK_T - 1, BLOCK_T)
    square = (mine * BLOCK_T + i)[:, None] * BLOCK_T + i[None, :]
    A = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    M = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    diagonal = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        q_t, k_t, at, there = _part(q, k, token, first, T, K, t, BLOCK_K)
        if VECTOR:
            g_t = log_decays(g, at, there)
            since = tl.exp(tl.dot(begun, g_t, input_precision=PRECISION))
            until = tl.exp(tl.dot(ended, g_t, input_precision=PRECISION))
            over = tl.exp(tl.sum(g_t, 0))
            diagonal += tl.sum(q_t * k_t, 1)
        else:
            g_t = log_decays(g, token, t < T)
            since = tl.exp(tl.sum(begun * g_t[None, :], 1))[:, None]
            until = tl.exp(tl.sum(ended * g_t[None, :], 1))[:, None]
            over = tl.exp(tl.sum(g_t, 0)) + tl.zeros((BLOCK_K,), tl.float32)
            turned = tl.trans(k_t.to(tile))
            A += tl.dot(q_t.to(tile), turned, input_precision=PRECISION)
            M += tl.dot(k_t.to(tile), turned, input_precision=PRECISION)
        c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_K)
        to = (mine * BLOCK_T + i)[:, None] * WIDTH + c[None, :]
        tl.store(queries + to, (q_t * since).to(tile))
        tl.store(keys + to, (k_t * since).to(tile))
        tl.store(writes + to, (k_t * until).to(tile))
        tl.store(total + mine * WIDTH + c, over)
    if VECTOR:
        tl.store(weights + square, tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0))
        tl.store(products + square, M)
        tl.debug_barrier()  # below the diagonal comes what follows
        for level in range(LEVELS):
            ones, here = between(halfway(1 << level, BLOCK_T), BLOCK_T), corner(1 << level, BLOCK_T)
            A = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
            M = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
            for first in range(0, WIDTH, BLOCK_K):
                q_t, k_t, at, there = _part(q, k, token, first, T, K, t, BLOCK_K)
                left = tl.dot(ones, log_decays(g, at, there), input_precision=PRECISION)
                left = tl.exp(left)
                q_left, k_left = (q_t * left).to(tile), (k_t * left).to(tile)
                A += tl.dot(q_left, tl.trans(k_left), input_precision=PRECISION)
                M += tl.dot(k_left, tl.trans(k_left), input_precision=PRECISION)
            tl.store(weights + square, A, mask=here)
            tl.store(products + square, M, mask=here)
    else:
        decay = pairs(log_decays(g, token, t < T), BLOCK_T, PRECISION)
        tl.store(weights + square, A * decay)
        tl.store(products + square, tl.where(i[:, None] > i[None, :], M * decay, 0.0))
    tl.debug_barrier()
    strength = tl.load(beta + token, mask=t < T, other=0.0).to(tl.float32)[:, None]
    solved = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for level in range(LEVELS):  # from the inverses of blocks on the diagonal those of larger ones
        below = tl.load(products + square, mask=corner(1 << level, BLOCK_T), other=0.0)
        below = tl.dot(solved, strength * below, input_precision=PRECISION)
        solved -= tl.dot(below, solved, input_precision=PRECISION)
    tl.store(inverse + square, solved)


@triton.jit
def corrections(
    v,
    beta,
    do,
    products,
    inverse,
    keys,
    states,
    errors,
    written,
    dweights,
    dproducts,
    dbeta,
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
    """Again u; gradients of betas, and of what queries and keys have to do with keys."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    rows = tl.cast(tl.num_programs(0), tl.int64) // N
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    here = mine * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    tile = keys.dtype.element_ty
    strength = tl.load(beta + token, mask=t < T, other=0.0).to(tl.float32)
    square = here[:, None] * BLOCK_T + i[None, :]
    dA = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    dM = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    dstrength = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, V, BLOCK_V):
        w = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_V)
        at, there = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        error = tl.load(v + at, mask=there, other=0.0).to(tl.float32)
        for part in range(0, WIDTH, BLOCK_K):
            c, state, inside = block(n * rows + row, part, w, K, V, BLOCK_K)
            S = tl.load(states + state, mask=inside, other=0.0).to(tile)
            k_t = tl.load(keys + here[:, None] * WIDTH + c[None, :])
            error -= tl.dot(k_t, S, input_precision=PRECISION)
        wide, to = (w < V)[None, :], here[:, None] * V + w[None, :]
        derror = tl.load(errors + to, mask=wide, other=0.0)
        dstrength += tl.sum(derror.to(tl.float32) * error, 1)
        error *= strength[:, None]
        u = tl.dot(tl.load(inverse + square), error, input_precision=PRECISION).to(tile)
        tl.store(written + to, u, mask=wide)
        dM -= tl.dot(derror, tl.trans(u), input_precision=PRECISION)
    tl.debug_barrier()  # u is read again: a second loop, for registers
    for first in range(0, V, BLOCK_V):
        w = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_V)
        at, there = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        do_t = tl.load(do + at, mask=there, other=0.0).to(tile)
        to = here[:, None] * V + w[None, :]
        u = tl.load(written + to, mask=(w < V)[None, :], other=0.0)
        dA += tl.dot(do_t, tl.trans(u), input_precision=PRECISION)
    dA = tl.where(i[:, None] >= i[None, :], dA, 0.0)
    dM = tl.where(i[:, None] > i[None, :], dM, 0.0)
    dstrength += tl.sum(dM * tl.load(products + square), 1)
    tl.store(dbeta + token, dstrength, mask=t < T)
    tl.store(dweights + square, dA)
    dM *= strength[:, None]
    tl.store(dproducts + square, dM + tl.trans(dM))  # of a product of keys, for both keys


@triton.jit
def _into_scalar(
    q_t,
    k_t,
    g_t,
    into,
    given,
    square,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients under a scalar decay: of queries, keys, log decays, and of decays inside alone."""
    dqueries, dkeys, dwrites, dover = into
    weights, products, dweights, dproducts = given
    i = tl.arange(0, BLOCK_T)
    begun, ended = between(i * 0 - 1, BLOCK_T), between(i * 0 + BLOCK_T - 1, BLOCK_T)
    since = tl.exp(tl.sum(begun * g_t[None, :], 1))
    until = tl.exp(tl.sum(ended * g_t[None, :], 1))
    dsince = tl.sum(dqueries * q_t + dkeys * k_t, 1) * since
    duntil = tl.sum(dwrites * k_t, 1) * until
    dlog = tl.sum(begun * dsince[:, None] + ended * duntil[:, None], 0)
    dlog += tl.sum(dover, 0) * tl.exp(tl.sum(g_t, 0))
    dA, dM = tl.load(dweights + square), tl.load(dproducts + square)
    inside = dA * tl.load(weights + square).to(tl.float32) + dM * tl.load(products + square)
    inside = tl.where(i[:, None] > i[None, :], inside, 0.0)
    after = tl.where(i[:, None] < i[None, :], 1.0, 0.0)
    inside = tl.dot(inside, after, input_precision=PRECISION)
    inside = tl.sum(tl.where(i[None, :] <= i[:, None], inside, 0.0), 0)
    decay = pairs(g_t, BLOCK_T, PRECISION)
    dA *= decay
    dM *= decay + tl.trans(decay)
    turned = tl.trans(dA).to(TILE)
    q_half, k_half = q_t.to(TILE), k_t.to(TILE)
    dq_t = dqueries * since[:, None]
    dq_t += tl.dot(dA.to(TILE), k_half, input_precision=PRECISION)
    dk_t = dkeys * since[:, None] + dwrites * until[:, None]
    dk_t += tl.dot(turned, q_half, input_precision=PRECISION)
    dk_t += tl.dot(dM.to(TILE), k_half, input_precision=PRECISION)
    return dq_t, dk_t, dlog, inside


@triton.jit
def gradients(
    q,
    k,
    beta,
    g,
    weights,
    products,
    states,
    dstates,
    do,
    written,
    errors,
    dweights,
    dproducts,
    dq,
    dk,
    dg,
    T,
    H,
    K,
    V,
    N,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries, keys and log decays; a scalar decay's in a part for each BLOCK_K."""
    mine = tl.cast(tl.program_id(0), tl.int64)
    row = mine // N
    n = mine % N
    rows = tl.cast(tl.num_programs(0), tl.int64) // N
    i = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + i
    token = (row // H * T + t) * H + row % H
    here = mine * BLOCK_T + i
    c = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = written.dtype.element_ty
    strength = tl.load(beta + token, mask=t < T, other=0.0).to(tl.float32)[:, None]
    dqueries = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    dkeys = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    dwrites = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    dover = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, V, BLOCK_V):
        w = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_V)
        inside = (c < K)[:, None] & (w < V)[None, :]
        state = ((n * rows + row) * K + c)[:, None] * V + w[None, :]
        S = tl.load(states + state, mask=inside, other=0.0)
        dS = tl.load(dstates + state, mask=inside, other=0.0)
        at, there = token[:, None] * V + w[None, :], (t < T)[:, None] & (w < V)[None, :]
        do_t = tl.load(do + at, mask=there, other=0.0).to(tile)
        scratch, wide = here[:, None] * V + w[None, :], (w < V)[None, :]
        u = tl.load(written + scratch, mask=wide, other=0.0)
        dv = strength * tl.load(errors + scratch, mask=wide, other=0.0).to(tl.float32)
        turned = tl.trans(S.to(tile))
        dqueries += tl.dot(do_t, turned, input_precision=PRECISION)
        dkeys -= tl.dot(dv.to(tile), turned, input_precision=PRECISION)
        dwrites += tl.dot(u, tl.trans(dS.to(tile)), input_precision=PRECISION)
        dover += tl.sum(S * dS, 1)
    at, there = token[:, None] * K + c[None, :], (t < T)[:, None] & (c < K)[None, :]
    q_t = tl.load(q + at, mask=there, other=0.0).to(tl.float32)
    k_t = tl.load(k + at, mask=there, other=0.0).to(tl.float32)
    square = here[:, None] * BLOCK_T + i[None, :]
    turned_square = here[None, :] * BLOCK_T + i[:, None]
    if VECTOR:
        g_t = log_decays(g, at, there)
        dlog = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        dlog += (dover * tl.exp(tl.sum(g_t, 0)))[None, :]
        diagonal = tl.load(dweights + here * BLOCK_T + i)[:, None]
        dq_t, dk_t = diagonal * k_t, diagonal * q_t
        for side in range(2):  # what came from the chunk's begin, and what goes to its end
            ones = between(i * 0 + side * BLOCK_T - 1, BLOCK_T)
            left = tl.exp(tl.dot(ones, g_t, input_precision=PRECISION))
            into_q = tl.where(side == 0, dqueries, 0.0) * left
            into_k = tl.where(side == 0, dkeys, dwrites) * left
            dq_t += into_q
            dk_t += into_k
            into = into_q * q_t + into_k * k_t
            dlog += tl.dot(tl.trans(ones), into, input_precision=PRECISION)
        for level in range(LEVELS):
            ones = between(halfway(1 << level, BLOCK_T), BLOCK_T)
            left = tl.exp(tl.dot(ones, g_t, input_precision=PRECISION))
            dA = tl.load(dweights + square, mask=corner(1 << level, BLOCK_T), other=0.0)
            into = tl.dot(dA.to(tile), (k_t * left).to(tile), input_precision=PRECISION) * left
            dq_t += into
            dlog += tl.dot(tl.trans(ones), into * q_t, input_precision=PRECISION)
        for level in range(LEVELS):  # not in one loop, for registers
            ones = between(halfway(1 << level, BLOCK_T), BLOCK_T)
            left = tl.exp(tl.dot(ones, g_t, input_precision=PRECISION))
            below, above = corner(1 << level, BLOCK_T), tl.trans(corner(1 << level, BLOCK_T))
            dA = tl.load(dweights + turned_square, mask=above, other=0.0)
            into = tl.dot(dA.to(tile), (q_t * left).to(tile), input_precision=PRECISION)
            dM = tl.load(dproducts + square, mask=below | above, other=0.0)
            into += tl.dot(dM.to(tile), (k_t * left).to(tile), input_precision=PRECISION)
            into *= left
            dk_t += into
            dlog += tl.dot(tl.trans(ones), into * k_t, input_precision=PRECISION)
        tl.store(dg + at, dlog, mask=there)
    else:
        g_t = log_decays(g, token, t < T)
        into = (dqueries, dkeys, dwrites, dover)
        given = (weights, products, dweights, dproducts)
        dq_t, dk_t, dlog, inside_chunk = _into_scalar(
            q_t, k_t, g_t, into, given, square, tile, BLOCK_T, PRECISION
        )
        dlog += tl.where(tl.program_id(1) == 0, inside_chunk, 0.0)
        part = tl.cast(tl.program_id(1), tl.int64) * (rows // H) * T * H
        tl.store(dg + part + token, dlog, mask=t < T)
    tl.store(dq + at, dq_t, mask=there)
    tl.store(dk + at, dk_t, mask=there)
