/* What several native kernels share: vectors, their exponentials, and products of small matrices.
 *
 * REAL is float or double, set by the compiler's command line. Matrices are row-major, each with the
 * distance between its rows; sizes are free, and nothing outside a matrix is written. A product
 * holds four rows of C and up to WIDE vectors of its columns in registers. No headers: any GCC or
 * Clang will do. */

typedef long long i64;
typedef REAL v __attribute__((vector_size(64), aligned(64)));
typedef REAL four __attribute__((vector_size(4 * sizeof(REAL))));
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 4, 0, 0LL)) whole; /* as wide as REAL */
typedef whole places __attribute__((vector_size(4 * sizeof(whole))));
typedef whole vi __attribute__((vector_size(64), aligned(64)));
typedef REAL half __attribute__((vector_size(32)));
typedef REAL quarter __attribute__((vector_size(16)));

#define LANES (64 / (i64)sizeof(REAL))
#define INLINE static inline __attribute__((always_inline, unused))
#ifdef __clang__
#define ONCE static __attribute__((noinline, unused)) /* copies would cost time to compile */
#else
#define ONCE static __attribute__((noinline, noclone, unused))
#endif

#ifdef __AVX512F__
#define WIDE 4 /* vectors: 4 x 4 of them in 32 registers */
#else
#define WIDE 1 /* 64 bytes are two registers or four */
#endif

#ifdef __clang__
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) __builtin_shuffle(x, y, (places){__VA_ARGS__})
#endif

INLINE i64 smaller(i64 x, i64 y) { return x < y ? x : y; }

INLINE v load(const REAL *from)
{
    v x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(v x, REAL *to) { __builtin_memcpy(to, &x, sizeof x); }

INLINE v choose(vi which, v yes, v no) { return (v)((which & (vi)yes) | (~which & (vi)no)); }

INLINE REAL across(v x)
{
    half x0, x1;
    quarter y0, y1;
    __builtin_memcpy(&x0, &x, sizeof x0);
    __builtin_memcpy(&x1, (char *)&x + sizeof x0, sizeof x1);
    x0 += x1;
    __builtin_memcpy(&y0, &x0, sizeof y0);
    __builtin_memcpy(&y1, (char *)&x0 + sizeof y0, sizeof y1);
    y0 += y1;
    REAL sum = y0[0];
    for (i64 i = 1; i < LANES / 4; i++) sum += y0[i];
    return sum;
}

/* 2^lift e^x of n numbers, of whole vectors: within one unit in the last place, also where that is
 * below the smallest normal number; 0 where e^x is (at -inf), and not a number stays so. e^x is
 * 2^n e^r, |r| <= ln(2) / 2: n is rounded by a large constant (no -ffast-math, which would undo
 * that), e^r is Taylor's polynomial, 2^n comes in two halves. */
#define SMALL (sizeof(REAL) == 4)
ONCE void exponentials(const REAL *from, REAL *to, i64 n, i64 lift)
{
    static const REAL factors[] = {1, 1, 1 / 2., 1 / 6., 1 / 24., 1 / 120., 1 / 720., 1 / 5040.,
        1 / 40320., 1 / 362880., 1 / 3628800., 1 / 39916800., 1 / 479001600.};
    const v round = (v){0} + (REAL)(SMALL ? 0x1.8p23 : 0x1.8p52), high = (v){0} + (SMALL ? 89 : 710);
    const int bias = SMALL ? 127 : 1023, place = SMALL ? 23 : 52;
    for (i64 at = 0; at < n; at += LANES) {
        v x = load(from + at);
        vi none = x < (REAL)(SMALL ? -104 : -746);
        x = choose(none, (v){0}, choose(x > high, high, x));
        v shifted = x * (REAL)1.4426950408889634 + round, whole_part = shifted - round;
        v r = x - whole_part * (REAL)0x1.62e4p-1, p = (v){0} + factors[SMALL ? 7 : 12];
        r -= whole_part * (REAL)0x1.7f7d1cf79abcap-20;
        for (int i = SMALL ? 6 : 11; i >= 0; i--) p = p * r + factors[i];
        vi power = (vi)shifted - (vi)round + (whole)lift, first = power >> 1, second = power - first;
        p *= (v)((first + bias) << place);
        store(choose(none, (v){0}, p * (v)((second + bias) << place)), to + at);
    }
}

/* Rows of n numbers; with columns beyond n up to `zeros` made zero. */
ONCE void copy(i64 rows, i64 n, i64 zeros, const REAL *restrict from, i64 from_row,
               REAL *restrict to, i64 to_row)
{
    for (i64 i = 0; i < rows; i++, from += from_row, to += to_row) {
        __builtin_memcpy(to, from, n * sizeof(REAL));
        if (n < zeros) __builtin_memset(to + n, 0, (zeros - n) * sizeof(REAL));
    }
}

/* C = A B, or C += add A B where that is not 0, for 1 to 4 rows and `wide` vectors of columns; A(i, s) stands at i * a_row +
 * s * a_col. Rows that are not there repeat the last one that is. */
INLINE void tile(i64 rows, i64 depth, const REAL *A, i64 a_row, i64 a_col, const REAL *B,
                 i64 b_row, REAL *C, i64 c_row, REAL add, const int wide)
{
    i64 second = smaller(1, rows - 1), third = smaller(2, rows - 1), fourth = rows - 1;
    const REAL *A1 = A + second * a_row, *A2 = A + third * a_row, *A3 = A + fourth * a_row;
    REAL *C1 = C + second * c_row, *C2 = C + third * c_row, *C3 = C + fourth * c_row;
    v c0[WIDE], c1[WIDE], c2[WIDE], c3[WIDE];
    for (int w = 0; w < wide; w++) c0[w] = c1[w] = c2[w] = c3[w] = (v){0};
    for (i64 s = 0; s < depth; s++, B += b_row) {
        REAL x0 = A[s * a_col], x1 = A1[s * a_col], x2 = A2[s * a_col], x3 = A3[s * a_col];
        for (int w = 0; w < wide; w++) {
            v b = load(B + w * LANES);
            c0[w] += x0 * b;
            c1[w] += x1 * b;
            c2[w] += x2 * b;
            c3[w] += x3 * b;
        }
    }
    for (int w = 0; add && w < wide; w++) {
        i64 at = w * LANES;
        c0[w] = load(C + at) + add * c0[w], c1[w] = load(C1 + at) + add * c1[w];
        c2[w] = load(C2 + at) + add * c2[w], c3[w] = load(C3 + at) + add * c3[w];
    }
    for (int w = 0; w < wide; w++) {
        i64 at = w * LANES;
        store(c0[w], C + at), store(c1[w], C1 + at), store(c2[w], C2 + at), store(c3[w], C3 + at);
    }
}

#define DEEP 64 /* rows of B whose last, incomplete vectors are copied at a time */

/* C = A B, or C += add A B where that is not 0. C is rows x columns; A(i, s) stands at i * a_row +
 * s * a_col: A is what lies there, rows x depth, with a_col = 1, and its transpose with a_row = 1.
 * B is depth x columns. */
ONCE void product(i64 rows, i64 columns, i64 depth, const REAL *A, i64 a_row, i64 a_col,
                  const REAL *B, i64 b_row, REAL *C, i64 c_row, REAL add)
{
    i64 j = 0, rest = columns % LANES;
    for (; WIDE > 1 && j + WIDE * LANES <= columns; j += WIDE * LANES)
        for (i64 i = 0; i < rows; i += 4)
            tile(smaller(4, rows - i), depth, A + i * a_row, a_row, a_col, B + j, b_row,
                 C + i * c_row + j, c_row, add, WIDE);
    for (; j < columns - rest; j += LANES)
        for (i64 i = 0; i < rows; i += 4)
            tile(smaller(4, rows - i), depth, A + i * a_row, a_row, a_col, B + j, b_row,
                 C + i * c_row + j, c_row, add, 1);
    if (!rest) return;
    REAL b[DEEP * LANES], c[4 * LANES];
    for (i64 s = 0; s == 0 || s < depth; s += DEEP) {
        i64 deep = smaller(DEEP, depth - s);
        copy(deep, rest, LANES, B + s * b_row + j, b_row, b, LANES);
        for (i64 i = 0; i < rows; i += 4) {
            i64 here = smaller(4, rows - i);
            REAL *C_i = C + i * c_row + j;
            copy(here, rest, LANES, C_i, c_row, c, LANES);
            tile(here, deep, A + i * a_row + s * a_col, a_row, a_col, b, LANES, c, LANES,
                 s && !add ? 1 : add, 1);
            copy(here, rest, rest, c, LANES, C_i, c_row);
        }
    }
}

/* to (columns x rows) = the transpose of from (rows x columns). */
ONCE void transpose(i64 rows, i64 columns, const REAL *restrict from, i64 from_row,
                    REAL *restrict to, i64 to_row)
{
    i64 i = 0;
    for (; i + 4 <= rows; i += 4)
        for (i64 j = 0; j + 4 <= columns; j += 4) {
            const REAL *x = from + i * from_row + j;
            REAL *y = to + j * to_row + i;
            four a, b, c, d;
            __builtin_memcpy(&a, x, sizeof a), __builtin_memcpy(&b, x + from_row, sizeof b);
            x += 2 * from_row;
            __builtin_memcpy(&c, x, sizeof c), __builtin_memcpy(&d, x + from_row, sizeof d);
            four ab = PICK(a, b, 0, 4, 1, 5), AB = PICK(a, b, 2, 6, 3, 7);
            four cd = PICK(c, d, 0, 4, 1, 5), CD = PICK(c, d, 2, 6, 3, 7);
            a = PICK(ab, cd, 0, 1, 4, 5), b = PICK(ab, cd, 2, 3, 6, 7);
            c = PICK(AB, CD, 0, 1, 4, 5), d = PICK(AB, CD, 2, 3, 6, 7);
            __builtin_memcpy(y, &a, sizeof a), __builtin_memcpy(y + to_row, &b, sizeof b);
            y += 2 * to_row;
            __builtin_memcpy(y, &c, sizeof c), __builtin_memcpy(y + to_row, &d, sizeof d);
        }
    for (i64 k = 0; k < rows; k++) /* what no block of 4 x 4 holds */
        for (i64 j = k < i ? columns - columns % 4 : 0; j < columns; j++)
            to[j * to_row + k] = from[k * from_row + j];
}
