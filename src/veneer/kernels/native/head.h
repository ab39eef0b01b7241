/* Cross-entropy over a vocabulary, and its gradient by what comes in, in one pass over the weight: logits are there for
   a few classes at a time, near the core that computes them.

   Of a row with logits l and target t, m = max l, o = sum over v other than t of exp(l_v - m), s = o + exp(l_t - m):

       loss = m + log s - l_t,    dx = (sum over v other than t of exp(l_v - m) W_v - o W_t) / s

   where m is that of the classes seen so far; as it grows by d, both sums shrink by exp(-d) (Milakov, Gimelshein 2018,
   arXiv:1805.02867; with the weighted sum: Dao et al. 2022, arXiv:2205.14135, sec. 3.1). Leaving t out keeps what is
   left of 1 - exp(l_t - m) / s exact where that is small.

   Classes are gone through in SPLITS parts, each with sums of its own, whatever threads there are: these share out
   parts, and rows. */

#define LEAST_LOGIT -3.4028234e38f

enum { SPLITS = 4, LAID = 192 << 10 }; /* numbers of the weight that are laid out at once, either way */

typedef struct {
    const void *x, *weight, *bias;
    size rows, width, classes;
    const int64_t *targets;
    int parts, gradient;
} Head;

/* Of a row, in a part of the classes. Others is the sum of exponentials but the target's, own the target's logit, or
   -inf; first the class that is the greatest. */
typedef struct {
    float greatest, others, own;
    size first;
} Seen;

static const Seen NOTHING = {LEAST_LOGIT, 0, -INFINITY, 0};

/* Classes that are gone through at once: as many as fit. */
static size classes_at_once(size width, int parts) {
    const size panels = LAID / (steps_of(width) * parts * STEP);
    return SIDE * (panels > 1 ? panels : 1);
}

/* Bytes of what is kept of all rows, and numbers of their sums, which are float. */
size head_seen_work(size rows) { return SPLITS * padded(rows) * sizeof(Seen); }

size head_sums_work(size rows, size width) { return SPLITS * padded(rows) * padded(width); }

/* Numbers of work that a thread needs, 16-bit ones. */
size head_work(size width, int parts) {
    const size classes = classes_at_once(width, parts);
    return parts * (2 * classes * padded(width) + SIDE * (padded(width) + classes)) + 2 * SIDE * classes;
}

/* Logits of some classes become exponentials less the greatest so far, but for the target's nought; sums of earlier
   ones are brought to the same. */
static void weigh(const Head *h, float *logits, size first, size many, size target, Seen *seen, float *sums) {
    float best = seen->greatest, sum = 0;
    if (h->bias)
        for (size i = 0; i < many; i++) logits[i] += number_at(h->bias, first + i, h->parts == FLOAT_PARTS);
#pragma omp simd reduction(max : best)
    for (size i = 0; i < many; i++) best = logits[i] > best ? logits[i] : best;
    if (best > seen->greatest) {
        const float share = power_of(seen->greatest - best);
        size at = 0;
        while (logits[at] != best) at++;
        for (size i = 0; h->gradient && i < h->width; i++) sums[i] *= share;
        *seen = (Seen){best, seen->others * share, seen->own, first + at};
    }
    if (target >= first && target < first + many) {
        seen->own = logits[target - first];
        logits[target - first] = -INFINITY;
    }
    SUMMED
    for (size i = 0; i < many; i++) {
        logits[i] = power_of(logits[i] - best);
        sum += logits[i];
    }
    seen->others += sum;
}

/* Of 32 rows and classes; of float some depth at a time, as products are. */
static void logits_of(const Left *x, const bfloat16 *panel, int parts, float *to, size of_to) {
    const size most = parts == FLOAT_PARTS ? CHUNK / parts : x->steps;
    float more[SIDE * SIDE] __attribute__((aligned(64)));
    for (size first = 0; first < x->steps; first += most) {
        const Left some = {x->at + first * x->next, x->of, x->below, x->next, least(most, x->steps - first)};
        multiply(&some, 1, panel + first * parts * STEP, parts, first ? more : to, first ? SIDE : of_to, 0);
        for (size i = 0; first && i < SIDE; i++)
            for (size j = 0; j < SIDE; j++) to[i * of_to + j] += more[i * SIDE + j];
    }
}

/* Some rows and classes. */
static void head_part(const Head *h, size first_row, size last_row, size first, size last, Seen *seen, float *sums,
                      bfloat16 *work) {
    const int parts = h->parts, wide = parts == FLOAT_PARTS;
    const size steps = steps_of(h->width), wide_row = padded(h->width), most = classes_at_once(h->width, parts);
    bfloat16 *across = work, *along = across + parts * most * wide_row;
    bfloat16 *laid = along + parts * most * wide_row, *powers = laid + parts * SIDE * wide_row;
    float *logits = (float *)(powers + parts * SIDE * most);
    for (size at = first; at < last; at += most) {
        const size many = least(most, last - at), room = padded(many), panel = steps * parts * STEP;
        const size turned_panel = steps_of(many) * parts * STEP;
        const void *weight = place(h->weight, at * h->width, wide);
        lay_panels(&(Right){weight, h->width, h->width, many, wide, 0}, 0, steps_of(many), parts, panel, across);
        if (h->gradient)
            lay_panels(&(Right){weight, h->width, many, h->width, wide, 1}, 0, steps, parts, turned_panel, along);
        for (size row = first_row; row < last_row; row += SIDE) {
            const size rows = least(h->rows - row, SIDE);
            const void *from = place(h->x, row * h->width, wide);
            const Left x = !wide && rows == SIDE ? (Left){from, h->width, 16 * h->width, SIDE, steps}
                                                 : lay_rows(from, h->width, wide, rows, h->width, parts, laid);
            for (size each = 0; each < steps_of(many); each++)
                logits_of(&x, across + each * panel, parts, logits + SIDE * each, room);
            for (size i = 0; i < rows; i++)
                weigh(h, logits + i * room, at, many, h->targets[row + i], &seen[row + i], sums + (row + i) * wide_row);
            if (!h->gradient) continue;
            const Left p = lay_rows(logits, room, 1, rows, room, parts, powers);
            for (size each = 0; each < steps; each++)
                multiply(&p, 1, along + each * turned_panel, parts, sums + row * wide_row + SIDE * each, wide_row, 1);
        }
    }
}

/* What was seen of a row in all parts, so far from each other, is put together. */
static void conclude(const Head *h, size row, const Seen *seen, const float *sums, size apart, void *dx, float *loss,
                     int64_t *hit) {
    const size target = h->targets[row], width = h->width, wide_row = padded(width);
    const int wide = h->parts == FLOAT_PARTS;
    Seen all = NOTHING;
    float shares[SPLITS];
    for (int i = 0; i < SPLITS; i++) {
        const Seen own = seen[i * apart + row];
        if (own.greatest > all.greatest) all.greatest = own.greatest, all.first = own.first;
        if (own.own > all.own || own.own != own.own) all.own = own.own;
    }
    for (int i = 0; i < SPLITS; i++) {
        shares[i] = power_of(seen[i * apart + row].greatest - all.greatest);
        all.others += shares[i] * seen[i * apart + row].others;
    }
    const float total = all.others + power_of(all.own - all.greatest), inverse = 1 / total;
    *loss = all.own == all.greatest ? log1pf(all.others) : logf(total) + (all.greatest - all.own);
    *hit = all.own == all.own && all.first == target;
    for (size j = 0; h->gradient && j < width; j++) {
        float sum = 0;
        for (int i = 0; i < SPLITS; i++) sum += shares[i] * sums[(i * apart + row) * wide_row + j];
        sum -= all.others * number_at(h->weight, target * width + j, wide);
        void *to = place(dx, row * width + j, wide);
        if (wide)
            *(float *)to = sum * inverse;
        else
            *(bfloat16 *)to = narrow_bfloat16(sum * inverse);
    }
}

/* Losses and hits of rows, and, with a gradient, dx. Seen is [SPLITS, padded(rows)], sums [SPLITS, padded(rows),
   padded(width)], or nothing without a gradient. */
void head(const void *x, size rows, size width, const void *weight, size classes, const void *bias,
          const int64_t *targets, int gradient, float *losses, int64_t *hits, void *dx, Seen *seen, float *sums,
          bfloat16 *work, size of_work, int parts, int threads) {
    const Head h = {x, weight, bias, rows, width, classes, targets, parts, gradient};
    const size apart = padded(rows), wide_row = padded(width), blocks = steps_of(rows), panels = steps_of(classes);
    size by_rows = threads; /* so that all threads have as much to do: threads / gcd(threads, SPLITS) */
    for (int i = 2; i <= SPLITS; i *= 2)
        if (by_rows % 2 == 0) by_rows /= 2;
    by_rows = least(by_rows, blocks);
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (size unit = 0; unit < SPLITS * by_rows; unit++) {
            const size split = unit / by_rows, of_rows = unit % by_rows;
            const size first_row = SIDE * (blocks * of_rows / by_rows);
            const size last_row = least(SIDE * (blocks * (of_rows + 1) / by_rows), rows);
            Seen *own = seen + split * apart;
            float *own_sums = sums + split * apart * wide_row;
            for (size row = first_row; row < last_row; row++) own[row] = NOTHING;
            for (size row = first_row; gradient && row < padded(last_row); row++)
                memset(own_sums + row * wide_row, 0, wide_row * sizeof *sums);
            head_part(&h, first_row, last_row, SIDE * (panels * split / SPLITS),
                      least(SIDE * (panels * (split + 1) / SPLITS), classes), own, own_sums,
                      work + omp_get_thread_num() * of_work);
        }
        end_tiles();
#pragma omp for schedule(static)
        for (size row = 0; row < rows; row++) conclude(&h, row, seen, sums, apart, dx, &losses[row], &hits[row]);
    }
}
