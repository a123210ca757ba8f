/* The running softmax-weighted average of RWKV-4 and its gradients, channels last.
 *
 * REAL is float or double, set by the compiler's command line. A vector holds 64 bytes of channels.
 * A task is one row of the batch and GROUP vectors; it walks blocks of STEPS tokens, and inside a
 * block one vector after the other, whose state stays in registers. Of the states only those before
 * each block are kept; the backward pass computes the others again.
 *
 * The sums are a e^m and b e^m, with m the largest exponent so far, so every exponential is of a
 * number <= 0 and one of each pair is 1. While no token sets a new maximum, m alone decays. In REAL
 * that would lose the low digits of w at every step, always the same ones: m is therefore a pair
 * hi + lo, whose lo goes over into a and b at block borders. The compiler must not reorder the sum
 * that makes the pair, nor the rounding in the exponential, so no -ffast-math.
 * No headers: any GCC or Clang will do. */

typedef long long i64;
typedef REAL v __attribute__((vector_size(64), aligned(64)));
typedef __typeof__((v){0} < (v){0}) vi;

#define LANES (64 / (i64)sizeof(REAL))
#define GROUP 16
#define STEPS 32
#define EMPTY -1e38

typedef struct { v a, b, hi, lo; } state;
typedef struct { v old, new; vi wins; } pair; /* weights of what was there and of what comes */

static i64 smaller(i64 x, i64 y) { return x < y ? x : y; }

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

static inline v choose(vi which, v yes, v no) { return (v)((which & (vi)yes) | (~which & (vi)no)); }

/* e^x for x <= 1, not below the smallest normal number; what is not a number stays so.
 * 2^n e^r with |r| <= ln(2) / 2: n by adding a number so large that nothing is left behind the
 * point, e^r by its Taylor series, whose remainder is below the last digit. */
static inline v power(v x)
{
    const int single = sizeof(REAL) == 4, terms = single ? 7 : 13;
    const v low = (v){0} - (REAL)(single ? 126 : 1022);
    const v round = (v){0} + (REAL)(single ? 12582912.0 : 6755399441055744.0); /* 1.5 2^23, 2^52 */
    v z = x * (REAL)1.4426950408889634;
    z = choose(z < low, low, z);
    v shifted = z + round, r = (z - (shifted - round)) * (REAL)0.6931471805599453;
    v p = (v){0} + (REAL)1;
    for (int i = terms; i > 0; i--) p = p * (r * (REAL)(1.0 / i)) + (REAL)1;
    return (v)((vi)p + ((vi)shifted << (single ? 23 : 52)));
}

/* e^(old - top) and e^(new - top), top the larger of the two, given new - old. */
static inline pair weigh(v difference)
{
    const v one = (v){0} + (REAL)1;
    vi wins = difference > (v){0};
    v e = power(choose(wins, -difference, difference));
    return (pair){choose(wins, e, one), choose(wins, one, e), wins};
}

static inline pair weigh_output(const state *s, v k, v u) { return weigh((k - s->hi - s->lo) + u); }

/* Take a token in. */
static inline pair step(state *s, v k, v value, v w)
{
    v t = s->lo - w, hi = s->hi + t, part = hi - s->hi;
    v lo = (s->hi - (hi - part)) + (t - part); /* what hi + t lost */
    pair e = weigh(k - hi - lo);
    s->a = e.old * s->a + e.new * value;
    s->b = e.old * s->b + e.new;
    s->hi = choose(e.wins, k, hi);
    s->lo = choose(e.wins, (v){0}, lo);
    return e;
}

/* e^lo, which a and b take over; where digits of hi are apart by more than 1, lo means nothing. */
static inline v rest(v lo)
{
    const v one = (v){0} + (REAL)1;
    return power(choose(lo > one, one, choose(lo < -one, -one, lo)));
}

static inline state read_state(const REAL *from, i64 D, i64 n)
{
    return (state){load(from, n), load(from + D, n), load(from + 2 * D, n), (v){0}};
}

static inline void write_state(state s, REAL *to, i64 D, i64 n)
{
    store(s.a, to, n);
    store(s.b, to + D, n);
    store(s.hi, to + 2 * D, n);
}

static inline void forget(state *s)
{
    s->a = s->b = s->lo = (v){0};
    s->hi = (v){0} + (REAL)EMPTY;
}

#ifndef BACKWARD
void wkv_forward(const REAL *k, const REAL *value, const REAL *w, const REAL *u, const REAL *start,
                 const char *reset, const char *mask, REAL *y, REAL *last, REAL *borders,
                 i64 B, i64 T, i64 D, i64 resets, i64 masks, i64 threads)
{
    i64 groups = (D + GROUP * LANES - 1) / (GROUP * LANES), tasks = B * groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / groups, first = task % groups * GROUP * LANES;
        i64 end = smaller(D, first + GROUP * LANES);
        state carried[GROUP];
        for (i64 d = first, g = 0; d < end; d += LANES, g++)
            carried[g] = read_state(start + row * 3 * D + d, D, smaller(LANES, D - d));
        for (i64 from = 0; from < T; from += STEPS) {
            i64 until = smaller(T, from + STEPS);
            for (i64 d = first, g = 0; d < end; d += LANES, g++) {
                i64 n = smaller(LANES, D - d);
                v w_d = load(w + d, n), u_d = load(u + d, n);
                state s = carried[g];
                write_state(s, borders + (from / STEPS * B + row) * 3 * D + d, D, n);
                for (i64 t = from; t < until; t++) {
                    i64 at = row * T + t, here = at * D + d;
                    if (masks && !mask[at]) {
                        store((v){0}, y + here, n);
                        continue;
                    }
                    if (resets && reset[at]) forget(&s);
                    v k_t = load(k + here, n), v_t = load(value + here, n);
                    pair o = weigh_output(&s, k_t, u_d);
                    store((o.old * s.a + o.new * v_t) / (o.old * s.b + o.new), y + here, n);
                    step(&s, k_t, v_t, w_d);
                }
                v scale = rest(s.lo);
                carried[g] = (state){s.a * scale, s.b * scale, s.hi, (v){0}};
            }
        }
        for (i64 d = first, g = 0; d < end; d += LANES, g++)
            write_state(carried[g], last + row * 3 * D + d, D, smaller(LANES, D - d));
    }
}
#endif

/* What the backward pass needs of a token: the sums before it and the weights of both pairs. */
typedef struct { v a, b; pair out, in; } trace;

/* The first two of dlast and dstart are gradients of a and b with p held; the third is what goes to
 * whatever gives the maximum its value. dw and du come per row of the batch: the caller adds. */
#ifndef FORWARD
void wkv_backward(const REAL *k, const REAL *value, const REAL *w, const REAL *u, const char *reset,
                  const char *mask, const REAL *borders, const REAL *dy, const REAL *dlast,
                  REAL *dk, REAL *dv, REAL *dw, REAL *du, REAL *dstart,
                  i64 B, i64 T, i64 D, i64 resets, i64 masks, i64 threads)
{
    i64 groups = (D + GROUP * LANES - 1) / (GROUP * LANES), tasks = B * groups;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / groups, first = task % groups * GROUP * LANES;
        i64 end = smaller(D, first + GROUP * LANES);
        state grad[GROUP]; /* of a, of b, of p */
        double sum_w[GROUP * LANES] = {0}, sum_u[GROUP * LANES] = {0};
        trace seen[STEPS];
        for (i64 d = first, g = 0; d < end; d += LANES, g++)
            grad[g] = read_state(dlast + row * 3 * D + d, D, smaller(LANES, D - d));
        for (i64 block = (T + STEPS - 1) / STEPS - 1; block >= 0; block--) {
            i64 from = block * STEPS, until = smaller(T, from + STEPS);
            for (i64 d = first, g = 0; d < end; d += LANES, g++) {
                i64 n = smaller(LANES, D - d);
                v w_d = load(w + d, n), u_d = load(u + d, n), part_w = {0}, part_u = {0};
                state s = read_state(borders + (block * B + row) * 3 * D + d, D, n), gs = grad[g];
                for (i64 t = from; t < until; t++) {
                    i64 at = row * T + t, here = at * D + d;
                    if (masks && !mask[at]) continue;
                    if (resets && reset[at]) forget(&s);
                    trace *x = seen + (t - from);
                    v k_t = load(k + here, n);
                    x->a = s.a, x->b = s.b;
                    x->out = weigh_output(&s, k_t, u_d);
                    x->in = step(&s, k_t, load(value + here, n), w_d);
                }
                v scale = rest(s.lo), ga = gs.a * scale, gb = gs.b * scale, gp = gs.hi;
                for (i64 t = until - 1; t >= from; t--) {
                    i64 at = row * T + t, here = at * D + d;
                    if (masks && !mask[at]) {
                        store((v){0}, dk + here, n);
                        store((v){0}, dv + here, n);
                        continue;
                    }
                    const trace *x = seen + (t - from);
                    v v_t = load(value + here, n);
                    v den = x->out.old * x->b + x->out.new;
                    v y_t = (x->out.old * x->a + x->out.new * v_t) / den;
                    v q = load(dy + here, n) / den, now = x->out.new * q;
                    v bonus = now * (v_t - y_t);
                    part_u += bonus;
                    store(now + x->in.new * ga, dv + here, n);
                    store(bonus + x->in.new * (ga * v_t + gb) + choose(x->in.wins, gp, (v){0}),
                          dk + here, n);
                    gp = choose(x->in.wins, (v){0}, gp);
                    ga *= x->in.old;
                    gb *= x->in.old;
                    part_w -= ga * x->a + gb * x->b + gp;
                    ga += x->out.old * q;
                    gb -= x->out.old * q * y_t;
                    if (resets && reset[at]) ga = gb = gp = (v){0};
                }
                grad[g] = (state){ga, gb, gp, (v){0}};
                for (i64 i = 0; i < n; i++) {
                    sum_w[g * LANES + i] += part_w[i];
                    sum_u[g * LANES + i] += part_u[i];
                }
            }
        }
        for (i64 d = first, g = 0; d < end; d += LANES, g++)
            write_state(grad[g], dstart + row * 3 * D + d, D, smaller(LANES, D - d));
        for (i64 d = first; d < end; d++) {
            dw[row * D + d] = (REAL)sum_w[d - first];
            du[row * D + d] = (REAL)sum_u[d - first];
        }
    }
}
#endif
