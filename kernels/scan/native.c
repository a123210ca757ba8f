/* The diagonal recurrence h_t = a_t h_{t-1} + b_t and its gradients, channels last.
 *
 * REAL is float or double, set by the compiler's command line; a complex number is a pair of them.
 * The inner loops run over channels, which are contiguous, so the compiler turns each into vector
 * code; a block of channels is short enough for what one step hands to the next to stay in the
 * first-level cache. Rows of the batch and blocks of channels are independent: threads share those.
 * No headers: any C compiler will do. */

typedef long long i64;

#define BLOCK 256 /* channels a task: 1 KiB a step in float32 */

static i64 smaller(i64 x, i64 y) { return x < y ? x : y; }

void scan_forward(const REAL *a, const REAL *b, const REAL *start, REAL *h, REAL *state,
                  i64 B, i64 T, i64 D, i64 reverse, i64 threads)
{
    i64 blocks = (D + BLOCK - 1) / BLOCK, tasks = B * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * BLOCK, n = smaller(BLOCK, D - first);
        const REAL *before = start + row * D + first; /* h of the last step, still in the cache */
        for (i64 i = 0; i < T; i++) {
            i64 t = reverse ? T - 1 - i : i, at = (row * T + t) * D + first;
            const REAL *restrict a_t = a + at, *restrict b_t = b + at;
            REAL *restrict h_t = h + at;
            for (i64 d = 0; d < n; d++) h_t[d] = a_t[d] * before[d] + b_t[d];
            before = h_t;
        }
        for (i64 d = 0; d < n; d++) state[row * D + first + d] = before[d];
    }
}

void scan_backward(const REAL *a, const REAL *h, const REAL *start, const REAL *dh,
                   const REAL *dstate, REAL *da, REAL *db, REAL *dstart,
                   i64 B, i64 T, i64 D, i64 reverse, i64 threads)
{
    i64 blocks = (D + BLOCK - 1) / BLOCK, tasks = B * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * BLOCK, n = smaller(BLOCK, D - first);
        REAL g[BLOCK];
        for (i64 d = 0; d < n; d++) g[d] = dstate[row * D + first + d];
        for (i64 i = T - 1; i >= 0; i--) {
            i64 t = reverse ? T - 1 - i : i, at = (row * T + t) * D + first;
            const REAL *restrict a_t = a + at, *restrict dh_t = dh + at;
            const REAL *restrict before =
                i == 0 ? start + row * D + first : h + at + (reverse ? D : -D);
            REAL *restrict da_t = da + at, *restrict db_t = db + at;
            for (i64 d = 0; d < n; d++) {
                REAL total = dh_t[d] + g[d];
                db_t[d] = total;
                da_t[d] = total * before[d];
                g[d] = a_t[d] * total;
            }
        }
        for (i64 d = 0; d < n; d++) dstart[row * D + first + d] = g[d];
    }
}

/* The same in complex numbers, D of them as 2 D reals: real part, imaginary part. */

void scan_complex_forward(const REAL *a, const REAL *b, const REAL *start, REAL *h, REAL *state,
                          i64 B, i64 T, i64 D, i64 reverse, i64 threads)
{
    i64 blocks = (D + BLOCK - 1) / BLOCK, tasks = B * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * BLOCK, n = smaller(BLOCK, D - first);
        const REAL *before = start + 2 * (row * D + first);
        for (i64 i = 0; i < T; i++) {
            i64 t = reverse ? T - 1 - i : i, at = 2 * ((row * T + t) * D + first);
            const REAL *restrict a_t = a + at, *restrict b_t = b + at;
            REAL *restrict h_t = h + at;
            for (i64 d = 0; d < 2 * n; d += 2) {
                REAL re = before[d], im = before[d + 1];
                h_t[d] = b_t[d] + a_t[d] * re - a_t[d + 1] * im;
                h_t[d + 1] = b_t[d + 1] + a_t[d] * im + a_t[d + 1] * re;
            }
            before = h_t;
        }
        for (i64 d = 0; d < 2 * n; d++) state[2 * (row * D + first) + d] = before[d];
    }
}

/* torch's gradient of a complex number is that of its pair of reals: conj(a) and conj(h) below. */
void scan_complex_backward(const REAL *a, const REAL *h, const REAL *start, const REAL *dh,
                           const REAL *dstate, REAL *da, REAL *db, REAL *dstart,
                           i64 B, i64 T, i64 D, i64 reverse, i64 threads)
{
    i64 blocks = (D + BLOCK - 1) / BLOCK, tasks = B * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * BLOCK, n = smaller(BLOCK, D - first);
        REAL g[2 * BLOCK];
        for (i64 d = 0; d < 2 * n; d++) g[d] = dstate[2 * (row * D + first) + d];
        for (i64 i = T - 1; i >= 0; i--) {
            i64 t = reverse ? T - 1 - i : i, at = 2 * ((row * T + t) * D + first);
            const REAL *restrict a_t = a + at, *restrict dh_t = dh + at;
            const REAL *restrict before =
                i == 0 ? start + 2 * (row * D + first) : h + at + (reverse ? 2 * D : -2 * D);
            REAL *restrict da_t = da + at, *restrict db_t = db + at;
            for (i64 d = 0; d < 2 * n; d += 2) {
                REAL re = dh_t[d] + g[d], im = dh_t[d + 1] + g[d + 1];
                db_t[d] = re;
                db_t[d + 1] = im;
                da_t[d] = re * before[d] + im * before[d + 1];
                da_t[d + 1] = im * before[d] - re * before[d + 1];
                g[d] = a_t[d] * re + a_t[d + 1] * im;
                g[d + 1] = a_t[d] * im - a_t[d + 1] * re;
            }
        }
        for (i64 d = 0; d < 2 * n; d++) dstart[2 * (row * D + first) + d] = g[d];
    }
}
