/* Decayed linear attention and its gradients in chunks, channels last; after weights.c.
 *
 * A task is a row of the batch and some of the value heads that share a key head; their states stay
 * in the cache from chunk to chunk. Everything of a chunk is copied into scratch, with tokens padded
 * to BLOCK and channels to whole vectors by zeros, and is then products of small matrices. */

/* What a call works on. A task's tokens of keys stand at key + t * key_row, and so on. */
typedef struct {
    i64 T, shared, K, V, channels, key_row, value_row, decay_row;
} sizes;

/* Queries, keys and P of a chunk of n tokens. */
ONCE void read_keys(scratch *s, const sizes *z, const REAL *q, const REAL *k, i64 n)
{
    s->m = padded(n, BLOCK);
    read_tokens(q, z->key_row, n, z->K, s->q, s->m, s->K);
    read_tokens(k, z->key_row, n, z->K, s->k, s->m, s->K);
    if (z->channels) return;
    transpose(s->m, s->K, s->k, s->K, s->turned, CHUNK);
    lower(s->m, s->K, s->q, s->K, s->turned, s->P);
}

/* A and decayed queries and keys of one head; and from dA gradients where `back` says so. */
ONCE void weigh(scratch *s, const sizes *z, const REAL *g, i64 n, int back)
{
    if (z->channels) {
        read_tokens(g, z->decay_row, n, z->K, s->g, s->m, s->K);
        fill(s->A, s->m * CHUNK, 0);
        channel_weights(s, back);
    } else {
        REAL one[CHUNK];
        copy(n, 1, 1, g, z->decay_row, one, 1);
        for (i64 i = n; i < s->m; i++) one[i] = 0;
        head_weights(s, one);
        if (back) head_weights_back(s);
    }
    times(s->q, s->since, s->qs, s->m * s->K);
    times(s->k, s->until, s->ks, s->m * s->K);
}

/* x (K x V) *= factor of its row. */
ONCE void shrink(REAL *x, const REAL *factor, i64 K, i64 V)
{
    for (i64 k = 0; k < K; k++)
        for (i64 j = 0; j < V; j += LANES) store(factor[k] * load(x + k * V + j), x + k * V + j);
}

ONCE void forward_task(scratch *s, const sizes *z, const REAL *q, const REAL *k,
                         const REAL *values, const REAL *g, const REAL *start, REAL *o, REAL *states, i64 step)
{
    i64 K = s->K, V = s->V, state = z->K * z->V, decays = z->channels ? z->K : 1;
    for (i64 r = 0; r < z->shared; r++) {
        REAL *S = s->states + r * K * V;
        copy(z->K, z->V, V, start + r * state, z->V, S, V);
        fill(S + z->K * V, (K - z->K) * V, 0);
        copy(z->K, z->V, z->V, S, V, states + r * state, z->V);
    }
    for (i64 t = 0; t < z->T; t += CHUNK) {
        i64 n = smaller(CHUNK, z->T - t);
        read_keys(s, z, q + t * z->key_row, k + t * z->key_row, n);
        states += step;
        for (i64 r = 0; r < z->shared; r++) {
            REAL *S = s->states + r * K * V;
            i64 at = t * z->value_row + r * z->V;
            read_tokens(values + at, z->value_row, n, z->V, s->v, s->m, V);
            weigh(s, z, g + t * z->decay_row + r * decays, n, 0);
            fill(s->o, s->m * V, 0);
            product(s->m, V, K, s->qs, K, 1, S, V, s->o, V, DROP);
            lower_times(s->m, s->A, s->v, s->o, V, DROP);
            copy(n, z->V, z->V, s->o, V, o + at, z->value_row);
            shrink(S, s->total, K, V);
            product(K, V, s->m, s->ks, 1, K, s->v, V, S, V, DROP);
            copy(z->K, z->V, z->V, S, V, states + r * state, z->V);
        }
    }
}

ONCE void backward_task(scratch *s, const sizes *z, const REAL *q, const REAL *k,
                          const REAL *values, const REAL *g, const REAL *states, const REAL *o, const REAL *dstate,
                          REAL *dq, REAL *dk, REAL *dv, REAL *dg, REAL *dstart, i64 step)
{
    i64 K = s->K, V = s->V, state = z->K * z->V, decays = z->channels ? z->K : 1;
    for (i64 r = 0; r < z->shared; r++) {
        copy(z->K, z->V, V, dstate + r * state, z->V, s->states + r * K * V, V);
        fill(s->states + (r * K + z->K) * V, (K - z->K) * V, 0);
    }
    fill(s->turned_S, V * K, 0);
    for (i64 t = (z->T - 1) / CHUNK * CHUNK; t >= 0; t -= CHUNK) {
        i64 n = smaller(CHUNK, z->T - t), keys = t * z->key_row;
        read_keys(s, z, q + keys, k + keys, n);
        i64 m = s->m;
        fill(s->dq, m * K, 0), fill(s->dk, m * K, 0), fill(s->dP, m * CHUNK, 0);
        for (i64 r = 0; r < z->shared; r++) {
            REAL *dS = s->states + r * K * V;
            i64 at = t * z->value_row + r * z->V, to = t * z->decay_row + r * decays;
            read_tokens(values + at, z->value_row, n, z->V, s->v, m, V);
            read_tokens(o + at, z->value_row, n, z->V, s->o, m, V);
            transpose(m, V, s->v, V, s->turned, CHUNK);
            lower(m, V, s->o, V, s->turned, s->dA);
            fill(s->dg, m * K, 0);
            weigh(s, z, g + to, n, 1);
            fill(s->dv, m * V, 0);
            upper_times(m, s->A, s->o, s->dv, V, DROP);
            product(m, V, K, s->ks, K, 1, dS, V, s->dv, V, DROP);
            copy(n, z->V, z->V, s->dv, V, dv + at, z->value_row);
            transpose(z->K, z->V, states + t / CHUNK * step + r * state, z->V, s->turned_S, K);
            transpose(K, V, dS, V, s->turned_dS, K);
            for (i64 c = 0; c < K; c += LANES) {
                v sum = {0};
                for (i64 i = c; i < V * K; i += K) sum += load(s->turned_S + i) * load(s->turned_dS + i);
                store(sum * load(s->total + c), s->dtotal + c);
            }
            product(m, K, V, s->o, V, 1, s->turned_S, K, s->d, K, 0);
            spread_since(m, K, s->d, s->qs, s->since, s->dtotal, s->dq, s->dg, DROP);
            product(m, K, V, s->v, V, 1, s->turned_dS, K, s->d, K, 0);
            spread_until(m, K, s->d, s->ks, s->until, s->dk, s->dg, DROP);
            shrink(dS, s->total, K, V);
            product(K, V, m, s->qs, 1, K, s->o, V, dS, V, DROP);
            if (z->channels) copy(n, z->K, z->K, s->dg, K, dg + to, z->decay_row);
            for (i64 i = 0; i < n && !z->channels; i++) {
                v sum = {0};
                for (i64 c = 0; c < K; c += LANES) sum += load(s->dg + i * K + c);
                dg[to + i * z->decay_row] = across(sum);
            }
        }
        if (!z->channels) {
            lower_times(m, s->dP, s->k, s->dq, K, DROP);
            upper_times(m, s->dP, s->q, s->dk, K, DROP);
        }
        copy(n, z->K, z->K, s->dq, K, dq + keys, z->key_row);
        copy(n, z->K, z->K, s->dk, K, dk + keys, z->key_row);
    }
    for (i64 r = 0; r < z->shared; r++)
        copy(z->K, z->V, z->V, s->states + r * K * V, V, dstart + r * state, z->V);
}

/* q, k (B, T, Hk, K); v, o (B, T, Hk R, V); g (B, T, Hk R, 1 or K); states (chunks + 1, B, Hk R, K,
 * V). A task has up to `per` of the R heads that share a key; gradients of q and k come for each of
 * a key's tasks, dq, dk (tasks, B, T, Hk, K). `start` and `dstart` are states. `room` has, for each
 * worker, what decay_room says. */
#define EACH_TASK                                                                                 \
    i64 H = Hk * R, parts = (R + per - 1) / per, each, state = K * V, step = B * H * state;       \
    decay_room(&each, K, V, per);                                                                 \
    _Pragma("omp parallel for num_threads(workers) schedule(static)")                             \
    for (i64 worker = 0; worker < workers; worker++)                                              \
        for (i64 task = worker; task < B * Hk * parts; task += workers) {                         \
            i64 part = task % parts, key = task / parts % Hk, row = task / parts / Hk;            \
            i64 shared = smaller(per, R - part * per), head = key * R + part * per;               \
            i64 keys = (row * T * Hk + key) * K, heads = row * T * H + head;                      \
            i64 there = (row * H + head) * state, ones = heads * (channels ? K : 1);              \
            sizes z = {T, shared, K, V, channels, Hk * K, H * V, H * (channels ? K : 1)};         \
            scratch s;                                                                            \
            divide(&s, room + worker * each, K, V, per);

#ifndef BACKWARD
void decay_forward(const REAL *q, const REAL *k, const REAL *v, const REAL *g, const REAL *start,
                   REAL *o, REAL *states, REAL *room, i64 B, i64 T, i64 Hk, i64 R, i64 K, i64 V,
                   i64 channels, i64 per, i64 workers)
{
    EACH_TASK
        forward_task(&s, &z, q + keys, k + keys, v + heads * V, g + ones, start + there,
                     o + heads * V, states + there, step);
    }
}
#endif

#ifndef FORWARD
void decay_backward(const REAL *q, const REAL *k, const REAL *v, const REAL *g, const REAL *states,
                    const REAL *o, const REAL *dstate, REAL *dq, REAL *dk, REAL *dv, REAL *dg,
                    REAL *dstart, REAL *room, i64 B, i64 T, i64 Hk, i64 R, i64 K, i64 V,
                    i64 channels, i64 per, i64 workers)
{
    EACH_TASK
        i64 out = part * B * T * Hk * K + keys;
        backward_task(&s, &z, q + keys, k + keys, v + heads * V, g + ones, states + there,
                      o + heads * V, dstate + there, dq + out, dk + out, dv + heads * V, dg + ones,
                      dstart + there, step);
    }
}
#endif
