/* Attention by tiles, without a mask: scores stay in float, and near the core that computes them.

   Heads are next to each other, those of a group served by the same keys and values. Arrays, of bfloat16 or float as
   parts say, have strides by row, head and place; width is a multiple of 32. Causal queries are as many as keys, that of
   place i sees those up to i. */

enum { BLOCK = 4 * SIDE };

typedef struct {
    void *at;
    const size *of;
} Heads;

/* Sizes, and what is the same for all heads. */
typedef struct {
    size rows, heads, groups, queries, keys, width;
    int causal, parts;
    float scale;
} Attention;

/* Places of a head, and the stride to the next. */
typedef struct {
    void *at;
    size of;
    int wide;
} Places;

static inline Places places_of(const Attention *a, Heads x, size row, size head) {
    const int wide = a->parts == FLOAT_PARTS;
    return (Places){place(x.at, row * x.of[0] + head * x.of[1], wide), x.of[2], wide};
}

static inline void *from_place(Places x, size first) { return place(x.at, first * x.of, x.wide); }

/* Of two places. */
static inline float dot_of(Places x, Places y, size at, size width) {
    const float *xs = from_place(x, at), *ys = from_place(y, at);
    const bfloat16 *narrow_xs = from_place(x, at), *narrow_ys = from_place(y, at);
    float sum = 0;
    if (x.wide)
        SUMMED for (size i = 0; i < width; i++) sum += xs[i] * ys[i];
    else
        SUMMED for (size i = 0; i < width; i++) sum += wide_bfloat16(narrow_xs[i]) * wide_bfloat16(narrow_ys[i]);
    return sum;
}

/* 32 numbers of a place. */
static inline void keep(Places x, size place_, size column, const float *numbers) {
    void *at = place(x.at, place_ * x.of + column, x.wide);
    const __m512 low = _mm512_loadu_ps(numbers), high = _mm512_loadu_ps(numbers + 16);
    if (x.wide) {
        _mm512_storeu_ps(at, low);
        _mm512_storeu_ps((float *)at + 16, high);
    } else
        _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* Places as a right: they are its columns, or its depth. */
static inline Right across(Places x, size first, size many, size width) {
    return (Right){from_place(x, first), x.of, width, many, x.wide, 0};
}

static inline Right along(Places x, size first, size many, size width) {
    return (Right){from_place(x, first), x.of, many, width, x.wide, 1};
}

static void lay_all(const Right *right, int parts, bfloat16 *to) {
    lay_panels(right, 0, steps_of(right->columns), parts, steps_of(right->depth) * parts * STEP, to);
}

/* Scores become exponentials, less the greatest and, with one part, rounded, noughts after those that are seen; what
   their sum is. */
static inline float soften_as(float *scores, size seen, size room, float scale, const int parts, float *greatest) {
    float best = -INFINITY, sum = 0;
#pragma omp simd reduction(max : best)
    for (size i = 0; i < seen; i++) {
        scores[i] *= scale;
        best = scores[i] > best ? scores[i] : best;
    }
    SUMMED
    for (size i = 0; i < seen; i++) {
        const float power = power_of(scores[i] - best);
        scores[i] = parts == NARROW_PARTS ? wide_bfloat16(narrow_bfloat16(power)) : power;
        sum += scores[i];
    }
    *greatest = best;
    memset(scores + seen, 0, (room - seen) * sizeof *scores);
    return sum;
}

static float soften(float *scores, size seen, size room, float scale, int parts, float *greatest) {
    return parts == NARROW_PARTS ? soften_as(scores, seen, room, scale, NARROW_PARTS, greatest)
                                 : soften_as(scores, seen, room, scale, FLOAT_PARTS, greatest);
}

/* 32 queries of a head; scores and powers have room for all keys. */
static void attend(const Attention *a, Left q, const bfloat16 *k, const bfloat16 *v, Places o, float *logs, size first,
                   float *scores, bfloat16 *powers) {
    const size many = least(a->queries - first, SIDE), room = padded(a->keys), unit = STEP * a->parts;
    const size steps = steps_of(a->causal ? least(first + SIDE, a->keys) : a->keys);
    float block[SIDE * SIDE] __attribute__((aligned(64))), shares[SIDE];
    for (size step = 0; step < steps; step++) {
        multiply(&q, 1, k + step * q.steps * unit, a->parts, block, SIDE, 0);
        for (size i = 0; i < many; i++) memcpy(scores + i * room + step * SIDE, block + i * SIDE, SIDE * sizeof *block);
    }
    for (size i = 0; i < many; i++) {
        const size seen = a->causal ? first + i + 1 : a->keys;
        float greatest, sum = soften(scores + i * room, seen, steps * SIDE, a->scale, a->parts, &greatest);
        shares[i] = 1.0f / sum;
        logs[first + i] = greatest + logf(sum);
    }
    const Left p = lay_rows(scores, room, 1, many, SIDE * steps, a->parts, powers);
    for (size column = 0; column < a->width; column += SIDE) {
        multiply(&p, 1, v + column / SIDE * steps_of(a->keys) * unit, a->parts, block, SIDE, 0);
        for (size i = 0; i < many; i++) {
            for (size j = 0; j < SIDE; j++) block[i * SIDE + j] *= shares[i];
            keep(o, first + i, column, block + i * SIDE);
        }
    }
}

/* Numbers of work that a thread needs: 16-bit ones. */
size attention_work(size queries, size keys, size width, int parts) {
    const size all = padded(keys), some = least(padded(queries), BLOCK);
    const size forward = parts * (2 * all * width + SIDE * (width + all)) + 2 * SIDE * all;
    const size backward = parts * (3 * all * width + 4 * some * width + SIDE * BLOCK + some * all) +
                          4 * all * width + 4 * SIDE * BLOCK;
    return forward > backward ? forward : backward;
}

/* o, and the logarithms of the sums of exponentials, [rows, heads, queries]. */
void attention(void *q, const size *of_q, void *k, const size *of_k, void *v, const size *of_v, void *o,
               const size *of_o, float *logs, size rows, size heads, size groups, size queries, size keys, size width,
               int causal, float scale, bfloat16 *work, size of_work, int parts, int threads) {
    const Heads qs = {q, of_q}, ks = {k, of_k}, vs = {v, of_v}, os = {o, of_o};
    const Attention a = {rows, heads, groups, queries, keys, width, causal, parts, scale};
    const size all = padded(keys);
#pragma omp parallel num_threads(threads)
    {
        bfloat16 *k_panels = work + omp_get_thread_num() * of_work, *v_panels = k_panels + parts * all * width;
        bfloat16 *laid = v_panels + parts * all * width, *powers = laid + parts * SIDE * width;
        float *scores = (float *)(powers + parts * SIDE * all);
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (size unit = 0; unit < rows * heads; unit++) {
            const size row = unit / heads, head = unit % heads, group = head / (heads / groups);
            const Right of_keys = across(places_of(&a, ks, row, group), 0, keys, width);
            const Right of_values = along(places_of(&a, vs, row, group), 0, keys, width);
            const Places own = places_of(&a, qs, row, head), to = places_of(&a, os, row, head);
            lay_all(&of_keys, parts, k_panels);
            lay_all(&of_values, parts, v_panels);
            for (size first = 0; first < queries; first += SIDE) {
                const Left some = lay_rows(from_place(own, first), own.of, own.wide, queries - first, width,
                                           parts, laid);
                attend(&a, some, k_panels, v_panels, to, logs + unit * queries, first, scores, powers);
            }
        }
        end_tiles();
    }
}

/* What the backward of a group works with: keys and values laid out as lefts, keys turned, too; sums for their
   gradients; of some queries, the four rights, logarithms of sums and D; of 32 keys and these queries P' and dS', then
   laid out; dS' of all keys. */
typedef struct {
    bfloat16 *k, *v, *k_turned, *q_across, *g_across, *q_along, *g_along, *left, *panels;
    float *dk, *dv, *powers, *changes, logs[BLOCK], dots[BLOCK];
} Backward;

/* P' = exp(scale * scores' - L) and dS' = P' (dP' - D) of 32 keys and 32 queries; nothing of keys that are not there, or
   in the future of a query. */
static void change_of(const Attention *a, const float *scores, const float *products, const float *logs,
                      const float *dots, size key, size query, float *powers, float *changes) {
    const float scale = a->scale;
    for (size i = 0; i < SIDE; i++) {
        const size first = key + i >= a->keys ? SIDE : a->causal && key + i > query ? key + i - query : 0; /* sees it */
        float *ps = powers + i * BLOCK, *cs = changes + i * BLOCK;
#pragma omp simd
        for (size j = 0; j < SIDE; j++) {
            const float power = j < first ? 0.0f : power_of(scores[i * SIDE + j] * scale - logs[j]);
            ps[j] = power;
            cs[j] = power * (products[i * SIDE + j] - dots[j]);
        }
    }
}

/* Adds left right to sums [32, width]. */
static void add_to(const Attention *a, float *sums, const float *numbers, size steps, bfloat16 *room,
                   const bfloat16 *right, size of_panel) {
    float block[SIDE * SIDE] __attribute__((aligned(64)));
    const Left left = lay_rows(numbers, BLOCK, 1, SIDE, SIDE * steps, a->parts, room);
    for (size column = 0; column < a->width; column += SIDE) {
        multiply(&left, 1, right + column / SIDE * of_panel, a->parts, block, SIDE, 0);
        for (size i = 0; i < SIDE; i++)
            for (size j = 0; j < SIDE; j++) sums[i * a->width + column + j] += block[i * SIDE + j];
    }
}

/* The rights of some queries, L and D. */
static void take_queries(const Attention *a, Backward *w, Places q, Places o, Places g, const float *logs, size begin,
                         size many) {
    const Right rights[4] = {across(q, begin, many, a->width), across(g, begin, many, a->width),
                             along(q, begin, many, a->width), along(g, begin, many, a->width)};
    bfloat16 *to[4] = {w->q_across, w->g_across, w->q_along, w->g_along};
    for (int i = 0; i < 4; i++) lay_all(&rights[i], a->parts, to[i]);
    for (size i = 0; i < padded(many); i++) {
        w->dots[i] = i < many ? dot_of(g, o, begin + i, a->width) : 0;
        w->logs[i] = i < many ? logs[begin + i] : 1e30f; /* no power of queries that are not there */
    }
}

/* Up to 128 queries of a head, all of its keys. */
static void go_back(const Attention *a, Backward *w, Places q, Places o, Places g, Places dq, const float *logs,
                    size begin) {
    const size many = least(a->queries - begin, BLOCK), blocks = steps_of(many), unit = STEP * a->parts;
    const size steps = steps_of(a->width), all = steps_of(a->keys);
    const size last = steps_of(a->causal ? least(begin + many, a->keys) : a->keys);
    take_queries(a, w, q, o, g, logs, begin, many);
    float scores[SIDE * SIDE] __attribute__((aligned(64))), products[SIDE * SIDE] __attribute__((aligned(64)));
    for (size step = 0; step < last; step++) {
        const size key = step * SIDE, first = a->causal && key > begin ? (key - begin) / SIDE : 0; /* that sees it */
        const Left k = {w->k + step * steps * unit, 32, TILE, unit, steps};
        const Left v = {w->v + step * steps * unit, 32, TILE, unit, steps};
        for (size block = first; block < blocks; block++) {
            const size at = block * SIDE;
            multiply(&k, 1, w->q_across + block * steps * unit, a->parts, scores, SIDE, 0);
            multiply(&v, 1, w->g_across + block * steps * unit, a->parts, products, SIDE, 0);
            change_of(a, scores, products, w->logs + at, w->dots + at, key, begin + at, w->powers + at, w->changes + at);
            const Right right = {w->changes + at, BLOCK, SIDE, SIDE, 1, 1};
            lay_all(&right, a->parts, w->panels + (block * all + step) * unit);
        }
        const size on = blocks - first, of = blocks * unit;
        add_to(a, w->dv + key * a->width, w->powers + first * SIDE, on, w->left, w->g_along + first * unit, of);
        add_to(a, w->dk + key * a->width, w->changes + first * SIDE, on, w->left, w->q_along + first * unit, of);
    }
    for (size block = 0; block < blocks; block++) {
        const size query = begin + block * SIDE, seen = a->causal ? steps_of(least(query + SIDE, a->keys)) : all;
        for (size column = 0; column < a->width; column += SIDE) {
            const Left k = {w->k_turned + column * all * unit / SIDE, 32, TILE, unit, seen};
            multiply(&k, 1, w->panels + block * all * unit, a->parts, scores, SIDE, 0);
            for (size i = 0; i < SIDE && query + i < a->queries; i++) {
                for (size j = 0; j < SIDE; j++) products[j] = scores[j * SIDE + i] * a->scale;
                keep(dq, query + i, column, products);
            }
        }
    }
}

/* Keys and values of a group as lefts; the room for sums is used before these begin. */
static void take_keys(const Attention *a, Backward *w, Places k, Places v) {
    const size keys = a->keys, steps = steps_of(a->width), all = padded(keys), unit = STEP * a->parts;
    for (size key = 0; key < keys; key += SIDE) {
        lay_rows(from_place(k, key), k.of, k.wide, keys - key, a->width, a->parts, w->k + key / SIDE * steps * unit);
        lay_rows(from_place(v, key), v.of, v.wide, keys - key, a->width, a->parts, w->v + key / SIDE * steps * unit);
    }
    turn_all(k.at, keys, k.of, a->width, w->dk, all, a->parts, 0, 1);
    for (size column = 0; column < a->width; column += SIDE)
        lay_rows(place(w->dk, column * all, k.wide), all, k.wide, SIDE, all, a->parts,
                 w->k_turned + column / SIDE * all / SIDE * unit);
    memset(w->dk, 0, all * a->width * sizeof *w->dk);
    memset(w->dv, 0, all * a->width * sizeof *w->dv);
}

/* dq, dk and dv. */
void attention_backward(void *q, const size *of_q, void *k, const size *of_k, void *v, const size *of_v, void *o,
                        const size *of_o, void *g, const size *of_g, const float *logs, void *dq, const size *of_dq,
                        void *dk, const size *of_dk, void *dv, const size *of_dv, size rows, size heads, size groups,
                        size queries, size keys, size width, int causal, float scale, bfloat16 *work, size of_work,
                        int parts, int threads) {
    const Heads qs = {q, of_q}, ks = {k, of_k}, vs = {v, of_v}, os = {o, of_o}, gs = {g, of_g};
    const Heads dqs = {dq, of_dq}, dks = {dk, of_dk}, dvs = {dv, of_dv};
    const Attention a = {rows, heads, groups, queries, keys, width, causal, parts, scale};
    const size of_keys = padded(keys) * width, some = least(padded(queries), BLOCK), shared = heads / groups;
#pragma omp parallel num_threads(threads)
    {
        Backward w = {.k = work + omp_get_thread_num() * of_work};
        w.v = w.k + parts * of_keys;
        w.k_turned = w.v + parts * of_keys;
        w.q_across = w.k_turned + parts * of_keys;
        w.g_across = w.q_across + parts * some * width;
        w.q_along = w.g_across + parts * some * width;
        w.g_along = w.q_along + parts * some * width;
        w.left = w.g_along + parts * some * width;
        w.panels = w.left + parts * SIDE * BLOCK;
        w.dk = (float *)(w.panels + parts * some * padded(keys));
        w.dv = w.dk + of_keys;
        w.powers = w.dv + of_keys;
        w.changes = w.powers + SIDE * BLOCK;
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (size unit = 0; unit < rows * groups; unit++) {
            const size row = unit / groups, group = unit % groups;
            const Places to_k = places_of(&a, dks, row, group), to_v = places_of(&a, dvs, row, group);
            take_keys(&a, &w, places_of(&a, ks, row, group), places_of(&a, vs, row, group));
            for (size head = group * shared; head < (group + 1) * shared; head++)
                for (size begin = 0; begin < queries; begin += BLOCK)
                    go_back(&a, &w, places_of(&a, qs, row, head), places_of(&a, os, row, head),
                            places_of(&a, gs, row, head), places_of(&a, dqs, row, head),
                            logs + (row * heads + head) * queries, begin);
            for (size i = 0; i < of_keys; i++) w.dk[i] *= scale;
            for (size key = 0; key < keys; key++)
                for (size column = 0; column < width; column += SIDE) {
                    keep(to_k, key, column, w.dk + key * width + column);
                    keep(to_v, key, column, w.dv + key * width + column);
                }
        }
        end_tiles();
    }
}
