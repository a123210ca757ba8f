/* The selective scan and its gradients, channels last, in float32.
 *
 * A vector holds 16 channels, never states, so that y needs no sums across lanes. A task is one row
 * of the batch and GROUP vectors of channels. It walks blocks of STEPS tokens, and inside a block
 * one vector of channels after the other, whose state stays in the first-level cache. Of the states
 * only those before each block are kept, (N, D) for each block and row; the backward pass computes
 * the others again, PIECE states of a channel at a time so that they stay in the cache too. dB and
 * dC are sums over channels: they gather in vectors over a group and meet across lanes once a block.
 * exp is 2^x with x rounded to an integer by a large constant and a polynomial for the rest; the
 * compiler must not reorder that, so no -ffast-math. No headers: any GCC or Clang will do. */

typedef long long i64;
typedef float v __attribute__((vector_size(64), aligned(64)));
typedef int vi __attribute__((vector_size(64), aligned(64)));
typedef float half __attribute__((vector_size(32)));
typedef float quarter __attribute__((vector_size(16)));

#define LANES 16
#define GROUP 16
#define STEPS 32
#define MOST 64 /* states N of a channel; the caller sees to it */
#define PIECE 4
#define LOG2E 1.44269504f
#define LN2 0.69314718f
#define FAR 125.0f /* exponents of 2 are held to this; below it is 0 */
#define INLINE static inline __attribute__((always_inline))
#define ONCE static __attribute__((noinline)) /* copies would cost time to compile */

static i64 smaller(i64 x, i64 y) { return x < y ? x : y; }

INLINE v load(const float *from, i64 n)
{
    v x = {0};
    if (n == LANES) __builtin_memcpy(&x, from, sizeof x);
    else for (i64 i = 0; i < n; i++) x[i] = from[i];
    return x;
}

/* Into the second-level cache, a block before it is used: rows are too far apart for the machine to
 * guess. Any address will do. */
INLINE void fetch(const float *from) { __builtin_prefetch(from, 0, 2); }
INLINE void fetch_to_write(const float *to) { __builtin_prefetch(to, 1, 2); }

INLINE void store(v x, float *to, i64 n)
{
    if (n == LANES) __builtin_memcpy(to, &x, sizeof x);
    else for (i64 i = 0; i < n; i++) to[i] = x[i];
}

/* (channels, N) in memory, N vectors here; lanes beyond n are zero. */
ONCE void gather(const float *from, v *to, i64 n, i64 N)
{
    for (i64 j = 0; j < N; j++) to[j] = (v){0};
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < N; j++) to[j][i] = from[i * N + j];
}

ONCE void scatter(const v *from, float *to, i64 n, i64 N)
{
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < N; j++) to[i * N + j] = from[j][i];
}

INLINE float across(v x)
{
    half x0, x1;
    quarter y0, y1;
    __builtin_memcpy(&x0, &x, sizeof x0);
    __builtin_memcpy(&x1, (char *)&x + sizeof x0, sizeof x1);
    x0 += x1;
    __builtin_memcpy(&y0, &x0, sizeof y0);
    __builtin_memcpy(&y1, (char *)&x0 + sizeof y0, sizeof y1);
    y0 += y1;
    return (y0[0] + y0[2]) + (y0[1] + y0[3]);
}

INLINE v choose(vi which, v yes, v no) { return (v)((which & (vi)yes) | (~which & (vi)no)); }

/* The largest magnitude in each lane. Of bits as integers, so that what is not a number wins. */
INLINE v widest(v so_far, v x)
{
    vi bits = (vi)x & 0x7fffffff;
    return choose(bits > (vi)so_far, (v)bits, so_far);
}

/* 2^(step a), 3e-7 of the exponent off, where that is between -FAR and FAR. The polynomial of
 * (2^f - 1) / f was fitted to |f| <= 1/2, its largest error made least. */
INLINE v power(v step, v a)
{
    const v round = (v){0} + 12582912.0f;
    v shifted = step * a + round, f = step * a - (shifted - round);
    v p = f * 1.34004222e-3f + 9.66637302e-3f;
    p = p * f + 5.55033311e-2f;
    p = p * f + 2.40223482e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return (v)((vi)p + ((vi)shifted << 23));
}

/* The same anywhere: held to what a number holds; not a number stays so. */
INLINE v power_anywhere(v step, v a)
{
    v x = step * a, most = (v){0} + 0x1p125f;
    v p = choose(x > FAR, most, choose(x < -FAR, (v){0}, power(step, a)));
    return choose(x == x, p, x);
}

/* Whether no token of a block empties the state and no exponent comes near the ends. */
ONCE int tame(const float *dt, const char *reset, v widest_a, i64 steps, i64 D, i64 n)
{
    v widest_step = {0};
    for (i64 s = 0; s < steps; s++) {
        if (reset && reset[s]) return 0;
        widest_step = widest(widest_step, load(dt + s * D, n));
    }
    vi near = widest_step * widest_a <= FAR;
    int all = -1;
    for (i64 i = 0; i < LANES; i++) all &= near[i];
    return all;
}

INLINE v decays(v step, v a, v keep, int easy)
{
    return easy ? power(step, a) : power_anywhere(step, a) * keep;
}

/* A times log2 e, and the largest magnitude of a channel. */
ONCE v exponents(const float *A, v *a, i64 n, i64 N)
{
    v most = {0};
    gather(A, a, n, N);
    for (i64 j = 0; j < N; j++) {
        a[j] *= LOG2E;
        most = widest(most, a[j]);
    }
    return most;
}

INLINE void walk(const float *u, const float *dt, const float *B, const float *C,
                 const char *reset, const v *a, v *h, float *y, i64 steps, i64 D, i64 n, i64 N,
                 int easy)
{
    for (i64 s = 0; s < steps; s++) {
        v step = load(dt + s * D, n), w = step * load(u + s * D, n), sum = {0};
        fetch(dt + (s + STEPS) * D);
        fetch(u + (s + STEPS) * D);
        fetch_to_write(y + (s + STEPS) * D);
        v keep = (v){0} + (reset && reset[s] ? 0.0f : 1.0f);
        for (i64 j = 0; j < N; j++) {
            h[j] = decays(step, a[j], keep, easy) * h[j] + w * B[s * N + j];
            sum += h[j] * C[s * N + j];
        }
        store(sum, y + s * D, n);
    }
}

/* `borders` is written where `keep` says so. */
#ifndef BACKWARD
void selective_scan_forward(const float *u, const float *dt, const float *A, const float *B,
                            const float *C, const float *start, const char *reset, float *y,
                            float *state, float *borders, i64 rows, i64 T, i64 D, i64 N,
                            i64 resets, i64 keep, i64 threads)
{
    i64 groups = (D + GROUP * LANES - 1) / (GROUP * LANES), tasks = rows * groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / groups, first = task % groups * GROUP * LANES;
        i64 vectors = smaller(GROUP, (D - first + LANES - 1) / LANES);
        v a[GROUP * MOST], h[GROUP * MOST + 1], most[GROUP];
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES, n = smaller(LANES, D - d);
            most[g] = exponents(A + d * N, a + g * N, n, N);
            gather(start + (row * D + d) * N, h + g * N, n, N);
        }
        for (i64 from = 0; from < T; from += STEPS) {
            i64 steps = smaller(STEPS, T - from), at = row * T + from;
            const char *emptied = resets ? reset + at : 0;
            const float *B_t = B + at * N, *C_t = C + at * N;
            for (i64 g = 0; g < vectors; g++) {
                i64 d = first + g * LANES, n = smaller(LANES, D - d), here = at * D + d;
                v *h_g = h + g * N;
                const v *a_g = a + g * N;
                float *border = borders + (from / STEPS * rows + row) * D * N + d;
                for (i64 j = 0; keep && j < N; j++) store(h_g[j], border + j * D, n);
                if (tame(dt + here, emptied, most[g], steps, D, n) && n == LANES)
                    walk(u + here, dt + here, B_t, C_t, 0, a_g, h_g, y + here, steps, D, LANES, N, 1);
                else
                    walk(u + here, dt + here, B_t, C_t, emptied, a_g, h_g, y + here, steps, D, n, N, 0);
            }
        }
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES;
            scatter(h + g * N, state + (row * D + d) * N, smaller(LANES, D - d), N);
        }
    }
}
#endif

/* One vector of channels in one block, m of its states: decays, states before each step, and what
 * each step adds to dC. */
INLINE void again(const float *u, const float *dt, const float *dy, const float *B,
                  const char *reset, const v *a, const float *border, v *decay, v *h, v *sum_C,
                  i64 steps, i64 D, i64 n, i64 N, i64 m, int easy)
{
    v now[PIECE];
    for (i64 j = 0; j < m; j++) now[j] = load(border + j * D, n);
    for (i64 s = 0; s < steps; s++) {
        v step = load(dt + s * D, n), w = step * load(u + s * D, n), out = load(dy + s * D, n);
        fetch(dt + (s - STEPS) * D);
        fetch(u + (s - STEPS) * D);
        fetch(dy + (s - STEPS) * D);
        v keep = (v){0} + (reset && reset[s] ? 0.0f : 1.0f);
        for (i64 j = 0; j < m; j++) {
            h[s * PIECE + j] = now[j];
            decay[s * PIECE + j] = decays(step, a[j], keep, easy);
            now[j] = decay[s * PIECE + j] * now[j] + w * B[s * N + j];
            sum_C[s * PIECE + j] += out * now[j];
        }
    }
}

/* From the last step of the block to the first; du and ddt are added to unless these are the first
 * states of the channel. */
INLINE void back(const float *u, const float *dt, const float *dy, const float *B, const float *C,
                 const v *a, const v *decay, const v *h, v *carry, v *total, v *sum_B, float *du,
                 float *ddt, i64 steps, i64 D, i64 n, i64 N, i64 m, int add)
{
    for (i64 s = steps - 1; s >= 0; s--) {
        v step = load(dt + s * D, n), in = load(u + s * D, n), out = load(dy + s * D, n);
        v w = step * in, dw = {0}, dx = {0};
        for (i64 j = 0; j < m; j++) {
            v grad = carry[j] + out * C[s * N + j];
            carry[j] = grad * decay[s * PIECE + j];
            v e = carry[j] * h[s * PIECE + j]; /* the gradient of the exponent dt A */
            dx += e * a[j];
            total[j] += e * step;
            dw += grad * B[s * N + j];
            sum_B[s * PIECE + j] += grad * w;
        }
        v to_u = dw * step, to_dt = dx * LN2 + dw * in;
        if (add) {
            to_u += load(du + s * D, n);
            to_dt += load(ddt + s * D, n);
        }
        store(to_u, du + s * D, n);
        store(to_dt, ddt + s * D, n);
    }
}

/* dA comes per row of the batch, dB and dC per group of channels: the caller adds them up. */
#ifndef FORWARD
void selective_scan_backward(const float *u, const float *dt, const float *A, const float *B,
                             const float *C, const char *reset, const float *borders,
                             const float *dy, const float *dstate, float *du, float *ddt,
                             float *dA, float *dB, float *dC, float *dstart, i64 rows, i64 T,
                             i64 D, i64 N, i64 resets, i64 threads)
{
    i64 groups = (D + GROUP * LANES - 1) / (GROUP * LANES), tasks = rows * groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / groups, group = task % groups, first = group * GROUP * LANES;
        i64 vectors = smaller(GROUP, (D - first + LANES - 1) / LANES);
        v a[GROUP * MOST], carry[GROUP * MOST], total[GROUP * MOST], most[GROUP];
        v decay[STEPS * PIECE], h[STEPS * PIECE], sum_B[STEPS * PIECE], sum_C[STEPS * PIECE];
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES, n = smaller(LANES, D - d);
            most[g] = exponents(A + d * N, a + g * N, n, N);
            gather(dstate + (row * D + d) * N, carry + g * N, n, N);
            for (i64 j = 0; j < N; j++) total[g * N + j] = (v){0};
        }
        for (i64 block = (T + STEPS - 1) / STEPS - 1; block >= 0; block--) {
            i64 from = block * STEPS, steps = smaller(STEPS, T - from), at = row * T + from;
            const char *emptied = resets ? reset + at : 0;
            for (i64 p = 0; p < N; p += PIECE) {
                i64 m = smaller(PIECE, N - p), to = (group * rows * T + at) * N + p;
                const float *B_t = B + at * N + p, *C_t = C + at * N + p;
                for (i64 i = 0; i < steps * PIECE; i++) sum_B[i] = sum_C[i] = (v){0};
                for (i64 g = 0; g < vectors; g++) {
                    i64 d = first + g * LANES, n = smaller(LANES, D - d), here = at * D + d;
                    i64 one = g * N + p;
                    const float *x = u + here, *step = dt + here, *out = dy + here;
                    const float *border = borders + ((block * rows + row) * N + p) * D + d;
                    if (m == PIECE && n == LANES && tame(step, emptied, most[g], steps, D, n)) {
                        again(x, step, out, B_t, 0, a + one, border, decay, h, sum_C, steps, D,
                              LANES, N, PIECE, 1);
                        back(x, step, out, B_t, C_t, a + one, decay, h, carry + one, total + one,
                             sum_B, du + here, ddt + here, steps, D, LANES, N, PIECE, p > 0);
                    } else {
                        again(x, step, out, B_t, emptied, a + one, border, decay, h, sum_C, steps, D,
                              n, N, m, 0);
                        back(x, step, out, B_t, C_t, a + one, decay, h, carry + one, total + one,
                             sum_B, du + here, ddt + here, steps, D, n, N, m, p > 0);
                    }
                }
                for (i64 s = 0; s < steps; s++)
                    for (i64 j = 0; j < m; j++) {
                        dB[to + s * N + j] = across(sum_B[s * PIECE + j]);
                        dC[to + s * N + j] = across(sum_C[s * PIECE + j]);
                    }
            }
        }
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES, n = smaller(LANES, D - d);
            scatter(carry + g * N, dstart + (row * D + d) * N, n, N);
            scatter(total + g * N, dA + (row * D + d) * N, n, N);
        }
    }
}
#endif
