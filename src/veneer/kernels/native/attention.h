/* Attention by tiles, without a mask: scores stay in float, and near the core that computes them.

   Heads are next to each other, those of a group served by the same keys and values. Arrays have strides by row, head
   and place; width is a multiple of 32. Causal queries are as many as keys, that of place i sees those up to i. */

enum { BLOCK = 4 * SIDE };

typedef struct {
    bfloat16 *at;
    const size *of;
} Heads;

static inline bfloat16 *head_of(Heads x, size row, size head) { return x.at + row * x.of[0] + head * x.of[1]; }

/* A head as a right: its places are columns, or the depth. */
static inline Term across(const bfloat16 *at, size of, size places, size width) {
    return (Term){NULL, 0, at, of, 0, 0, width, places};
}

static inline Term along(const bfloat16 *at, size of, size places, size width) {
    return (Term){NULL, 0, at, of, 0, 1, places, width};
}

/* Places of a head beside each other, noughts after the last. */
static void copy_places(const bfloat16 *at, size of, size places, size room, size width, bfloat16 *to) {
    for (size i = 0; i < places; i++) memcpy(to + i * width, at + i * of, width * sizeof *to);
    memset(to + places * width, 0, (room - places) * width * sizeof *to);
}

/* Scores become exponentials, less the greatest and rounded, noughts after those that are seen; what their sum is. */
static float soften(float *scores, size seen, size padded, float scale, bfloat16 *powers, float *greatest) {
    float best = -INFINITY, sum = 0;
#pragma omp simd reduction(max : best)
    for (size i = 0; i < seen; i++) {
        scores[i] *= scale;
        best = scores[i] > best ? scores[i] : best;
    }
    SUMMED
    for (size i = 0; i < seen; i++) {
        powers[i] = narrow_bfloat16(power_of(scores[i] - best));
        sum += wide_bfloat16(powers[i]);
    }
    *greatest = best;
    memset(powers + seen, 0, (padded - seen) * sizeof *powers);
    return sum;
}

/* 32 queries of a head; scores and powers have room for all keys. */
static void attend(Left q, const bfloat16 *k, const bfloat16 *v, bfloat16 *o, size of_o, float *logs, size first,
                   size queries, size keys, size width, int causal, float scale, float *scores, bfloat16 *powers) {
    const size many = queries - first < SIDE ? queries - first : SIDE, room = padded(keys);
    const size steps = steps_of(causal && first + SIDE < keys ? first + SIDE : keys);
    float block[SIDE * SIDE] __attribute__((aligned(64))), shares[SIDE];
    for (size step = 0; step < steps; step++) {
        multiply(&q, 1, k + step * steps_of(width) * STEP, block);
        for (size i = 0; i < many; i++) memcpy(scores + i * room + step * SIDE, block + i * SIDE, SIDE * sizeof *block);
    }
    for (size i = 0; i < many; i++) {
        const size seen = causal ? first + i + 1 : keys;
        float greatest, sum = soften(scores + i * room, seen, steps * SIDE, scale, powers + i * room, &greatest);
        shares[i] = 1.0f / sum;
        logs[first + i] = greatest + logf(sum);
    }
    const Left p = {powers, room, steps};
    for (size column = 0; column < width; column += SIDE) {
        multiply(&p, 1, v + column / SIDE * steps_of(keys) * STEP, block);
        for (size i = 0; i < many; i++)
            for (size j = 0; j < SIDE; j++)
                o[(first + i) * of_o + column + j] = narrow_bfloat16(block[i * SIDE + j] * shares[i]);
    }
}

/* Numbers of work that a thread needs: 16-bit ones. */
size attention_work_bfloat16(size queries, size keys, size width) {
    const size all = padded(keys), some = padded(queries) < BLOCK ? padded(queries) : BLOCK;
    const size forward = 2 * all * width + SIDE * width + 3 * SIDE * all;
    const size backward = 7 * all * width + 4 * some * width + 2 * SIDE * BLOCK + some * all;
    return forward > backward ? forward : backward;
}

/* o, and the logarithms of the sums of exponentials, [rows, heads, queries]. */
void attention_bfloat16(bfloat16 *q, const size *of_q, bfloat16 *k, const size *of_k, bfloat16 *v, const size *of_v,
                        bfloat16 *o, const size *of_o, float *logs, size rows, size heads, size groups, size queries,
                        size keys, size width, int causal, float scale, bfloat16 *work, size of_work, int threads) {
    const Heads qs = {q, of_q}, ks = {k, of_k}, vs = {v, of_v}, os = {o, of_o};
    const size all = padded(keys);
#pragma omp parallel num_threads(threads)
    {
        bfloat16 *k_panels = work + omp_get_thread_num() * of_work, *v_panels = k_panels + all * width;
        bfloat16 *copy = v_panels + all * width, *powers = copy + SIDE * width;
        float *scores = (float *)(powers + SIDE * all);
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (size unit = 0; unit < rows * heads; unit++) {
            const size row = unit / heads, head = unit % heads, group = head / (heads / groups);
            const Term of_keys = across(head_of(ks, row, group), of_k[2], keys, width);
            const Term of_values = along(head_of(vs, row, group), of_v[2], keys, width);
            bfloat16 *to = k_panels;
            for (size first = 0; first < keys; first += SIDE) to = lay_out(&of_keys, first, to);
            to = v_panels;
            for (size column = 0; column < width; column += SIDE) to = lay_out(&of_values, column, to);
            for (size first = 0; first < queries; first += SIDE) {
                Left some = {head_of(qs, row, head) + first * of_q[2], of_q[2], steps_of(width)};
                if (first + SIDE > queries) { /* tiles would read beyond the last */
                    copy_places(some.at, some.of, queries - first, SIDE, width, copy);
                    some.at = copy, some.of = width;
                }
                attend(some, k_panels, v_panels, head_of(os, row, head), of_o[2], logs + unit * queries, first,
                       queries, keys, width, causal, scale, scores, powers);
            }
        }
        end_tiles();
    }
}

/* What the backward of a group works with: copies of keys and values, keys turned, sums for their gradients; of some
   queries, the four rights, logarithms of sums and D; of 32 keys and these queries P' and dS', and dS' of all keys. */
typedef struct {
    bfloat16 *k, *v, *k_turned, *q_across, *g_across, *q_along, *g_along, *powers, *changes, *panels;
    float *dk, *dv, logs[BLOCK], dots[BLOCK];
} Backward;

/* P' = exp(scale * scores' - L) and dS' = P' (dP' - D) of 32 keys and 32 queries, rounded; nothing of keys that are not
   there, or in the future of a query. */
static void change_of(const float *scores, const float *products, const float *logs, const float *dots, size key,
                      size keys, size query, int causal, float scale, bfloat16 *powers, bfloat16 *changes) {
    for (size i = 0; i < SIDE; i++) {
        const size first = key + i >= keys ? SIDE : causal && key + i > query ? key + i - query : 0; /* that sees it */
        bfloat16 *ps = powers + i * BLOCK, *cs = changes + i * BLOCK;
#pragma omp simd
        for (size j = 0; j < SIDE; j++) {
            const float power = j < first ? 0.0f : power_of(scores[i * SIDE + j] * scale - logs[j]);
            ps[j] = narrow_bfloat16(power);
            cs[j] = narrow_bfloat16(power * (products[i * SIDE + j] - dots[j]));
        }
    }
}

/* Adds left right to sums [32, width]. */
static void add_to(float *sums, const bfloat16 *left, size steps, const bfloat16 *right, size of_panel, size width) {
    float block[SIDE * SIDE] __attribute__((aligned(64)));
    const Left one = {left, BLOCK, steps};
    for (size column = 0; column < width; column += SIDE) {
        multiply(&one, 1, right + column / SIDE * of_panel, block);
        for (size i = 0; i < SIDE; i++)
            for (size j = 0; j < SIDE; j++) sums[i * width + column + j] += block[i * SIDE + j];
    }
}

/* Up to 128 queries of a head, all of its keys. */
static void go_back(Backward *w, const bfloat16 *q, size of_q, const bfloat16 *o, size of_o, const bfloat16 *g,
                    size of_g, bfloat16 *dq, size of_dq, const float *logs, size begin, size queries, size keys,
                    size width, int causal, float scale) {
    const size many = queries - begin < BLOCK ? queries - begin : BLOCK, blocks = steps_of(many);
    const size steps = steps_of(width), all = steps_of(keys);
    const size last = steps_of(causal && begin + many < keys ? begin + many : keys);
    const Term rights[4] = {across(q + begin * of_q, of_q, many, width), across(g + begin * of_g, of_g, many, width),
                            along(q + begin * of_q, of_q, many, width), along(g + begin * of_g, of_g, many, width)};
    bfloat16 *places[4] = {w->q_across, w->g_across, w->q_along, w->g_along};
    for (int i = 0; i < 4; i++)
        for (size column = 0; column < rights[i].columns; column += SIDE)
            places[i] = lay_out(&rights[i], column, places[i]);
    for (size i = 0; i < blocks * SIDE; i++) {
        float sum = 0;
        if (i < many) SUMMED for (size j = 0; j < width; j++)
            sum += wide_bfloat16(g[(begin + i) * of_g + j]) * wide_bfloat16(o[(begin + i) * of_o + j]);
        w->dots[i] = sum;
        w->logs[i] = i < many ? logs[begin + i] : 1e30f; /* no power of queries that are not there */
    }
    float scores[SIDE * SIDE] __attribute__((aligned(64))), products[SIDE * SIDE] __attribute__((aligned(64)));
    for (size step = 0; step < last; step++) {
        const size key = step * SIDE, first = causal && key > begin ? (key - begin) / SIDE : 0; /* block that sees it */
        const Left k = {w->k + key * width, width, steps}, v = {w->v + key * width, width, steps};
        for (size block = first; block < blocks; block++) {
            bfloat16 *changes = w->changes + block * SIDE;
            multiply(&k, 1, w->q_across + block * steps * STEP, scores);
            multiply(&v, 1, w->g_across + block * steps * STEP, products);
            change_of(scores, products, w->logs + block * SIDE, w->dots + block * SIDE, key, keys, begin + block * SIDE,
                      causal, scale, w->powers + block * SIDE, changes);
            const Term right = along(changes, BLOCK, SIDE, SIDE);
            lay_out(&right, 0, w->panels + (block * all + step) * STEP);
        }
        const size on = blocks - first;
        add_to(w->dv + key * width, w->powers + first * SIDE, on, w->g_along + first * STEP, blocks * STEP, width);
        add_to(w->dk + key * width, w->changes + first * SIDE, on, w->q_along + first * STEP, blocks * STEP, width);
    }
    for (size block = 0; block < blocks; block++) {
        const size query = begin + block * SIDE, seen = causal ? steps_of(query + SIDE < keys ? query + SIDE : keys) : all;
        for (size column = 0; column < width; column += SIDE) {
            const Left k = {w->k_turned + column * all * SIDE, all * SIDE, seen};
            multiply(&k, 1, w->panels + block * all * STEP, scores);
            for (size i = 0; i < SIDE && query + i < queries; i++)
                for (size j = 0; j < SIDE; j++)
                    dq[(query + i) * of_dq + column + j] = narrow_bfloat16(scores[j * SIDE + i] * scale);
        }
    }
}

/* dq, dk and dv. */
void attention_backward_bfloat16(bfloat16 *q, const size *of_q, bfloat16 *k, const size *of_k, bfloat16 *v,
                                 const size *of_v, bfloat16 *o, const size *of_o, bfloat16 *g, const size *of_g,
                                 const float *logs, bfloat16 *dq, const size *of_dq, bfloat16 *dk, const size *of_dk,
                                 bfloat16 *dv, const size *of_dv, size rows, size heads, size groups, size queries,
                                 size keys, size width, int causal, float scale, bfloat16 *work, size of_work,
                                 int threads) {
    const Heads qs = {q, of_q}, ks = {k, of_k}, vs = {v, of_v}, os = {o, of_o}, gs = {g, of_g};
    const Heads dqs = {dq, of_dq}, dks = {dk, of_dk}, dvs = {dv, of_dv};
    const size all = padded(keys), some = padded(queries) < BLOCK ? padded(queries) : BLOCK, shared = heads / groups;
#pragma omp parallel num_threads(threads)
    {
        bfloat16 *own = work + omp_get_thread_num() * of_work;
        Backward w = {.k = own, .v = own + all * width, .k_turned = own + 2 * all * width};
        w.dk = (float *)(own + 3 * all * width);
        w.dv = w.dk + all * width;
        w.q_across = own + 7 * all * width;
        w.g_across = w.q_across + some * width;
        w.q_along = w.g_across + some * width;
        w.g_along = w.q_along + some * width;
        w.powers = w.g_along + some * width;
        w.changes = w.powers + SIDE * BLOCK;
        w.panels = w.changes + SIDE * BLOCK;
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (size unit = 0; unit < rows * groups; unit++) {
            const size row = unit / groups, group = unit % groups;
            copy_places(head_of(ks, row, group), of_k[2], keys, all, width, w.k);
            copy_places(head_of(vs, row, group), of_v[2], keys, all, width, w.v);
            turn_all(w.k, all, width, w.k_turned, all, 0, 1);
            memset(w.dk, 0, 2 * all * width * sizeof *w.dk);
            for (size head = group * shared; head < (group + 1) * shared; head++)
                for (size begin = 0; begin < queries; begin += BLOCK)
                    go_back(&w, head_of(qs, row, head), of_q[2], head_of(os, row, head), of_o[2],
                            head_of(gs, row, head), of_g[2], head_of(dqs, row, head), of_dq[2],
                            logs + (row * heads + head) * queries, begin, queries, keys, width, causal, scale);
            for (size place = 0; place < keys; place++)
                for (size i = 0; i < width; i++) {
                    head_of(dks, row, group)[place * of_dk[2] + i] = narrow_bfloat16(w.dk[place * width + i] * scale);
                    head_of(dvs, row, group)[place * of_dv[2] + i] = narrow_bfloat16(w.dv[place * width + i]);
                }
        }
        end_tiles();
    }
}
