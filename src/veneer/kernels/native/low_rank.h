/* Linear maps of one input with low-rank changes. Columns of h and dh are those of all maps, of each a multiple of 32,
   noughts after its rank. Arrays are of bfloat16, or of float where parts say so; the factors are float where wide says
   so, A's first. */

static inline int is_thin(int parts, size rank) { return parts == FLOAT_PARTS && rank <= SIDE; }

/* y = x', its rows as long as they are given: noughts after those of x. */
#define TURN_ALL(name, number)                                                                                        \
    static void name(const number *x, size rows, size of_x, size columns, number *y, size of_y, int thread,           \
                     int threads) {                                                                                   \
        for (size first = thread * SIDE; first < of_y; first += threads * SIDE)                                       \
            for (size column = 0; column < columns; column++)                                                         \
                for (size row = first; row < least(first + SIDE, of_y); row++)                                        \
                    y[column * of_y + row] = row < rows ? x[row * of_x + column] : 0;                                 \
    }
TURN_ALL(turn_bfloat16, bfloat16)
TURN_ALL(turn_float, float)

static void turn_all(const void *x, size rows, size of_x, size columns, void *y, size of_y, int parts, int thread,
                     int threads) {
    if (parts == NARROW_PARTS)
        turn_bfloat16(x, rows, of_x, columns, y, of_y, thread, threads);
    else
        turn_float(x, rows, of_x, columns, y, of_y, thread, threads);
}

/* Numbers of work that a thread needs, 16-bit ones: for products of this depth, or a thin one as wide as the widest. */
size low_rank_work(size depth, size widest, int parts) {
    const size laid = products_work(depth, parts, parts == FLOAT_PARTS), thin = 2 * SIDE * widest;
    return parts == FLOAT_PARTS && thin > laid ? thin : laid;
}

/* h = scale * x A', y = x W' + bias + h B'. */
void low_rank_linears(const void *x, size rows, size width, int count, const void **weights, const void **biases,
                      const void **a, const void **b, const int *wide, const size *outs, const size *ranks,
                      const float *scales, void *h, size of_h, void **ys, bfloat16 *work, size of_work, int parts,
                      int threads) {
    const int all_wide = parts == FLOAT_PARTS;
    Product thin[TERMS], whole[TERMS];
    for (size i = 0, at = 0; i < count; at += padded(ranks[i]), i++) {
        void *own = place(h, at, all_wide);
        const Term by_a = {x, width, {a[i], width, width, ranks[i], wide[0], 0}};
        const Term by_weight = {x, width, {weights[i], width, width, outs[i], all_wide, 0}};
        const Term by_b = {own, of_h, {b[i], ranks[i], ranks[i], outs[i], wide[1], 0}};
        thin[i] = (Product){{by_a}, 1, parts, rows, padded(ranks[i]), own, of_h, all_wide, .scale = scales[i]};
        whole[i] = (Product){{by_weight, by_b}, 2, parts, rows, outs[i], ys[i], outs[i], all_wide, .bias = biases[i],
                             .scale = 1};
    }
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        bfloat16 *own = work + thread * of_work;
        begin_tiles();
        for (int i = 0; i < count; i++)
            if (is_thin(parts, ranks[i])) {
                turn_float(a[i], ranks[i], width, width, (float *)own, ranks[i], 0, 1);
                const Thin by_a = {x, width, 1, (float *)own, ranks[i], rows, width, ranks[i], thin[i].to, of_h,
                                   SIDE, scales[i]};
                share_tall(&by_a, thread, all);
            } else
                share(&thin[i], 1, thread, all, own);
#pragma omp barrier
        share(whole, count, thread, all, own);
        end_tiles();
    }
}

/* dh = scale * dy B, dx = sum of dy W + dh A, dA = dh' x with rows as columns of dh, dB = dy' h; where there is a place
   for them. Turned has room for dh' and h', rows padded. */
void low_rank_linears_backward(const void *x, size rows, size width, int count, const void **weights, const void **a,
                               const void **b, const int *wide, const size *outs, const size *ranks,
                               const float *scales, const void *h, size of_h, const void **dys, void *dh, void *turned,
                               void *dx, void *da, void **dbs, bfloat16 *work, size of_work, int parts, int threads) {
    const int all_wide = parts == FLOAT_PARTS;
    const size places = padded(rows);
    Product to_h[TERMS], to_b[TERMS];
    Thin thin_h[TERMS], thin_a[TERMS], thin_b[TERMS];
    Product to_x = {.parts = parts, .rows = rows, .columns = width, .to = dx, .of_to = width, .wide = all_wide,
                    .scale = 1};
    int laid = 0; /* whether any is by tiles: these need dh' and h', and give all rows of dA */
    for (size i = 0, at = 0; i < count; at += padded(ranks[i]), i++) {
        const size rank = ranks[i], out = outs[i];
        void *own = place(dh, at, all_wide), *own_a = da ? place(da, at * width, wide[0]) : NULL;
        const Term by_dy = {place(turned, (of_h + at) * places, all_wide), places, {dys[i], out, rows, out, all_wide, 1}};
        const Term by_b = {dys[i], out, {b[i], rank, out, rank, wide[1], 1}};
        to_h[i] = (Product){{by_b}, 1, parts, rows, padded(rank), own, of_h, all_wide, .scale = scales[i]};
        to_b[i] = (Product){{by_dy}, 1, parts, rank, out, dbs[i], rank, wide[1], .turned = 1, .scale = 1};
        thin_h[i] = (Thin){dys[i], out, 1, b[i], rank, rows, out, rank, own, of_h, SIDE, scales[i]};
        thin_a[i] = (Thin){own, 1, of_h, x, width, rank, rows, width, own_a, width, width, 1};
        thin_b[i] = (Thin){place(h, at, all_wide), 1, of_h, dys[i], out, rank, rows, out, dbs[i], rank, out, 1};
        to_x.terms[to_x.count++] = (Term){dys[i], out, {weights[i], width, out, width, all_wide, 1}};
        to_x.terms[to_x.count++] = (Term){own, of_h, {a[i], width, rank, width, wide[0], 1}};
        laid = laid || !is_thin(parts, rank);
    }
    const Term by_x = {turned, places, {x, width, rows, width, all_wide, 1}};
    const Product to_a = {{by_x}, 1, parts, of_h, width, da, width, wide[0], .scale = 1};
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        bfloat16 *own = work + thread * of_work;
        begin_tiles();
        for (int i = 0; i < count; i++)
            if (is_thin(parts, ranks[i]))
                share_tall(&thin_h[i], thread, all);
            else
                share(&to_h[i], 1, thread, all, own);
#pragma omp barrier
        if (laid) {
            turn_all(dh, rows, of_h, of_h, turned, places, parts, thread, all);
            turn_all(h, rows, of_h, of_h, place(turned, of_h * places, all_wide), places, parts, thread, all);
#pragma omp barrier
        }
        for (int i = 0; i < count; i++) {
            const int thin = is_thin(parts, ranks[i]);
            if (da && !laid) share_deep(&thin_a[i], thread, all);
            if (dbs[i] && thin) share_turned(&thin_b[i], thread, all, (float *)own);
            if (dbs[i] && !thin) share(&to_b[i], 1, thread, all, own);
        }
        if (da && laid) share(&to_a, 1, thread, all, own);
        if (dx) share(&to_x, 1, thread, all, own);
        end_tiles();
    }
}
