/* The selective scan and its gradients, channels last, in float32.
 *
 * A vector holds 16 channels, never states, so that y needs no sums across lanes. A task is one row
 * of the batch and GROUP vectors of channels. It walks blocks of STEPS tokens, and inside a block
 * one vector of channels after the other, whose state stays in the first-level cache. Of the states
 * only those before each block are kept; the backward pass computes the others again. dB and dC are
 * sums over channels: they gather in vectors over a group and meet across lanes once a block.
 * exp is 2^x with x rounded to an integer by a large constant and a polynomial for the rest; the
 * compiler must not reorder that, so no -ffast-math. No headers: any GCC or Clang will do. */

typedef long long i64;
typedef float v __attribute__((vector_size(64), aligned(64)));
typedef int vi __attribute__((vector_size(64), aligned(64)));

#define LANES 16
#define GROUP 16
#define STEPS 32
#define MOST 64 /* states N of a channel; the caller sees to it */

static i64 smaller(i64 x, i64 y) { return x < y ? x : y; }

static inline v load(const float *from, i64 n)
{
    v x = {0};
    if (n == LANES) __builtin_memcpy(&x, from, sizeof x);
    else for (i64 i = 0; i < n; i++) x[i] = from[i];
    return x;
}

static inline void store(v x, float *to, i64 n)
{
    if (n == LANES) __builtin_memcpy(to, &x, sizeof x);
    else for (i64 i = 0; i < n; i++) to[i] = x[i];
}

/* (channels, N) in memory, N vectors here; lanes beyond n are zero. */
static void gather(const float *from, v *to, i64 n, i64 N)
{
    for (i64 j = 0; j < N; j++) to[j] = (v){0};
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < N; j++) to[j][i] = from[i * N + j];
}

static void scatter(const v *from, float *to, i64 n, i64 N)
{
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < N; j++) to[i * N + j] = from[j][i];
}

static inline float across(v x)
{
    float sum = 0;
    for (i64 i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static inline v choose(vi which, v yes, v no) { return (v)((which & (vi)yes) | (~which & (vi)no)); }

/* 2^x, 1e-7 relative, held to [2^-126, 2^127]; not a number stays so. The polynomial of 2^f - 1
 * over f was fitted to |f| <= 1/2 by least squares of the relative error at Chebyshev nodes. */
static inline v power(v x)
{
    const v low = (v){0} - 126.0f, high = (v){0} + 127.0f, round = (v){0} + 12582912.0f;
    x = choose(x < low, low, choose(x > high, high, x));
    v shifted = x + round, f = x - (shifted - round);
    v p = f * 1.537070481e-4f + 1.339984829e-3f;
    p = p * f + 9.618373251e-3f;
    p = p * f + 5.550329035e-2f;
    p = p * f + 2.402264846e-1f;
    p = p * f + 6.931472056e-1f;
    p = p * f + 1.0f;
    return (v)((vi)p + ((vi)shifted << 23)) + (f - f);
}

void selective_scan_forward(const float *u, const float *dt, const float *A, const float *B,
                            const float *C, const float *start, const char *reset, float *y,
                            float *state, float *borders, i64 rows, i64 T, i64 D, i64 N,
                            i64 resets, i64 threads)
{
    const float log2e = 1.44269504f;
    i64 groups = (D + GROUP * LANES - 1) / (GROUP * LANES), tasks = rows * groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / groups, first = task % groups * GROUP * LANES;
        i64 vectors = smaller(GROUP, (D - first + LANES - 1) / LANES);
        v a[GROUP][MOST], h[GROUP][MOST];
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES, n = smaller(LANES, D - d);
            gather(A + d * N, a[g], n, N);
            for (i64 j = 0; j < N; j++) a[g][j] *= log2e;
            gather(start + (row * D + d) * N, h[g], n, N);
        }
        for (i64 from = 0; from < T; from += STEPS) {
            i64 until = smaller(T, from + STEPS);
            for (i64 g = 0; g < vectors; g++) {
                i64 d = first + g * LANES, n = smaller(LANES, D - d);
                v *h_g = h[g];
                const v *a_g = a[g];
                scatter(h_g, borders + ((from / STEPS * rows + row) * D + d) * N, n, N);
                for (i64 t = from; t < until; t++) {
                    i64 at = row * T + t;
                    v step = load(dt + at * D + d, n), w = step * load(u + at * D + d, n), sum = {0};
                    const float *B_t = B + at * N, *C_t = C + at * N;
                    float keep = resets && reset[at] ? 0.0f : 1.0f;
                    for (i64 j = 0; j < N; j++) {
                        h_g[j] = power(step * a_g[j]) * keep * h_g[j] + w * B_t[j];
                        sum += h_g[j] * C_t[j];
                    }
                    store(sum, y + at * D + d, n);
                }
            }
        }
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES;
            scatter(h[g], state + (row * D + d) * N, smaller(LANES, D - d), N);
        }
    }
}

/* One block and one vector of channels: decays and states of each step, before each step. */
static void again(const float *u, const float *dt, const float *B, const char *reset, const v *a,
                  const float *border, v decay[STEPS][MOST], v h[STEPS + 1][MOST], i64 steps,
                  i64 D, i64 n, i64 N, i64 resets)
{
    const float log2e = 1.44269504f;
    gather(border, h[0], n, N);
    for (i64 s = 0; s < steps; s++) {
        v step = load(dt + s * D, n), w = step * load(u + s * D, n);
        float keep = resets && reset[s] ? 0.0f : 1.0f;
        for (i64 j = 0; j < N; j++) {
            decay[s][j] = power(step * (a[j] * log2e)) * keep;
            h[s + 1][j] = decay[s][j] * h[s][j] + w * B[s * N + j];
        }
    }
}

/* dA comes per row of the batch, dB and dC per group of channels: the caller adds them up. */
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
        v carry[GROUP][MOST], total[GROUP][MOST];
        v a[MOST], decay[STEPS][MOST], h[STEPS + 1][MOST], sum_B[STEPS][MOST], sum_C[STEPS][MOST];
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES;
            gather(dstate + (row * D + d) * N, carry[g], smaller(LANES, D - d), N);
            for (i64 j = 0; j < N; j++) total[g][j] = (v){0};
        }
        for (i64 block = (T + STEPS - 1) / STEPS - 1; block >= 0; block--) {
            i64 from = block * STEPS, steps = smaller(STEPS, T - from), at = row * T + from;
            for (i64 s = 0; s < steps; s++)
                for (i64 j = 0; j < N; j++) sum_B[s][j] = sum_C[s][j] = (v){0};
            for (i64 g = 0; g < vectors; g++) {
                i64 d = first + g * LANES, n = smaller(LANES, D - d);
                v *carry_g = carry[g], *total_g = total[g];
                gather(A + d * N, a, n, N);
                again(u + at * D + d, dt + at * D + d, B + at * N, reset + at, a,
                      borders + ((block * rows + row) * D + d) * N, decay, h, steps, D, n, N, resets);
                for (i64 s = steps - 1; s >= 0; s--) {
                    i64 here = (at + s) * D + d;
                    v step = load(dt + here, n), in = load(u + here, n), out = load(dy + here, n);
                    v w = step * in, dw = {0}, dstep = {0};
                    const float *B_t = B + (at + s) * N, *C_t = C + (at + s) * N;
                    for (i64 j = 0; j < N; j++) {
                        v grad = carry_g[j] + out * C_t[j];
                        carry_g[j] = grad * decay[s][j];
                        v e = carry_g[j] * h[s][j]; /* the gradient of the exponent dt A */
                        dstep += e * a[j];
                        total_g[j] += e * step;
                        dw += grad * B_t[j];
                        sum_B[s][j] += grad * w;
                        sum_C[s][j] += out * h[s + 1][j];
                    }
                    store(dw * step, du + here, n);
                    store(dstep + dw * in, ddt + here, n);
                }
            }
            i64 to = (group * rows * T + at) * N;
            for (i64 s = 0; s < steps; s++)
                for (i64 j = 0; j < N; j++) {
                    dB[to + s * N + j] = across(sum_B[s][j]);
                    dC[to + s * N + j] = across(sum_C[s][j]);
                }
        }
        for (i64 g = 0; g < vectors; g++) {
            i64 d = first + g * LANES, n = smaller(LANES, D - d);
            scatter(carry[g], dstart + (row * D + d) * N, n, N);
            scatter(total[g], dA + (row * D + d) * N, n, N);
        }
    }
}
