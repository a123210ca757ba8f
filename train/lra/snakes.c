/* Pathfinder's two targets, begun again until both are whole: `Snakes.targets` of snakes.py, number
 * by number. All tables and boards are whole numbers, and so is the random stream, so both give the
 * same snakes. REAL, which every native source of seqzoo is given, is not used. No headers. */

typedef long long i64;
typedef unsigned long long u64;
typedef short i16;
typedef struct { i64 y, x, h, w, at; } patch;
typedef struct { i64 y, x, pivot_y, pivot_x, before, which; } snake;

enum { COUNT, SIDE, LOW, HIGH, DASHES, APART, TRIES, CROWDED, DEAD_END };

typedef struct {
    const i64 *rules, *ends, *steps, *weight, *seeds, *first, *places, *around;
    const patch *patches; /* two of each dash: mask and halo */
    const i16 *pixels, *empty; /* mask and open of the empty board */
    i16 *boards;               /* mask and open of each target's board */
    u64 *state;
} world;

static i64 below(world *g, i64 n)
{
    u64 z = *g->state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (i64)((((z ^ (z >> 31)) >> 32) * (u64)n) >> 32);
}

static i64 plane(const world *g) { return g->rules[SIDE] * g->rules[SIDE]; }

static i64 corner(const world *g, const patch *p, i64 y, i64 x)
{
    return (y + p->y) * g->rules[SIDE] + x + p->x;
}

static int fits(const world *g, const i16 *board, i64 which, i64 y, i64 x)
{
    const patch *p = g->patches + 2 * which;
    const i16 *row = board + corner(g, p, y, x), *own = g->pixels + p->at;
    i16 most = 0;
    for (i64 i = 0; i < p->h; i++, row += g->rules[SIDE], own += p->w)
        for (i64 j = 0; j < p->w; j++) {
            i16 sum = (i16)(row[j] + own[j]);
            most = sum > most ? sum : most;
        }
    return most < g->rules[CROWDED];
}

/* Take the room of a dash, or with `undo` make a board there what it was when empty. */
static void put(const world *g, i16 *board, i64 which, i64 y, i64 x, int undo)
{
    for (i64 half = 0; half < 2; half++) {
        const patch *p = g->patches + 2 * which + half;
        i64 at = half * plane(g) + corner(g, p, y, x);
        i16 *row = board + at;
        const i16 *own = g->pixels + p->at, *was = g->empty + at;
        for (i64 i = 0; i < p->h; i++, row += g->rules[SIDE], was += g->rules[SIDE], own += p->w)
            for (i64 j = 0; j < p->w; j++) {
                i16 room = (i16)(255 - own[j]);
                if (undo) row[j] = was[j];
                else if (half) row[j] = row[j] < room ? row[j] : room;
                else row[j] = row[j] > own[j] ? row[j] : own[j];
            }
    }
}

static int inside(const world *g, i64 y, i64 x)
{
    i64 low = g->rules[LOW], high = g->rules[HIGH];
    return low <= y && y < high && low <= x && x < high;
}

/* A first dash; 0 when its tip, head or pivot is not in the image. */
static int begin(const world *g, snake *s, i64 degree, i64 y, i64 x)
{
    const i64 *seed = g->seeds + 4 * degree;
    i64 which = g->rules[COUNT] + degree;
    if (!inside(g, y, x) || !inside(g, y + seed[0], x + seed[1])) return 0;
    if (!inside(g, y + seed[2], x + seed[3])) return 0;
    *s = (snake){y, x, y + seed[2] + g->steps[2 * which], x + seed[3] + g->steps[2 * which + 1],
                 which, which};
    return 1;
}

static int two_seeds(world *g, snake *s)
{
    i64 tries = g->rules[TRIES], found = 0;
    for (i64 i = 0; i < tries && !found; i++) {
        i64 degree = below(g, 360), count = g->first[degree + 1] - g->first[degree];
        if (!count) return 0;
        i64 place = g->places[g->first[degree] + below(g, count)];
        found = begin(g, s, degree, place / g->rules[SIDE], place % g->rules[SIDE]);
    }
    if (!found) return 0;
    for (i64 i = 0; i < tries; i++) {
        i64 degree = below(g, 360);
        const i64 *around = g->around + 2 * below(g, 360);
        if (begin(g, s + 1, degree, s->y + around[0], s->x + around[1])) return 1;
    }
    return 0;
}

static int extend(world *g, i16 *board, snake *s)
{
    i64 count = g->rules[COUNT], total = 0;
    const i64 *weight = g->weight + s->before * count;
    const i16 *open = board + plane(g);
    for (i64 c = 0; c < count; c++)
        total += weight[c] *
                 open[(s->pivot_y + g->ends[2 * c]) * g->rules[SIDE] + s->pivot_x + g->ends[2 * c + 1]];
    if (total < g->rules[DEAD_END]) return 0;
    for (i64 i = 0; i < g->rules[TRIES]; i++) {
        i64 draw = below(g, total), reached = 0, c = 0;
        for (;; c++) {
            i64 y = s->pivot_y + g->ends[2 * c], x = s->pivot_x + g->ends[2 * c + 1];
            reached += weight[c] * open[y * g->rules[SIDE] + x];
            if (reached > draw) break;
        }
        i64 y = s->pivot_y + g->ends[2 * c], x = s->pivot_x + g->ends[2 * c + 1];
        if (!fits(g, board, c, y, x)) continue;
        put(g, board, s->which, s->y, s->x, 0);
        *s = (snake){y, x, s->pivot_y + g->steps[2 * c], s->pivot_x + g->steps[2 * c + 1], c, c};
        return 1;
    }
    return 0;
}

static void note(i64 *dashes, i64 *n, i64 number, const snake *s)
{
    i64 row[4] = {number, s->y, s->x, s->which};
    for (i64 i = 0; i < 4; i++) dashes[4 * *n + i] = row[i];
    ++*n;
}

/* One attempt; `n` dashes are written whether it succeeds or not. */
static int attempt(world *g, i64 *dashes, i64 *n)
{
    snake s[2];
    i64 apart = g->rules[APART];
    i16 *own[2] = {g->boards, g->boards + apart * 2 * plane(g)};
    *n = 0;
    if (!two_seeds(g, s)) return 0;
    for (i64 i = 0; i < 2; i++) note(dashes, n, i + 1, s + i);
    if (apart) {
        for (i64 i = 0; i < 2; i++) put(g, own[1 - i], s[i].which, s[i].y, s[i].x, 0);
        if (!fits(g, own[0], s[0].which, s[0].y, s[0].x)) return 0;
    }
    for (i64 round = 1; round < g->rules[DASHES]; round++)
        for (i64 i = 0; i < 2; i++) {
            if (!extend(g, own[i], s + i)) return 0;
            note(dashes, n, i + 1, s + i);
            if (apart) put(g, own[1 - i], s[i].which, s[i].y, s[i].x, 0);
        }
    const snake *last = s + !apart; /* as published, that of the first takes no room */
    put(g, own[0], last->which, last->y, last->x, 0);
    return 1;
}

/* The boards come empty; the first leaves with both targets on it, the second is not to be used. */
void seqzoo_targets(const i64 *rules, const i64 *ends, const i64 *steps, const i64 *weight,
                    const i64 *seeds, const i64 *first, const i64 *places, const i64 *around,
                    const i64 *patches, const i16 *pixels, const i16 *empty, i16 *boards,
                    u64 *state, i64 *dashes)
{
    world g = {rules, ends, steps, weight, seeds, first, places, around,
               (const patch *)patches, pixels, empty, boards, state};
    i64 n;
    while (!attempt(&g, dashes, &n))
        for (i64 i = 0; i < n; i++)
            for (i64 b = 0; b < 1 + rules[APART]; b++)
                put(&g, boards + b * 2 * plane(&g), dashes[4 * i + 3], dashes[4 * i + 1],
                    dashes[4 * i + 2], 1);
}
