/* What tokens of a chunk have to do with each other under decays; after kernels/prelude.c.
 *
 * Inside a chunk o_i = sum_{j <= i} A_ij v_j. With a decay per head, A is q k^T times the decay from
 * j to i. With a decay per channel, halves of 2 LEAF, 4 LEAF, ... tokens meet at the border between
 * them as in chunked.py, (q_i since the border) . (k_j until the border), and the pairs inside a
 * leaf are taken one by one. No exponent is above zero and none is a difference: factors of up to
 * LEAF tokens are products of decays, longer ones exponentials of sums, so that rounding does not
 * pile up in one direction. Decays of spans are kept 2^LIFT times too large, and so is A: below the
 * smallest normal number a processor takes a hundred times as long. The gradient of a log decay is
 * a sum over the exponents it is part of. */

#define CHUNK 64
#define BLOCK 16
#define LEAF 8
#define LIFT 32
#define DROP ((REAL)0x1p-32)
#define LEAST (SMALL ? (REAL)0x1p-118 : (REAL)0x1p-1000) /* of a lifted decay */

/* Scratch of a task: matrices of CHUNK rows, and the states of the heads. */
typedef struct {
    i64 K, V, m; /* padded sizes of a key, a value, and tokens of this chunk */
    REAL *q, *k, *v, *o, *decay, *g, *sums, *since, *until, *qs, *ks; /* x K or V */
    REAL *dq, *dk, *dv, *dg, *d;
    REAL *A, *dA, *P, *dP, *between;     /* x CHUNK; P = q k^T, `between` the decay from j to i */
    REAL *total, *dtotal, *turned;       /* K; room for one transpose of the above */
    REAL *states, *turned_S, *turned_dS; /* heads x K x V; V x K */
} scratch;

ONCE i64 padded(i64 n, i64 to) { return (n + to - 1) / to * to; }

/* Divides `from` up; returns how many numbers that takes. */
ONCE i64 divide(scratch *s, REAL *from, i64 K, i64 V, i64 heads)
{
    i64 used = 0, k = s->K = padded(K, LANES), v = s->V = padded(V, LANES);
    struct { REAL **part; i64 numbers; } parts[] = {
        {&s->q, CHUNK * k}, {&s->k, CHUNK * k}, {&s->v, CHUNK * v}, {&s->o, CHUNK * v},
        {&s->decay, CHUNK * k}, {&s->g, CHUNK * k}, {&s->sums, CHUNK * k},
        {&s->since, CHUNK * k}, {&s->until, CHUNK * k}, {&s->qs, CHUNK * k}, {&s->ks, CHUNK * k},
        {&s->dq, CHUNK * k}, {&s->dk, CHUNK * k}, {&s->dv, CHUNK * v}, {&s->dg, CHUNK * k},
        {&s->d, CHUNK * k}, {&s->A, CHUNK * CHUNK}, {&s->dA, CHUNK * CHUNK},
        {&s->P, CHUNK * CHUNK}, {&s->dP, CHUNK * CHUNK}, {&s->between, CHUNK * CHUNK},
        {&s->total, k}, {&s->dtotal, k}, {&s->turned, CHUNK * (k > v ? k : v)},
        {&s->states, heads * k * v}, {&s->turned_S, k * v}, {&s->turned_dS, k * v}};
    for (i64 i = 0; i < (i64)(sizeof parts / sizeof parts[0]); used += parts[i++].numbers)
        *parts[i].part = from + used;
    return used;
}

/* Numbers of scratch that a task needs. */
void decay_room(i64 *numbers, i64 K, i64 V, i64 heads)
{
    scratch s;
    *numbers = divide(&s, 0, K, V, heads);
}

ONCE void fill(REAL *to, i64 n, REAL x)
{
    for (i64 i = 0; i < n; i += LANES) store((v){0} + x, to + i);
}

/* n tokens, then zeros up to m of them and up to `width` columns. */
ONCE void read_tokens(const REAL *from, i64 row, i64 n, i64 columns, REAL *to, i64 m, i64 width)
{
    copy(n, columns, width, from, row, to, width);
    fill(to + n * width, (m - n) * width, 0);
}

/* A = X Y^T in the blocks that hold the diagonal or lie below it; y is Y^T. */
ONCE void lower(i64 m, i64 depth, const REAL *x, i64 row, const REAL *y, REAL *A)
{
    for (i64 i = 0; i < m; i += BLOCK)
        product(BLOCK, i + BLOCK, depth, x + i * row, row, 1, y, CHUNK, A + i * CHUNK, CHUNK, 0);
}

/* out (+)= A x, and A^T x, of such an A; x has rows of `width`. */
ONCE void lower_times(i64 m, const REAL *A, const REAL *x, REAL *out, i64 width,
                      REAL add)
{
    for (i64 i = 0; i < m; i += BLOCK)
        product(BLOCK, width, i + BLOCK, A + i * CHUNK, CHUNK, 1, x, width, out + i * width, width,
                add);
}

ONCE void upper_times(i64 m, const REAL *A, const REAL *x, REAL *out, i64 width,
                      REAL add)
{
    for (i64 j = 0; j < m; j += BLOCK)
        product(BLOCK, width, m - j, A + j * CHUNK + j, 1, CHUNK, x + j * width, width,
                out + j * width, width, add);
}

ONCE void times(const REAL *x, const REAL *y, REAL *to, i64 n)
{
    for (i64 i = 0; i < n; i += LANES) store(load(x + i) * load(y + i), to + i);
}

INLINE v or_none(v x) { return choose(x < LEAST, (v){0}, x); }

/* Decays of as many spans, which grow by one of another decay. */
ONCE void lengthen(const REAL *decay, REAL *spans, i64 rows, i64 K)
{
    for (i64 i = 0; i < rows; i++, spans += K)
        for (i64 c = 0; c < K; c += LANES)
            store(or_none(load(spans + c) * load(decay + c)), spans + c);
}

/* From d, the gradient of rows qs = q * since, to those of q and of the log decays: since_i sums
 * those of the first row to row i. `all` reaches every one of them. What is lifted is `drop`ped. */
ONCE void spread_since(i64 rows, i64 K, const REAL *d, const REAL *qs, const REAL *since,
                         const REAL *all, REAL *dq, REAL *dg, REAL drop)
{
    for (i64 c = 0; c < K; c += LANES) {
        v sum = all ? load(all + c) : (v){0};
        for (i64 at = (rows - 1) * K + c; at >= 0; at -= K) {
            v x = drop * load(d + at);
            sum += x * load(qs + at);
            store(load(dg + at) + sum, dg + at);
            store(load(dq + at) + x * load(since + at), dq + at);
        }
    }
}

/* The same for ks = k * until: until_j sums those of row j + 1 to the last. */
ONCE void spread_until(i64 rows, i64 K, const REAL *d, const REAL *ks, const REAL *until, REAL *dk,
                         REAL *dg, REAL drop)
{
    for (i64 c = 0; c < K; c += LANES) {
        v sum = {0};
        for (i64 at = c; at < rows * K; at += K) {
            v x = drop * load(d + at);
            store(load(dg + at) + sum, dg + at);
            sum += x * load(ks + at);
            store(load(dk + at) + x * load(until + at), dk + at);
        }
    }
}

/* Lanes of numbers from 0 on. */
INLINE vi counted(void)
{
    vi x;
    for (i64 i = 0; i < LANES; i++) x[i] = i;
    return x;
}

/* A decay per head, g (m of them): A = P * decay from j to i. */
ONCE void head_weights(scratch *s, const REAL *g)
{
    const vi lane = counted();
    const v none = (v){0} - (REAL)__builtin_inf();
    REAL sum = 0, G[CHUNK];
    v sums[CHUNK / LANES] = {{0}};
    for (i64 i = 0; i < s->m; i++) {
        REAL *row = s->between + i * CHUNK;
        i64 end = i / BLOCK * BLOCK + BLOCK;
        G[i] = sum += g[i];
        for (i64 j = 0; j < end; j += LANES) {
            vi place = lane + (whole)j;
            v *x = sums + j / LANES;
            *x = choose(place < (whole)i, *x + g[i], (v){0});
            store(choose(place <= (whole)i, *x, none), row + j);
        }
        exponentials(row, row, end, LIFT);
        times(row, s->P + i * CHUNK, s->A + i * CHUNK, end);
    }
    fill(s->total, s->K, sum);
    exponentials(s->total, s->total, s->K, 0);
    exponentials(G, G, s->m, LIFT);
    for (i64 i = 0; i < s->m; i++) {
        fill(s->since + i * s->K, s->K, G[i]);
        fill(s->until + i * s->K, s->K, s->between[(s->m - 1) * CHUNK + i]);
    }
}

/* From dA: the gradient of P is added to dP, that of the log decays to the first column of dg. */
ONCE void head_weights_back(scratch *s)
{
    const vi lane = counted();
    v sums[CHUNK / LANES] = {{0}};
    for (i64 i = s->m - 1; i >= 0; i--) {
        v sum = {0};
        for (i64 j = 0; j < i / BLOCK * BLOCK + BLOCK; j += LANES) {
            i64 at = i * CHUNK + j;
            v d = load(s->dA + at), *x = sums + j / LANES;
            store(load(s->dP + at) + d * load(s->between + at), s->dP + at);
            *x += d * load(s->A + at);
            sum += choose(lane + (whole)j < (whole)i, *x, (v){0});
        }
        s->dg[i * s->K] += DROP * across(sum);
    }
}

/* Of the leaf that stands at `from`: the decay since its first token's, that until its end, and the
 * sum of the logarithms. */
ONCE void leaf_decays(scratch *s, i64 from)
{
    for (i64 c = from, K = s->K; c < from + K; c += LANES) {
        v since = (v){0} + 1 / DROP, until = since, sum = {0};
#pragma GCC unroll 1
        for (i64 at = c, back = c + (LEAF - 1) * K; at < c + LEAF * K; at += K, back -= K) {
            since = or_none(since * load(s->decay + at)), sum += load(s->g + at);
            store(since, s->since + at), store(until, s->until + back);
            until = or_none(until * load(s->decay + back));
        }
        store(sum, s->sums + c);
    }
}

/* The pairs inside a leaf; A stands at its diagonal. */
ONCE void leaf_weights(i64 K, const REAL *q, const REAL *k, const REAL *decay, REAL *A)
{
    v sums[LEAF][LEAF] = {{{0}}};
    for (i64 c = 0; c < K; c += LANES)
        for (i64 j = 0; j < LEAF; j++) {
            v x = load(k + j * K + c) * (1 / DROP);
            for (i64 i = j; i < LEAF; i++) {
                if (i > j) x *= load(decay + i * K + c);
                sums[i][j] += load(q + i * K + c) * x;
            }
        }
    for (i64 i = 0; i < LEAF; i++)
        for (i64 j = 0; j < LEAF; j++) A[i * CHUNK + j] = j <= i ? across(sums[i][j]) : 0;
}

ONCE void leaf_weights_back(i64 K, const REAL *q, const REAL *k, const REAL *decay, const REAL *dA,
                              REAL *dq, REAL *dk, REAL *dg)
{
    for (i64 c = 0; c < K; c += LANES) {
        v to_q[LEAF] = {{0}}, to_g[LEAF] = {{0}}, x[LEAF];
        for (i64 j = 0; j < LEAF; j++) {
            v sum = {0};
            x[j] = load(k + j * K + c) * (1 / DROP);
            for (i64 i = j + 1; i < LEAF; i++) x[i] = x[i - 1] * load(decay + i * K + c);
            for (i64 i = LEAF - 1; i > j; i--) {
                REAL d = dA[i * CHUNK + j];
                sum += d * load(q + i * K + c);
                to_q[i] += d * x[i];
                to_g[i] += sum * x[i];
                sum *= load(decay + i * K + c);
            }
            REAL d = dA[j * CHUNK + j];
            to_q[j] += d * x[j];
            sum += d * load(q + j * K + c);
            store(load(dk + j * K + c) + sum, dk + j * K + c);
        }
        for (i64 i = 0; i < LEAF; i++) {
            store(load(dq + i * K + c) + DROP * to_q[i], dq + i * K + c);
            store(load(dg + i * K + c) + DROP * to_g[i], dg + i * K + c);
        }
    }
}

/* A decay per channel, g (m x K): A, and from dA gradients of q, k and g where `back` says so. */
ONCE void channel_weights(scratch *s, int back)
{
    i64 K = s->K, m = s->m;
    REAL *turned = s->turned, *sums = s->sums;
    exponentials(s->g, s->decay, m * K, 0);
    for (i64 b = 0; b < m; b += LEAF) leaf_decays(s, b * K);
    for (i64 h = LEAF; h < m; h *= 2)
        for (i64 b = 0; b + h < m; b += 2 * h) { /* tokens from b meet those from `at` */
            i64 at = b + h, rows = smaller(h, m - at), left = b * K, right = at * K;
            REAL *corner = s->A + at * CHUNK + b;
            times(s->q + right, s->since + right, s->qs + right, rows * K);
            times(s->k + left, s->until + left, s->ks + left, h * K);
            transpose(h, K, s->ks + left, K, turned, CHUNK);
            product(rows, padded(h, LANES), K, s->qs + right, K, 1, turned, CHUNK, corner, CHUNK,
                    DROP);
            if (back) {
                const REAL *d = s->dA + at * CHUNK + b;
                product(rows, K, h, d, CHUNK, 1, s->ks + left, K, s->d, K, 0);
                spread_since(rows, K, s->d, s->qs + right, s->since + right, 0, s->dq + right,
                             s->dg + right, DROP * DROP);
                product(h, K, rows, d, 1, CHUNK, s->qs + right, K, s->d, K, 0);
                spread_until(h, K, s->d, s->ks + left, s->until + left, s->dk + left, s->dg + left,
                             DROP * DROP);
            }
            exponentials(sums + left, s->total, K, 0);
            lengthen(s->total, s->since + right, rows, K);
            exponentials(sums + right, s->total, K, 0);
            lengthen(s->total, s->until + left, h, K);
            for (i64 c = 0; c < K; c += LANES)
                store(load(sums + left + c) + load(sums + right + c), sums + left + c);
        }
    exponentials(sums, s->total, K, 0);
    for (i64 b = 0; b < m; b += LEAF) {
        const REAL *q = s->q + b * K, *k = s->k + b * K, *decay = s->decay + b * K;
        i64 at = b * CHUNK + b;
        leaf_weights(K, q, k, decay, s->A + at);
        if (back)
            leaf_weights_back(K, q, k, decay, s->dA + at, s->dq + b * K, s->dk + b * K,
                              s->dg + b * K);
    }
}
