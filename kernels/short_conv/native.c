/* The causal convolution of W taps and its gradients, channels last.
 *
 * REAL is float or double, set by the compiler's command line; W is defined in front of this text.
 * A task is one row of the batch and GROUP vectors of channels; it walks the tokens in order with W
 * pointers to the newest inputs, oldest first. They begin in the tail of the pass before; a reset
 * points all of them at zeros, a masked token moves none. The backward pass walks the same way and
 * adds each output's gradient to the W inputs it saw, whose gradients are still in the cache.
 * No headers: any GCC or Clang will do. */

typedef long long i64;
typedef REAL v __attribute__((vector_size(64), aligned(64)));
typedef __typeof__((v){0} < (v){0}) vi;

#define LANES (64 / (i64)sizeof(REAL))
#define GROUP 16
#define CHANNELS (GROUP * LANES)
#define STEPS 64 /* tokens whose products are summed before they join the total: less rounding */

static const REAL zeros[CHANNELS];

static inline i64 smaller(i64 x, i64 y) { return x < y ? x : y; }

static inline v load(const REAL *from, i64 n)
{
    v x = {0};
    if (n == LANES) __builtin_memcpy(&x, from, sizeof x);
    else for (i64 i = 0; i < n; i++) x[i] = from[i];
    return x;
}

static inline void store(v x, REAL *to, i64 n)
{
    if (n == LANES) __builtin_memcpy(to, &x, sizeof x);
    else for (i64 i = 0; i < n; i++) to[i] = x[i];
}

static inline void copy(const REAL *from, REAL *to, i64 n)
{
    for (i64 i = 0; i < n; i++) to[i] = from[i];
}

static inline v choose(vi which, v yes, v no) { return (v)((which & (vi)yes) | (~which & (vi)no)); }

/* 1 / (1 + e^-z) by way of e^-|z| = 2^n e^r with |r| <= ln(2) / 2: n by adding a number so large that
 * nothing is left behind the point, e^r by its Taylor series, whose remainder is below the last
 * digit. Not a number stays so in z * sigmoid(z). */
static inline v sigmoid(v z)
{
    const int single = sizeof(REAL) == 4, terms = single ? 7 : 13;
    const v low = (v){0} - (REAL)(single ? 126 : 1022), one = (v){0} + (REAL)1;
    const v round = (v){0} + (REAL)(single ? 12582912.0 : 6755399441055744.0); /* 1.5 2^23, 2^52 */
    v x = choose(z < 0, z, -z) * (REAL)1.4426950408889634;
    v shifted = x + round, r = (x - (shifted - round)) * (REAL)0.6931471805599453, p = one;
    for (int i = terms; i > 0; i--) p = p * (r * (REAL)(1.0 / i)) + one;
    v e = choose(x > low, (v)((vi)p + ((vi)shifted << (single ? 23 : 52))), (v){0});
    return choose(z < 0, e, one) / (one + e);
}

/* n channels of one token before the activation. */
static inline v sum(const REAL *const *row, const REAL *weight, const REAL *bias, i64 c, i64 D, i64 n)
{
    v z = load(bias + c, n);
    for (i64 j = 0; j < W; j++) z += load(weight + j * D + c, n) * load(row[j] + c, n);
    return z;
}

void short_conv_forward(const REAL *x, const REAL *weight, const REAL *bias, const REAL *start,
                        const char *reset, const char *mask, REAL *y, REAL *tail, i64 B, i64 T,
                        i64 D, i64 silu, i64 threads)
{
    i64 groups = (D + CHANNELS - 1) / CHANNELS, tasks = B * groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 b = task / groups, first = task % groups * CHANNELS, n = smaller(CHANNELS, D - first);
        i64 whole = n - n % LANES, past = b * (W - 1) * D + first;
        const REAL *row[W], *w = weight + first;
        for (i64 j = 1; j < W; j++) row[j] = start + past + (j - 1) * D;
        for (i64 t = 0; t < T; t++) {
            i64 at = (b * T + t) * D + first;
            if (mask && !mask[b * T + t]) {
                copy(zeros, y + at, n);
                continue;
            }
            for (i64 j = 1; j < W; j++) row[j - 1] = reset && reset[b * T + t] ? zeros : row[j];
            row[W - 1] = x + at;
            for (i64 c = 0; c < whole; c += LANES) {
                v z = sum(row, w, bias + first, c, D, LANES);
                store(silu ? z * sigmoid(z) : z, y + at + c, LANES);
            }
            if (whole < n) {
                v z = sum(row, w, bias + first, whole, D, n - whole);
                store(silu ? z * sigmoid(z) : z, y + at + whole, n - whole);
            }
        }
        for (i64 j = 1; j < W; j++) copy(row[j], tail + past + (j - 1) * D, n);
    }
}

/* What one output's gradient dy adds to those of the inputs it saw and, in `part`, of weights, bias. */
static inline void spread(const REAL *const *row, REAL *const *drow, const REAL *weight,
                          const REAL *bias, const REAL *dy, v *part, i64 c, i64 D, i64 n, i64 silu)
{
    v dz = load(dy + c, n);
    if (silu) {
        v z = sum(row, weight, bias, c, D, n), s = sigmoid(z);
        dz *= s * ((REAL)1 + z * ((REAL)1 - s));
    }
    for (i64 j = 0; j < W; j++) {
        part[j] += dz * load(row[j] + c, n);
        v before = j < W - 1 ? load(drow[j] + c, n) : (v){0};
        store(before + dz * load(weight + j * D + c, n), drow[j] + c, n);
    }
    part[W] += dz;
}

/* dweight comes per row of the batch, with the gradient of the bias as its last line. */
void short_conv_backward(const REAL *x, const REAL *weight, const REAL *bias, const REAL *start,
                         const char *reset, const char *mask, const REAL *dy, const REAL *dtail,
                         REAL *dx, REAL *dweight, REAL *dstart, i64 B, i64 T, i64 D, i64 silu,
                         i64 threads)
{
    i64 groups = (D + CHANNELS - 1) / CHANNELS, tasks = B * groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 b = task / groups, first = task % groups * CHANNELS, n = smaller(CHANNELS, D - first);
        i64 whole = n - n % LANES, past = b * (W - 1) * D + first;
        v part[GROUP][W + 1] = {0}, total[GROUP][W + 1] = {0};
        REAL nowhere[CHANNELS] = {0}, *drow[W];
        const REAL *row[W], *w = weight + first;
        for (i64 j = 1; j < W; j++) {
            row[j] = start + past + (j - 1) * D;
            drow[j] = dstart + past + (j - 1) * D;
            copy(zeros, drow[j], n);
        }
        for (i64 t = 0; t < T; t++) {
            i64 at = (b * T + t) * D + first;
            if (mask && !mask[b * T + t]) {
                copy(zeros, dx + at, n);
                continue;
            }
            for (i64 j = 1; j < W; j++) {
                row[j - 1] = reset && reset[b * T + t] ? zeros : row[j];
                drow[j - 1] = reset && reset[b * T + t] ? nowhere : drow[j];
            }
            row[W - 1] = x + at, drow[W - 1] = dx + at;
            for (i64 c = 0; c < whole; c += LANES)
                spread(row, drow, w, bias + first, dy + at, part[c / LANES], c, D, LANES, silu);
            if (whole < n)
                spread(row, drow, w, bias + first, dy + at, part[whole / LANES], whole, D,
                       n - whole, silu);
            if (t % STEPS == STEPS - 1)
                for (i64 g = 0; g < GROUP; g++)
                    for (i64 j = 0; j <= W; j++) {
                        total[g][j] += part[g][j];
                        part[g][j] = (v){0};
                    }
        }
        for (i64 j = 1; j < W; j++)
            for (i64 c = 0; c < n; c++) drow[j][c] += dtail[past + (j - 1) * D + c];
        for (i64 c = 0; c < n; c += LANES)
            for (i64 j = 0; j <= W; j++) {
                v both = total[c / LANES][j] + part[c / LANES][j];
                store(both, dweight + (b * (W + 1) + j) * D + first + c, smaller(LANES, n - c));
            }
    }
}
