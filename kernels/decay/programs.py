"""The Triton programs of decayed linear attention; `fused.py` says how they work together."""

import triton
import triton.language as tl

from seqzoo.kernels.decay.tiles import (
    climb,
    gates,
    is_right,
    product,
    rows,
    running,
    square,
    sum_before,
    sum_behind,
    sums,
)


@triton.jit
def carry(
    x,
    z,
    g,
    starts,
    states,
    end,
    kept,
    LENGTH,
    T,
    H,
    HK,
    K,
    V,
    ROWS,
    BACK: tl.constexpr,
    ENDS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A stretch of chunks; with ENDS from zero, for its end and what it keeps of its start."""
    row = tl.program_id(0) % ROWS
    part = tl.program_id(0) // ROWS
    b, h = row // H, row % H
    i = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.cast(tl.program_id(2), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    size = tl.cast(ROWS, tl.int64) * K * V
    at = (tl.cast(row, tl.int64) * K + i)[:, None] * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    if ENDS:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    else:
        state = tl.load(starts + part * size + at, mask=inside, other=0.0)
    elapsed = tl.zeros((BLOCK_K,), tl.float32)
    r = tl.arange(0, BLOCK_T)
    c, D = (i, K) if VECTOR else (tl.arange(0, 1), 1)
    chunks = tl.cdiv(T, BLOCK_T)
    for step in range(part * LENGTH, tl.minimum((part + 1) * LENGTH, chunks)):
        n = tl.cast(chunks - 1 - step if BACK else step, tl.int64)
        if not ENDS:
            tl.store(states + n * size + at, state, mask=inside)
        first = n * BLOCK_T
        t = first + (r if BACK else BLOCK_T - 1 - r)
        x_t = rows(x, b, t, h // (H // HK), i, T, T, HK, K)
        z_t = rows(z, b, t, h, j, T, T, H, V)
        g_t = gates(g, b, t, h, c, first, T, H, D, not BACK, BLOCK_T)
        total = tl.sum(g_t, 0)
        if not BACK:  # the first token's
            at_first = ((tl.cast(b, tl.int64) * T + first) * H + h) * D + c
            total += tl.load(g + at_first, mask=c < D, other=0.0).to(tl.float32)
        decayed = x_t * tl.exp(running(g_t, BLOCK_T))
        state = tl.exp(total)[:, None] * state + product(tl.trans(decayed), z_t, PRECISION)
        elapsed += total
    if ENDS:
        tl.store(end + part * size + at, state, mask=inside)
        at_kept = (tl.cast(part, tl.int64) * ROWS + row) * K + i
        tl.store(kept + at_kept, tl.exp(elapsed), mask=i < tl.where(tl.program_id(2) == 0, K, 0))
    elif (part + 1) * LENGTH >= chunks:
        tl.store(end + at, state, mask=inside)


@triton.jit
def scores(
    x,
    y,
    g,
    scores,
    weights,
    dg,
    T,
    H,
    HK,
    K,
    ROWS,
    BACK: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """x_i . y_j, decayed from j to i, for j <= i; zero elsewhere.

    With BACK they are gradients of the scores `weights`, and a scalar decay gets its part.
    """
    row = tl.program_id(0) % ROWS
    n = tl.cast(tl.program_id(0) // ROWS, tl.int64)
    b, h = row // H, row % H
    r = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + r
    apart = tl.where(r[:, None] >= r[None, :], r[:, None] ^ r[None, :], -1)
    made = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    diagonal = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, K, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x_t = rows(x, b, t, h // (H // HK), i, T, T, HK, K)
        y_t = rows(y, b, t, h // (H // HK), i, T, T, HK, K)
        if DECAY == "vector":
            diagonal += tl.sum(x_t * y_t, 1)
            since = rows(g, b, t, h, i, T, T, H, K)
            until = tl.zeros_like(since)
            for level in range(LEVELS):
                factor = tl.exp(tl.where(is_right(level, BLOCK_T), since, until))
                through = product(x_t * factor, tl.trans(y_t * factor), PRECISION)
                made += tl.where(apart >> level == 1, through, 0.0)
                since, until = climb(since, until, level, BLOCK_T)
        else:
            made += product(x_t, tl.trans(y_t), PRECISION)
    at = (n * ROWS + row) * BLOCK_T * BLOCK_T + square(False, BLOCK_T)
    if DECAY == "vector":
        made = tl.where(apart == 0, diagonal[:, None], made)
    else:
        made = tl.where(apart >= 0, made, 0.0)
    if DECAY == "scalar":
        g_t = rows(g, b, t, h, tl.arange(0, 1), T, T, H, 1)
        if BACK:
            through = made * tl.load(weights + at)
            over = sums(r[:, None] <= r[None, :], through, PRECISION)
            at_g = (tl.cast(b, tl.int64) * T + t) * H + h
            tl.store(dg + at_g, tl.sum(tl.where(apart > 0, over, 0.0), 1), mask=t < T)
        made *= tl.exp(tl.cumsum(tl.where(apart > 0, g_t, 0.0), 0))
    tl.store(scores + at, made)


@triton.jit
def outputs(
    x,
    z,
    g,
    scores,
    states,
    out,
    T,
    H,
    HK,
    K,
    V,
    ROWS,
    BACK: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A z + (x decayed) S, or with BACK A^T z + (x decayed) S, whose rows come last to first."""
    row = tl.program_id(0) % ROWS
    n = tl.cast(tl.program_id(0) // ROWS, tl.int64)
    b, h = row // H, row % H
    j = tl.cast(tl.program_id(1), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    r = tl.arange(0, BLOCK_T)
    mine = BLOCK_T - 1 - r if BACK else r
    t = n * BLOCK_T + mine
    at = (n * ROWS + row) * BLOCK_T * BLOCK_T
    own = tl.cast(mine, tl.int64)[:, None]
    read = tl.cast(r, tl.int64)[None, :]
    at += own + read * BLOCK_T if BACK else own * BLOCK_T + read
    z_t = rows(z, b, n * BLOCK_T + r, h, j, T, T, H, V)
    made = product(tl.load(scores + at), z_t, PRECISION)
    c, D = (tl.arange(0, BLOCK_K), K) if VECTOR else (tl.arange(0, 1), 1)
    for first in range(0, K, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x_t = rows(x, b, t, h // (H // HK), i, T, T, HK, K)
        g_t = gates(g, b, t, h, c + (first if VECTOR else 0), n * BLOCK_T, T, H, D, BACK, BLOCK_T)
        at_state = ((n * ROWS + row) * K + i)[:, None] * V + j[None, :]
        state = tl.load(states + at_state, mask=(i < K)[:, None] & (j < V)[None, :], other=0.0)
        made += product(x_t * tl.exp(running(g_t, BLOCK_T)), state, PRECISION)
    at = ((tl.cast(b, tl.int64) * T + t) * H + h)[:, None] * V + j[None, :]
    tl.store(out + at, made, mask=(t < T)[:, None] & (j < V)[None, :])


@triton.jit
def inner(
    y,
    w,
    g,
    dscores,
    dy,
    dg,
    T,
    H,
    HK,
    K,
    ROWS,
    BACK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """What scores under decays by channel give to dy of q, or with BACK of k, and to dg."""
    B = ROWS // H
    hk = tl.cast(tl.program_id(0) % HK, tl.int64)
    b = tl.cast(tl.program_id(0) // HK % B, tl.int64)
    n = tl.cast(tl.program_id(0) // HK // B, tl.int64)
    i = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + r
    y_t = rows(y, b, t, hk, i, T, T, HK, K)
    w_t = rows(w, b, t, hk, i, T, T, HK, K)
    at = square(BACK, BLOCK_T)
    there = (t < T)[:, None] & (i < K)[None, :]
    dy_t = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for head in range(H // HK):
        h = hk * (H // HK) + head
        mine = dscores + (n * ROWS + b * H + h) * BLOCK_T * BLOCK_T
        dy_t += tl.load(mine + tl.cast(r, tl.int64) * (BLOCK_T + 1))[:, None] * w_t
        since = rows(g, b, t, h, i, T, T, H, K)
        until, dg_t = tl.zeros_like(since), tl.zeros_like(since)
        for level in range(LEVELS):
            factor = tl.exp(tl.where(is_right(level, BLOCK_T), since, until))
            # Of the left half of a block there are no scores with the right.
            apart = (r[:, None] ^ r[None, :]) >> level
            d = tl.where(apart == 1, tl.load(mine + at), 0.0)
            into = product(d, w_t * factor, PRECISION) * factor
            dy_t += into
            ahead = r[:, None] - r[None, :] - 1 if BACK else r[None, :] - r[:, None]
            # Below zero where not ahead. One comparison: AMD's mask registers are few.
            dg_t += sums((apart | (ahead >> 31)) == 0, into * y_t, PRECISION)
            since, until = climb(since, until, level, BLOCK_T)
        at_g = ((tl.cast(b, tl.int64) * T + t) * H + h)[:, None] * K + i[None, :]
        if BACK:
            dg_t += tl.load(dg + at_g, mask=there, other=0.0)
        tl.store(dg + at_g, dg_t, mask=there)
    at_y = ((tl.cast(b, tl.int64) * T + t) * HK + hk)[:, None] * K + i[None, :]
    tl.store(dy + at_y, dy_t, mask=there)


@triton.jit
def borders(
    x,
    y,
    w,
    g,
    states,
    others,
    dscores,
    inner,
    dy,
    dg,
    T,
    H,
    HK,
    K,
    V,
    ROWS,
    BACK: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradient of y, which is q, or with BACK k, summed over value heads; and its part in dg.

    x is do, or v; w is k, or q; states are S, or dS, and `others` the other of them.
    """
    B = ROWS // H
    hk = tl.cast(tl.program_id(0) % HK, tl.int64)
    b = tl.cast(tl.program_id(0) // HK % B, tl.int64)
    n = tl.cast(tl.program_id(0) // HK // B, tl.int64)
    i = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_T)
    t = n * BLOCK_T + r
    c, D = (i, K) if VECTOR else (tl.arange(0, 1), 1)
    at_y = ((tl.cast(b, tl.int64) * T + t) * HK + hk)[:, None] * K + i[None, :]
    there = (t < T)[:, None] & (i < K)[None, :]
    y_t = tl.load(y + at_y, mask=there, other=0.0).to(tl.float32)
    if VECTOR:
        made = tl.load(inner + at_y, mask=there, other=0.0)
    else:
        made = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for head in range(H // HK):
        h = hk * (H // HK) + head
        row = n * ROWS + b * H + h
        if not VECTOR:
            at = row * BLOCK_T * BLOCK_T + square(BACK, BLOCK_T)
            w_t = rows(w, b, t, hk, i, T, T, HK, K)
            made += product(tl.load(dscores + at), w_t, PRECISION)
        border = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        through = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, V, BLOCK_V):
            j = first + tl.arange(0, BLOCK_V)
            at_state = (row * K + i)[:, None] * V + j[None, :]
            inside = (i < K)[:, None] & (j < V)[None, :]
            state = tl.load(states + at_state, mask=inside, other=0.0)
            x_t = rows(x, b, t, h, j, T, T, H, V)
            border += product(x_t, tl.trans(state), PRECISION, EXACT=True)
            if not BACK:
                other = tl.load(others + at_state, mask=inside, other=0.0)
                through += tl.sum(state * other, 1)
        g_t = rows(g, b, t, h, c, T, T, H, D)
        border *= tl.exp(
            sum_behind(g_t, BLOCK_T, False) if BACK else sum_before(g_t, BLOCK_T, True)
        )
        made += border
        dg_t = border * y_t
        through = through[None, :]
        if not VECTOR:
            dg_t, through = tl.sum(dg_t, 1)[:, None], tl.sum(through, 1)[:, None]
        dg_t = sum_before(dg_t, BLOCK_T, False) if BACK else sum_behind(dg_t, BLOCK_T, True)
        dg_t += through * tl.exp(tl.sum(g_t, 0))[None, :]
        part = b if VECTOR else tl.cast(tl.program_id(1), tl.int64) * B + b
        at_g = ((tl.cast(part, tl.int64) * T + t) * H + h)[:, None] * D + c[None, :]
        present = (t < T)[:, None] & (c < D)[None, :]
        if VECTOR or BACK:
            dg_t += tl.load(dg + at_g, mask=present, other=0.0)
        tl.store(dg + at_g, dg_t, mask=present)
    tl.store(dy + at_y, made, mask=there)
