/* The causal long convolution and its gradients by FFT, channels last: no transposes, no padding.
 *
 * A vector holds channels, so that every step of the transform is the same for all lanes. The real
 * sequence of 2n tokens is one of n complex numbers, x[2m] + i x[2m+1]; the product of two spectra
 * takes apart what is even and odd. Transforms go from natural to bit-reversed order and the inverse
 * back, so nothing is ever reordered: k stands at its bits reversed, and -k at the mirror place of
 * the stretch [2^s, 2^(s+1)) that holds k. Four-way steps go over all of an array until a part fits
 * the first-level cache and is finished there. Twiddle factors come from the caller, a table for
 * each size below the other, w^j, w^2j and w^3j for each j. No headers: any GCC or Clang will do. */

typedef long long i64;
typedef REAL v __attribute__((vector_size(64), aligned(64)));
typedef struct { v re, im; } c;

#define LANES ((i64)(sizeof(v) / sizeof(REAL)))
#define NEAR 256 /* complex vectors: 32 KB */
#define INLINE static inline __attribute__((always_inline))
#define ONCE static __attribute__((noinline)) /* copies would cost time to compile */

static i64 smaller(i64 x, i64 y) { return x < y ? x : y; }

INLINE v load(const REAL *from, i64 n)
{
    v x = {0};
    if (n == LANES) __builtin_memcpy(&x, from, sizeof x);
    else for (i64 i = 0; i < n; i++) x[i] = from[i];
    return x;
}

INLINE void store(v x, REAL *to, i64 n)
{
    if (n == LANES) __builtin_memcpy(to, &x, sizeof x);
    else for (i64 i = 0; i < n; i++) to[i] = x[i];
}

INLINE c plus(c x, c y) { return (c){x.re + y.re, x.im + y.im}; }
INLINE c minus(c x, c y) { return (c){x.re - y.re, x.im - y.im}; }
INLINE c conjugate(c x) { return (c){x.re, -x.im}; }
INLINE c times_i(c x) { return (c){-x.im, x.re}; }
INLINE c times(c x, c y) { return (c){x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re}; }
INLINE c turn(c x, const REAL *w)
{
    return (c){x.re * w[0] - x.im * w[1], x.re * w[1] + x.im * w[0]};
}

INLINE c turn_back(c x, const REAL *w)
{
    return (c){x.re * w[0] + x.im * w[1], x.im * w[0] - x.re * w[1]};
}

INLINE void step(c *z, i64 m, const REAL *w)
{
    for (i64 j = 0; j < m; j++, z++, w += 6) {
        c x0 = z[0], x1 = z[m], x2 = z[2 * m], x3 = z[3 * m];
        c s02 = plus(x0, x2), d02 = minus(x0, x2), s13 = plus(x1, x3), d13 = times_i(minus(x1, x3));
        z[0] = plus(s02, s13);
        z[m] = turn(minus(s02, s13), w + 2);
        z[2 * m] = turn(minus(d02, d13), w);
        z[3 * m] = turn(plus(d02, d13), w + 4);
    }
}

INLINE void step_back(c *z, i64 m, const REAL *w)
{
    for (i64 j = 0; j < m; j++, z++, w += 6) {
        c y0 = z[0], y1 = turn_back(z[m], w + 2);
        c y2 = turn_back(z[2 * m], w), y3 = turn_back(z[3 * m], w + 4);
        c s01 = plus(y0, y1), d01 = minus(y0, y1), s23 = plus(y2, y3), d23 = times_i(minus(y2, y3));
        z[0] = plus(s01, s23);
        z[2 * m] = minus(s01, s23);
        z[m] = plus(d01, d23);
        z[3 * m] = minus(d01, d23);
    }
}

ONCE void pairs(c *z, i64 n)
{
    for (i64 at = 0; at < n; at += 2) {
        c x = z[at];
        z[at] = plus(x, z[at + 1]);
        z[at + 1] = minus(x, z[at + 1]);
    }
}

/* The table of size s stands at w + 2 (n - s). */
static void transform(c *z, i64 n, const REAL *w)
{
    i64 size = n;
    if (n > NEAR) {
        step(z, n / 4, w);
        for (i64 q = 0; q < 4; q++) transform(z + q * (n / 4), n / 4, w + 6 * (n / 4));
        return;
    }
    for (; size >= 4; size /= 4)
        for (i64 at = 0; at < n; at += size) step(z + at, size / 4, w + 2 * (n - size));
    if (size == 2) pairs(z, n);
}

/* Without the factor 1 / n. */
static void invert(c *z, i64 n, const REAL *w)
{
    i64 size = n & 0x5555555555555555 ? 1 : 2; /* is n a power of 4? */
    if (n > NEAR) {
        for (i64 q = 0; q < 4; q++) invert(z + q * (n / 4), n / 4, w + 6 * (n / 4));
        step_back(z, n / 4, w);
        return;
    }
    if (size == 2) pairs(z, n);
    for (size *= 4; size <= n; size *= 4)
        for (i64 at = 0; at < n; at += size) step_back(z + at, size / 4, w + 2 * (n - size));
}

/* Spectra of the even tokens, twice, and of the odd ones, 2i times, from places of k and -k. */
#define APART(x, even, odd) \
    c even = plus((x)[p], conjugate((x)[q])), odd = minus((x)[p], conjugate((x)[q]))

/* Every pair of places p <= q of k and -k, where t holds e^(-2 pi i k / n) at p. */
#define PAIRS(n) \
    for (i64 top = 0; top < (n); top = top ? 2 * top : 1) \
        for (i64 p = top, q = top ? 2 * top - 1 : 0; p <= q; p++, q--)

/* x = 4 x k: even is even even + w odd odd, odd is even odd + odd even. */
ONCE void multiply(c *x, const c *k, i64 n, const REAL *t)
{
    PAIRS(n) {
        APART(x, x_even, x_odd);
        APART(k, k_even, k_odd);
        c even = minus(times(x_even, k_even), turn(times(x_odd, k_odd), t + 2 * p));
        c odd = plus(times(x_even, k_odd), times(x_odd, k_even));
        x[q] = conjugate(minus(even, odd));
        x[p] = plus(even, odd);
    }
}

/* The gradient of one factor, 4 times: `to` (+)= conj(x) dy. `to` may be dy. */
INLINE void correlate(const c *x, const c *dy, c *to, i64 n, const REAL *t, int add)
{
    PAIRS(n) {
        APART(x, x_even, x_odd);
        APART(dy, y_even, y_odd);
        c even = plus(times(conjugate(x_even), y_even), times(conjugate(x_odd), y_odd));
        c odd = minus(times(conjugate(x_even), y_odd),
                      turn_back(times(conjugate(x_odd), y_even), t + 2 * p));
        c at_p = plus(even, odd), at_q = conjugate(minus(even, odd));
        if (add) {
            at_p = plus(to[p], at_p);
            at_q = plus(to[q], at_q);
        }
        to[q] = at_q;
        to[p] = at_p;
    }
}

/* (T, D) in memory, zeros behind it. */
ONCE void read(const REAL *from, c *z, i64 T, i64 D, i64 n, i64 lanes)
{
    i64 m = 0;
    if (lanes == LANES)
        for (; 2 * m + 1 < T; m++)
            z[m] = (c){load(from + 2 * m * D, LANES), load(from + (2 * m + 1) * D, LANES)};
    for (; m < n; m++)
        z[m] = (c){load(from + 2 * m * D, 2 * m < T ? lanes : 0),
                   load(from + (2 * m + 1) * D, 2 * m + 1 < T ? lanes : 0)};
}

ONCE void write(const c *z, REAL *to, i64 T, i64 D, i64 n, i64 lanes)
{
    const REAL scale = (REAL)1 / (4 * n);
    for (i64 t = 0; t < T; t++) store((t & 1 ? z[t / 2].im : z[t / 2].re) * scale, to + t * D, lanes);
}

/* (channels, L) in memory. */
ONCE void read_kernel(const REAL *from, c *z, i64 L, i64 n, i64 lanes)
{
    v *to = (v *)z;
    for (i64 l = 0; l < 2 * n; l++) to[l] = (v){0};
    for (i64 l = 0; l < L; l++)
        for (i64 i = 0; i < lanes; i++) to[l][i] = from[i * L + l];
}

ONCE void write_kernel(const c *z, REAL *to, i64 L, i64 n, i64 lanes)
{
    const REAL scale = (REAL)1 / (4 * n);
    const v *from = (const v *)z;
    for (i64 l = 0; l < L; l++) {
        v x = from[l] * scale;
        for (i64 i = 0; i < lanes; i++) to[i * L + l] = x[i];
    }
}

/* `room` holds 2 arrays of n complex vectors for each worker. */
void long_conv_forward(const REAL *u, const REAL *kernel, const REAL *w, const REAL *t, REAL *y,
                       c *room, i64 B, i64 T, i64 D, i64 L, i64 n, i64 workers)
{
#pragma omp parallel for num_threads(workers) schedule(static)
    for (i64 worker = 0; worker < workers; worker++) {
        c *k = room + 2 * n * worker, *x = k + n;
        for (i64 d = worker * LANES; d < D; d += workers * LANES) {
            i64 lanes = smaller(LANES, D - d);
            read_kernel(kernel + d * L, k, L, n, lanes);
            transform(k, n, w);
            for (i64 b = 0; b < B; b++) {
                read(u + b * T * D + d, x, T, D, n, lanes);
                transform(x, n, w);
                multiply(x, k, n, t);
                invert(x, n, w);
                write(x, y + b * T * D + d, T, D, n, lanes);
            }
        }
    }
}

/* `room` holds 4 arrays of n complex vectors for each worker. */
void long_conv_backward(const REAL *u, const REAL *kernel, const REAL *dy, const REAL *w,
                        const REAL *t, REAL *du, REAL *dkernel, c *room, i64 B, i64 T, i64 D, i64 L,
                        i64 n, i64 workers)
{
#pragma omp parallel for num_threads(workers) schedule(static)
    for (i64 worker = 0; worker < workers; worker++) {
        c *k = room + 4 * n * worker, *dk = k + n, *x = dk + n, *dx = x + n;
        for (i64 d = worker * LANES; d < D; d += workers * LANES) {
            i64 lanes = smaller(LANES, D - d);
            read_kernel(kernel + d * L, k, L, n, lanes);
            transform(k, n, w);
            for (i64 i = 0; i < n; i++) dk[i] = (c){{0}, {0}};
            for (i64 b = 0; b < B; b++) {
                read(u + b * T * D + d, x, T, D, n, lanes);
                transform(x, n, w);
                read(dy + b * T * D + d, dx, T, D, n, lanes);
                transform(dx, n, w);
                correlate(x, dx, dk, n, t, 1);
                correlate(k, dx, dx, n, t, 0);
                invert(dx, n, w);
                write(dx, du + b * T * D + d, T, D, n, lanes);
            }
            invert(dk, n, w);
            write_kernel(dk, dkernel + d * L, L, n, lanes);
        }
    }
}
