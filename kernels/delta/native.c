/* The delta rule and its gradients, a chunk of one head at a time.
 *
 * The mathematics is that of chunked.py. A task is one head of one row of the batch: its state stays
 * in the cache from the first chunk to the last. Every chunk has CHUNK tokens, the last one with
 * zeros behind its end, and rows are filled up with zeros to whole vectors. A scalar decay is one
 * that all key channels share.
 *
 * Decays within a chunk: from the left half to the right one they meet at the border between the
 * halves, and there is one matrix product; inside a half they are products over at most HALF - 1
 * tokens, pair by pair. Every exponent is a sum of log decays, none is above zero. Of the states
 * only those before the chunks are kept; the backward pass computes the rest again. */

#define CHUNK 32 /* as in the decay kernel's chunks */
#define HALF (CHUNK / 2)

/* Where things of the chunk at hand are; rows of K or V numbers, filled up. The decays of a channel
 * stand at i * W + s * channel: rows of W = K and s = 1, or one vector and s = 0 where all share. */
typedef struct {
    i64 K, V, W, s;
    REAL *q, *k, *g, *beta;
    REAL *w, *since, *until, *right, *left;  /* decays; the last two have HALF rows */
    REAL *qs, *ks, *ku, *qr, *kr, *kl, *klT; /* q and k times them; the last four have HALF rows */
    REAL *A, *M;                             /* (CHUNK, CHUNK): q and k with decayed k */
    REAL *z, *u, *o;                         /* errors, writes, outputs */
    REAL *S, *ST, *uT;                       /* (K, V) and turned */
    REAL *dS, *dST, *r, *dz, *dA, *dM, *dqs, *dks, *dku, *dqr, *dkr, *dkl, *dq, *dk, *dg;
} room;

/* The caller knows the sum of these, too. */
ONCE room furnish(REAL *at, i64 K, i64 V, int shared)
{
    room x = {.K = K, .V = V, .W = shared ? LANES : K, .s = !shared};
    REAL **wide[] = {&x.q,  &x.k,   &x.g,   &x.w,   &x.since, &x.until, &x.qs, &x.ks,
                     &x.ku, &x.dqs, &x.dks, &x.dku, &x.dq,    &x.dk,    &x.dg};
    REAL **half[] = {&x.right, &x.left, &x.qr, &x.kr, &x.kl, &x.klT, &x.dqr, &x.dkr, &x.dkl};
    REAL **values[] = {&x.z, &x.u, &x.o, &x.uT, &x.r, &x.dz};
    REAL **states[] = {&x.S, &x.ST, &x.dS, &x.dST}, **square[] = {&x.A, &x.M, &x.dA, &x.dM};
    for (int i = 0; i < 15; i++) *wide[i] = at, at += CHUNK * K;
    for (int i = 0; i < 9; i++) *half[i] = at, at += HALF * K;
    for (int i = 0; i < 6; i++) *values[i] = at, at += CHUNK * V;
    for (int i = 0; i < 4; i++) *states[i] = at, at += K * V;
    for (int i = 0; i < 4; i++) *square[i] = at, at += CHUNK * CHUNK;
    x.beta = at;
    return x;
}

/* Rows of n numbers that will be wanted, into the second-level cache: those of one head are too far
 * apart for the machine to guess. Any address will do. */
ONCE void fetch(i64 n, const REAL *from, i64 apart)
{
    for (i64 i = 0; i < CHUNK; i++)
        for (i64 j = 0; j < n; j += LANES) __builtin_prefetch(from + i * apart + j, 0, 2);
}

ONCE void clear(i64 n, REAL *to)
{
    for (i64 i = 0; i < n; i += LANES) store((v){0}, to + i);
}

/* c rows of n numbers, `apart` in memory; zeros behind both ends. */
ONCE void fill(i64 c, i64 n, i64 wide, const REAL *from, i64 apart, REAL *to, i64 next)
{
    fetch(n, from + next * apart, apart);
    copy(c, n, wide, from, apart, to, wide);
    clear((CHUNK - c) * wide, to + c * wide);
}

/* Numbers below the smallest normal one take the machine ten times as long. Let them be zero, where
 * no single token decays so far that they are all that is left of anything. */
#ifdef __SSE__
#define MODE() __builtin_ia32_stmxcsr()
#define SET_MODE(mode) __builtin_ia32_ldmxcsr(mode)
#define FLUSH 0x8040u
#else
#define MODE() 0u
#define SET_MODE(mode) ((void)(mode))
#define FLUSH 0u
#endif

ONCE void flush(room x)
{
    const REAL weak = SMALL ? -60 : -670, nothing = SMALL ? -104 : -746;
    int deep = 0;
    for (i64 i = 0; i < CHUNK * x.W; i += LANES) {
        v g = load(x.g + i);
        vi between = (g < weak) & (g > nothing);
        deep |= across((v)(between & (vi)((v){0} + (REAL)1))) > 0;
    }
    SET_MODE(deep ? MODE() & ~FLUSH : MODE() | FLUSH);
}

ONCE void times(room x, i64 rows, const REAL *y, const REAL *decay, REAL *to)
{
    for (i64 i = 0; i < rows; i++)
        for (i64 d = 0; d < x.K; d += LANES)
            store(load(y + i * x.K + d) * load(decay + i * x.W + x.s * d), to + i * x.K + d);
}

ONCE void decays(room x)
{
    i64 W = x.W;
    for (i64 d = 0; d < W; d += LANES) {
        v all = {0}, half = {0};
        for (i64 i = 0; i < CHUNK; i++) {
            v g = load(x.g + i * W + d);
            all += g;
            if (i == HALF) half = (v){0};
            half += g;
            store(g, x.w + i * W + d);
            store(all, x.since + i * W + d);
            if (i >= HALF) store(half, x.right + (i - HALF) * W + d);
        }
        all = half = (v){0};
        for (i64 i = CHUNK - 1; i >= 0; i--) {
            v g = load(x.g + i * W + d);
            store(all, x.until + i * W + d);
            all += g;
            if (i < HALF) store(half, x.left + i * W + d), half += g;
        }
    }
    REAL *all[] = {x.w, x.since, x.until, x.right, x.left};
    for (int n = 0; n < 5; n++)
        exponentials(all[n], all[n], (n < 3 ? CHUNK : HALF) * W, 0);
    times(x, CHUNK, x.q, x.since, x.qs);
    times(x, CHUNK, x.k, x.since, x.ks);
    times(x, CHUNK, x.k, x.until, x.ku);
    times(x, HALF, x.q + HALF * x.K, x.right, x.qr);
    times(x, HALF, x.k + HALF * x.K, x.right, x.kr);
    times(x, HALF, x.k, x.left, x.kl);
}

/* A_ij = q_i . D_ij k_j for j <= i, and M_ij = k_i . D_ij k_j for j < i; D the decay from j to i. */
ONCE void scores(room x)
{
    i64 K = x.K, corner = HALF * CHUNK;
    transpose(HALF, K, x.kl, K, x.klT, HALF);
    product(HALF, HALF, K, x.qr, K, 1, x.klT, HALF, x.A + corner, CHUNK, 0);
    product(HALF, HALF, K, x.kr, K, 1, x.klT, HALF, x.M + corner, CHUNK, 0);
    for (i64 i = 0; i < CHUNK; i++) {
        i64 first = i / HALF * HALF;
        v a[HALF], m[HALF];
        for (i64 j = 0; j < HALF; j++) a[j] = m[j] = (v){0};
        for (i64 d = 0; d < K; d += LANES) {
            v q = load(x.q + i * K + d), k = load(x.k + i * K + d), D = (v){0} + (REAL)1;
            for (i64 j = i; j >= first; j--) {
                v kD = load(x.k + j * K + d) * D;
                a[j - first] += q * kD;
                m[j - first] += k * kD;
                D *= load(x.w + j * x.W + x.s * d);
            }
        }
        for (i64 j = first; j < CHUNK; j++) {
            x.A[i * CHUNK + j] = j <= i ? across(a[j - first]) : 0;
            x.M[i * CHUNK + j] = j < i ? across(m[j - first]) : 0;
        }
    }
}

/* z_i -= sum_{j < i} M_ij u_j and u_i = beta_i z_i, row after row; strides may be negative. */
ONCE void substitute(i64 V, const REAL *M, i64 m_row, i64 m_col, const REAL *beta, i64 step,
                     REAL *z, REAL *u, i64 row)
{
    for (i64 i = 0; i < CHUNK; i++) {
        i64 first = i / HALF * HALF;
        if (i == HALF)
            product(HALF, V, HALF, M + HALF * m_row, m_row, m_col, u, row, z + HALF * row, row, -1);
        for (i64 d = 0; d < V; d += LANES) {
            v sum = load(z + i * row + d);
            for (i64 j = first; j < i; j++)
                sum -= M[i * m_row + j * m_col] * load(u + j * row + d);
            store(sum, z + i * row + d);
            store(sum * beta[i * step], u + i * row + d);
        }
    }
}

/* Tokens from `from` of one head, and what they write on the state. */
ONCE void begin(room x, const REAL *q, const REAL *k, const REAL *value, const REAL *beta,
                const REAL *g, i64 c, i64 H, i64 K, i64 V, i64 G, i64 next)
{
    fill(c, K, x.K, q, H * K, x.q, next);
    fill(c, K, x.K, k, H * K, x.k, next);
    fill(c, V, x.V, value, H * V, x.z, next);
    fill(c, G, x.W, g, H * G, x.g, next);
    for (i64 i = 0; !x.s && i < c; i++) store((v){0} + x.g[i * LANES], x.g + i * LANES);
    for (i64 i = 0; i < CHUNK; i++) x.beta[i] = i < c ? beta[i * H] : 0;
    flush(x);
    decays(x);
    scores(x);
    product(CHUNK, x.V, x.K, x.ks, x.K, 1, x.S, x.V, x.z, x.V, -1);
    substitute(x.V, x.M, CHUNK, 1, x.beta, 1, x.z, x.u, x.V);
}

/* Each key's row times its decay over the whole chunk. */
ONCE void fade(room x, REAL *S)
{
    for (i64 k = 0; k < x.K; k++, S += x.V) {
        v whole_chunk = (v){0} + x.since[(CHUNK - 1) * x.W + x.s * k];
        for (i64 d = 0; d < x.V; d += LANES) store(load(S + d) * whole_chunk, S + d);
    }
}

/* `states` are (chunks + 1, B, H, K, V), the first of them given. */
#ifndef BACKWARD
void delta_forward(const REAL *q, const REAL *k, const REAL *value, const REAL *beta, const REAL *g,
                   REAL *o, REAL *states, REAL *space, i64 each, i64 B, i64 T, i64 H, i64 K, i64 V,
                   i64 G, i64 wide_K, i64 wide_V, i64 threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 part = 0; part < threads; part++) {
        room x = furnish(space + part * each, wide_K, wide_V, G < K);
        unsigned mode = MODE();
        for (i64 task = part; task < B * H; task += threads) {
            clear(wide_K * wide_V, x.S);
            copy(K, V, V, states + task * K * V, V, x.S, x.V);
            for (i64 from = 0, n = 1; from < T; from += CHUNK, n++) {
                i64 c = smaller(CHUNK, T - from), at = (task / H * T + from) * H + task % H;
                begin(x, q + at * K, k + at * K, value + at * V, beta + at, g + at * G, c, H, K, V, G,
                      CHUNK);
                product(CHUNK, x.V, x.K, x.qs, x.K, 1, x.S, x.V, x.o, x.V, 0);
                product(CHUNK, x.V, CHUNK, x.A, CHUNK, 1, x.u, x.V, x.o, x.V, 1);
                copy(c, V, V, x.o, x.V, o + at * V, H * V);
                fade(x, x.S);
                product(x.K, x.V, CHUNK, x.ku, 1, x.K, x.u, x.V, x.S, x.V, 1);
                copy(K, V, V, x.S, x.V, states + (n * B * H + task) * K * V, V);
            }
        }
        SET_MODE(mode);
    }
}
#endif

/* What came by way of the state and by way of the border; dg starts as what both give to it. */
ONCE void far(room x)
{
    i64 K = x.K, W = x.W, corner = HALF * CHUNK, border = HALF * K;
    product(HALF, K, HALF, x.dA + corner, CHUNK, 1, x.kl, K, x.dqr, K, 0);
    product(HALF, K, HALF, x.dM + corner, CHUNK, 1, x.kl, K, x.dkr, K, 0);
    product(HALF, K, HALF, x.dA + corner, 1, CHUNK, x.qr, K, x.dkl, K, 0);
    product(HALF, K, HALF, x.dM + corner, 1, CHUNK, x.kr, K, x.dkl, K, -1);
    for (i64 d = 0; d < K; d += LANES) {
        v all = {0}, half = {0};
        for (i64 s = 0; s < x.V; s++) all += load(x.ST + s * K + d) * load(x.dST + s * K + d);
        all *= load(x.since + (CHUNK - 1) * W + x.s * d);
        for (i64 i = CHUNK - 1; i >= 0; i--) {
            i64 at = i * K + d, decay = i * W + x.s * d;
            v dqs = load(x.dqs + at), dks = load(x.dks + at), since = load(x.since + decay);
            v dq = dqs * since, dk = load(x.dku + at) * load(x.until + decay) - dks * since;
            all += dqs * load(x.qs + at) - dks * load(x.ks + at);
            v dg = all;
            if (i >= HALF) {
                v dqr = load(x.dqr + at - border), dkr = load(x.dkr + at - border);
                v right = load(x.right + decay - HALF * W);
                half += dqr * load(x.qr + at - border) - dkr * load(x.kr + at - border);
                dq += dqr * right, dk -= dkr * right, dg += half;
            } else
                dk += load(x.dkl + at) * load(x.left + decay);
            store(dq, x.dq + at), store(dk, x.dk + at), store(dg, x.dg + at);
        }
        all = half = (v){0};
        for (i64 i = 0; i < CHUNK; i++) {
            i64 at = i * K + d;
            store(load(x.dg + at) + all + half, x.dg + at);
            all += load(x.dku + at) * load(x.ku + at);
            half = i < HALF - 1 ? half + load(x.dkl + at) * load(x.kl + at) : (v){0};
        }
    }
}

/* What came from pairs of tokens in the same half. */
ONCE void near(room x)
{
    i64 K = x.K;
    for (i64 i = 0; i < CHUNK; i++) {
        i64 first = i / HALF * HALF;
        const REAL *dA = x.dA + i * CHUNK, *dM = x.dM + i * CHUNK;
        for (i64 d = 0; d < K; d += LANES) {
            v q = load(x.q + i * K + d), k = load(x.k + i * K + d), D = load(x.w + i * x.W + x.s * d);
            v dq = dA[i] * k, dk = {0}, e[HALF], sum = {0};
            for (i64 j = i - 1; j >= first; j--) {
                i64 at = j * K + d;
                v kD = load(x.k + at) * D, dkD = dA[j] * q - dM[j] * k;
                dq += dA[j] * kD;
                dk -= dM[j] * kD;
                store(load(x.dk + at) + dkD * D, x.dk + at);
                e[j - first] = dkD * kD;
                D *= load(x.w + j * x.W + x.s * d);
            }
            store(load(x.dq + i * K + d) + dq, x.dq + i * K + d);
            store(load(x.dk + i * K + d) + dk + dA[i] * q, x.dk + i * K + d);
            for (i64 j = first; j < i; j++) {
                sum += e[j - first];
                store(load(x.dg + (j + 1) * K + d) + sum, x.dg + (j + 1) * K + d);
            }
        }
    }
}

/* From the outputs' gradients in o and the next state's in dS, those of everything. */
ONCE void back(room x)
{
    i64 K = x.K, V = x.V, end = CHUNK - 1;
    product(CHUNK, V, CHUNK, x.A, 1, CHUNK, x.o, V, x.r, V, 0);
    product(CHUNK, V, K, x.ku, K, 1, x.dS, V, x.r, V, 1);
    substitute(V, x.M + end * CHUNK + end, -1, -CHUNK, x.beta + end, -1, x.r + end * V,
               x.dz + end * V, -V);
    transpose(CHUNK, V, x.u, V, x.uT, CHUNK);
    transpose(K, V, x.S, V, x.ST, K);
    transpose(K, V, x.dS, V, x.dST, K);
    product(CHUNK, CHUNK, V, x.o, V, 1, x.uT, CHUNK, x.dA, CHUNK, 0);
    product(CHUNK, CHUNK, V, x.dz, V, 1, x.uT, CHUNK, x.dM, CHUNK, 0); /* and minus, like dks */
    product(CHUNK, K, V, x.o, V, 1, x.ST, K, x.dqs, K, 0);
    product(CHUNK, K, V, x.dz, V, 1, x.ST, K, x.dks, K, 0);
    product(CHUNK, K, V, x.u, V, 1, x.dST, K, x.dku, K, 0);
    far(x);
    near(x);
    fade(x, x.dS);
    product(K, V, CHUNK, x.qs, 1, K, x.o, V, x.dS, V, 1);
    product(K, V, CHUNK, x.ks, 1, K, x.dz, V, x.dS, V, -1);
}

#ifndef FORWARD
void delta_backward(const REAL *q, const REAL *k, const REAL *value, const REAL *beta, const REAL *g,
                    const REAL *states, const REAL *d_o, const REAL *dlast, REAL *dq, REAL *dk,
                    REAL *dv, REAL *dbeta, REAL *dg, REAL *dstart, REAL *space, i64 each, i64 B,
                    i64 T, i64 H, i64 K, i64 V, i64 G, i64 wide_K, i64 wide_V, i64 threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 part = 0; part < threads; part++) {
        room x = furnish(space + part * each, wide_K, wide_V, G < K);
        unsigned mode = MODE();
        for (i64 task = part; task < B * H; task += threads) {
            clear(wide_K * wide_V, x.S);
            clear(wide_K * wide_V, x.dS);
            copy(K, V, V, dlast + task * K * V, V, x.dS, x.V);
            for (i64 n = (T + CHUNK - 1) / CHUNK - 1; n >= 0; n--) {
                i64 from = n * CHUNK, c = smaller(CHUNK, T - from);
                i64 at = (task / H * T + from) * H + task % H;
                copy(K, V, V, states + (n * B * H + task) * K * V, V, x.S, x.V);
                begin(x, q + at * K, k + at * K, value + at * V, beta + at, g + at * G, c, H, K, V, G,
                      -CHUNK);
                fill(c, V, x.V, d_o + at * V, H * V, x.o, -CHUNK);
                back(x);
                copy(c, K, K, x.dq, x.K, dq + at * K, H * K);
                copy(c, K, K, x.dk, x.K, dk + at * K, H * K);
                copy(c, V, V, x.dz, x.V, dv + at * V, H * V);
                if (G == K) copy(c, K, K, x.dg, x.K, dg + at * K, H * K);
                for (i64 i = 0; i < c; i++) {
                    v of_beta = {0}, of_g = {0};
                    for (i64 d = 0; d < x.V; d += LANES)
                        of_beta += load(x.r + i * x.V + d) * load(x.z + i * x.V + d);
                    for (i64 d = 0; d < x.K; d += LANES) of_g += load(x.dg + i * x.K + d);
                    dbeta[at + i * H] = across(of_beta);
                    if (G < K) dg[at + i * H] = across(of_g);
                }
            }
            copy(K, V, V, x.dS, x.V, dstart + task * K * V, V);
        }
        SET_MODE(mode);
    }
}
#endif
