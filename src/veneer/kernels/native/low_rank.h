/* Linear maps of one input with low-rank changes. Columns of h and dh are those of all maps, of each a multiple of 32,
   noughts after its rank. The factors are float where wide says so, A's first. */

static inline size padded(size width) { return SIDE * steps_of(width); }

/* h = scale * x A', y = x W' + bias + h B'. */
void low_rank_linears_bfloat16(const bfloat16 *x, size rows, size width, int count, const bfloat16 **weights,
                               const bfloat16 **biases, const void **a, const void **b, const int *wide,
                               const size *outs, const size *ranks, const float *scales, bfloat16 *h, size of_h,
                               bfloat16 **ys, bfloat16 *work, size of_work, int threads) {
    Product thin[TERMS], whole[TERMS];
    for (size i = 0, at = 0; i < count; at += padded(ranks[i]), i++) {
        const Term by_a = {x, width, a[i], width, wide[0], 0, width, ranks[i]};
        const Term by_weight = {x, width, weights[i], width, 0, 0, width, outs[i]};
        const Term by_b = {h + at, of_h, b[i], ranks[i], wide[1], 0, ranks[i], outs[i]};
        thin[i] = (Product){{by_a}, 1, rows, padded(ranks[i]), h + at, of_h, 0, 0, NULL, scales[i]};
        whole[i] = (Product){{by_weight, by_b}, 2, rows, outs[i], ys[i], outs[i], 0, 0, biases[i], 1.0f};
    }
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        begin_tiles();
        share(thin, count, thread, all, work + thread * of_work);
#pragma omp barrier
        share(whole, count, thread, all, work + thread * of_work);
        end_tiles();
    }
}

/* y = x', its rows as long as they are given: noughts after those of x. */
static void turn_all(const bfloat16 *x, size rows, size columns, bfloat16 *y, size of_y, int thread, int threads) {
    for (size first = thread * SIDE; first < of_y; first += threads * SIDE)
        for (size column = 0; column < columns; column++)
            for (size row = first; row < first + SIDE; row++)
                y[column * of_y + row] = row < rows ? x[row * columns + column] : 0;
}

/* dh = scale * dy B, dx = sum of dy W + dh A, dA = dh' x with rows as columns of dh, dB = dy' h; where there is a place
   for them. Turned has room for dh' and h', rows padded. */
void low_rank_linears_backward_bfloat16(const bfloat16 *x, size rows, size width, int count, const bfloat16 **weights,
                                        const void **a, const void **b, const int *wide, const size *outs,
                                        const size *ranks, const float *scales, const bfloat16 *h, size of_h,
                                        const bfloat16 **dys, bfloat16 *dh, bfloat16 *turned, bfloat16 *dx, void *da,
                                        void **dbs, bfloat16 *work, size of_work, int threads) {
    Product thin[TERMS], rest[TERMS + 2], for_x = {.rows = rows, .columns = width, .to = dx, .of_to = width, .scale = 1};
    const size places = padded(rows);
    int many = 0;
    for (size i = 0, at = 0; i < count; at += padded(ranks[i]), i++) {
        const Term by_b = {dys[i], outs[i], b[i], ranks[i], wide[1], 1, outs[i], ranks[i]};
        const Term by_dy = {turned + (of_h + at) * places, places, dys[i], outs[i], 0, 1, rows, outs[i]};
        thin[i] = (Product){{by_b}, 1, rows, padded(ranks[i]), dh + at, of_h, 0, 0, NULL, scales[i]};
        if (dbs[i]) rest[many++] = (Product){{by_dy}, 1, ranks[i], outs[i], dbs[i], ranks[i], wide[1], 1, NULL, 1.0f};
        for_x.terms[for_x.count++] = (Term){dys[i], outs[i], weights[i], width, 0, 1, outs[i], width};
        for_x.terms[for_x.count++] = (Term){dh + at, of_h, a[i], width, wide[0], 1, ranks[i], width};
    }
    const Term by_x = {turned, places, x, width, 0, 1, rows, width};
    if (da) rest[many++] = (Product){{by_x}, 1, of_h, width, da, width, wide[0], 0, NULL, 1.0f};
    if (dx) rest[many++] = for_x;
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        begin_tiles();
        share(thin, count, thread, all, work + thread * of_work);
#pragma omp barrier
        turn_all(dh, rows, of_h, turned, places, thread, all);
        turn_all(h, rows, of_h, turned + of_h * places, places, thread, all);
#pragma omp barrier
        for (int i = 0; i < many; i++) share(&rest[i], 1, thread, all, work + thread * of_work);
        end_tiles();
    }
}
