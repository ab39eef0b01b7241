/* The forms for one type of numbers: NUMBER, made wide by WIDE, rounded to it by NARROW. See native.c. */

/* y = weight * round(x * rho), or round(x * rho * weight); rho is computed from x unless it is known. */
void FORM(rms_norm)(const NUMBER *x, const float *weight, NUMBER *y, float *rho, size rows, size width, float eps,
                    int rounded, int known, int threads) {
    EACH_ROW
    for (size row = 0; row < rows; row++) {
        const NUMBER *xs = x + row * width;
        NUMBER *ys = y + row * width;
        if (!known) {
            float sum = 0;
            SUMMED
            for (size i = 0; i < width; i++) sum += WIDE(xs[i]) * WIDE(xs[i]);
            rho[row] = 1.0f / sqrtf(sum / width + eps);
        }
        float factor = rho[row];
        if (rounded)
            for (size i = 0; i < width; i++) ys[i] = NARROW(WIDE(NARROW(WIDE(xs[i]) * factor)) * weight[i]);
        else
            for (size i = 0; i < width; i++) ys[i] = NARROW(WIDE(xs[i]) * factor * weight[i]);
    }
}

void FORM(rms_norm_backward)(const NUMBER *x, const float *weight, const float *rho, const NUMBER *dy, NUMBER *dx,
                             size rows, size width, int threads) {
    EACH_ROW
    for (size row = 0; row < rows; row++) {
        const NUMBER *xs = x + row * width, *dys = dy + row * width;
        NUMBER *dxs = dx + row * width;
        float factor = rho[row], sum = 0;
        SUMMED
        for (size i = 0; i < width; i++) sum += WIDE(dys[i]) * weight[i] * (WIDE(xs[i]) * factor);
        float mean = sum / width;
        for (size i = 0; i < width; i++)
            dxs[i] = NARROW((WIDE(dys[i]) * weight[i] - WIDE(xs[i]) * factor * mean) * factor);
    }
}

/* y = round(act(gate)) * up. */
static inline void FORM(gated_as)(const NUMBER *gate, const NUMBER *up, NUMBER *y, size rows, size width, const int act,
                                  int threads) {
    EACH_ROW
    for (size row = 0; row < rows; row++) {
        const NUMBER *gs = gate + row * width, *us = up + row * width;
        NUMBER *ys = y + row * width;
#pragma omp simd
        for (size i = 0; i < width; i++) {
            float g = WIDE(gs[i]), opened = inverse_of(1.0f + against_of(inner_of(g, act)));
            ys[i] = NARROW(WIDE(NARROW(g * opened)) * WIDE(us[i]));
        }
    }
}

void FORM(gated)(const NUMBER *gate, const NUMBER *up, NUMBER *y, size rows, size width, int act, int threads) {
    if (act == SILU)
        FORM(gated_as)(gate, up, y, rows, width, SILU, threads);
    else
        FORM(gated_as)(gate, up, y, rows, width, GELU_TANH, threads);
}

static inline void FORM(gated_backward_as)(const NUMBER *gate, const NUMBER *up, const NUMBER *dy, NUMBER *dgate,
                                           NUMBER *dup, size rows, size width, const int act, int threads) {
    EACH_ROW
    for (size row = 0; row < rows; row++) {
        const NUMBER *gs = gate + row * width, *us = up + row * width, *dys = dy + row * width;
        NUMBER *dgs = dgate + row * width, *dus = dup + row * width;
#pragma omp simd
        for (size i = 0; i < width; i++) {
            float g = WIDE(gs[i]), d = WIDE(dys[i]), against = against_of(inner_of(g, act));
            float opened = inverse_of(1.0f + against); /* and what is not: against * opened, without a difference */
            float slope = opened + g * opened * (against * opened) * slope_of(g, act);
            dgs[i] = NARROW(WIDE(NARROW(d * WIDE(us[i]))) * slope);
            dus[i] = NARROW(WIDE(NARROW(g * opened)) * d);
        }
    }
}

void FORM(gated_backward)(const NUMBER *gate, const NUMBER *up, const NUMBER *dy, NUMBER *dgate, NUMBER *dup, size rows,
                          size width, int act, int threads) {
    if (act == SILU)
        FORM(gated_backward_as)(gate, up, dy, dgate, dup, rows, width, SILU, threads);
    else
        FORM(gated_backward_as)(gate, up, dy, dgate, dup, rows, width, GELU_TANH, threads);
}

/* y = v * x + bias * (1 - v), v and bias by column. */
void FORM(scaled)(const NUMBER *x, const float *v, const NUMBER *bias, NUMBER *y, size rows, size width, int threads) {
    EACH_ROW
    for (size row = 0; row < rows; row++) {
        const NUMBER *xs = x + row * width;
        NUMBER *ys = y + row * width;
        if (bias)
            for (size i = 0; i < width; i++) ys[i] = NARROW(WIDE(xs[i]) * v[i] + WIDE(bias[i]) * (1.0f - v[i]));
        else
            for (size i = 0; i < width; i++) ys[i] = NARROW(WIDE(xs[i]) * v[i]);
    }
}

/* dx, and dv in float: sums by column of dy * (x - bias), of some rows at a time. */
void FORM(scaled_backward)(const NUMBER *x, const float *v, const NUMBER *bias, const NUMBER *dy, NUMBER *dx, float *dv,
                           size rows, size width, int threads) {
    enum { COLUMNS = 256, ROWS = 8 };
    EACH_ROW
    for (size first = 0; first < width; first += COLUMNS) {
        const size many = width - first < COLUMNS ? width - first : COLUMNS;
        float sums[COLUMNS] = {0}, taken[COLUMNS] = {0};
        for (size i = 0; bias && i < many; i++) taken[i] = WIDE(bias[first + i]);
        for (size begin = 0; begin < rows; begin += ROWS) {
            float some[COLUMNS] = {0};
            for (size row = begin; row < rows && row < begin + ROWS; row++) {
                const NUMBER *xs = x + row * width + first, *dys = dy + row * width + first;
                NUMBER *dxs = dx + row * width + first;
#pragma omp simd
                for (size i = 0; i < many; i++) {
                    const float d = WIDE(dys[i]);
                    dxs[i] = NARROW(d * v[first + i]);
                    some[i] += d * (WIDE(xs[i]) - taken[i]);
                }
            }
            for (size i = 0; i < many; i++) sums[i] += some[i];
        }
        memcpy(dv + first, sums, many * sizeof *dv);
    }
}

/* Turns heads [rows, heads, places, width] of any strides but the last; backward turns them back. Cosines and
   sines are dense [rows, places, width], or the same for all rows. */
void FORM(rotary)(const NUMBER *x, const size *of_x, const NUMBER *cos, const NUMBER *sin, size of_row, NUMBER *y,
                  const size *of_y, size rows, size heads, size places, size width, int backward, int threads) {
    const size half = width / 2;
    EACH_ROW
    for (size at = 0; at < rows * places; at++) {
        const size row = at / places, place = at % places;
        const NUMBER *c = cos + row * of_row + place * width, *s = sin + row * of_row + place * width;
        for (size head = 0; head < heads; head++) {
            const NUMBER *xs = x + row * of_x[0] + head * of_x[1] + place * of_x[2];
            NUMBER *ys = y + row * of_y[0] + head * of_y[1] + place * of_y[2];
#pragma omp simd
            for (size i = 0; i < half; i++) {
                float x1 = WIDE(xs[i]), x2 = WIDE(xs[i + half]);
                float s1 = WIDE(s[i]), s2 = WIDE(s[i + half]);
                float a = WIDE(NARROW(x1 * WIDE(c[i]))), b = WIDE(NARROW(x2 * WIDE(c[i + half])));
                if (backward) {
                    ys[i] = NARROW(a + WIDE(NARROW(x2 * s2)));
                    ys[i + half] = NARROW(b - WIDE(NARROW(x1 * s1)));
                } else {
                    ys[i] = NARROW(a - WIDE(NARROW(x2 * s1)));
                    ys[i + half] = NARROW(b + WIDE(NARROW(x1 * s2)));
                }
            }
        }
    }
}

/* Per row of logits: the loss, whether the target is the first of the greatest, and the gradient in their place. Work
   has a row for each thread. */
void FORM(cross_entropy)(NUMBER *logits, const int64_t *targets, float *losses, int64_t *hits, float *work, size rows,
                         size width, int gradient, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *powers = work + omp_get_thread_num() * width;
#pragma omp for schedule(static)
        for (size row = 0; row < rows; row++) {
            NUMBER *zs = logits + row * width;
            const size target = targets[row];
            float greatest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : greatest)
            for (size i = 0; i < width; i++) greatest = WIDE(zs[i]) > greatest ? WIDE(zs[i]) : greatest;
            const float own = WIDE(zs[target]);
            int first = own == greatest;
            for (size i = 0; first && i < target; i++) first = WIDE(zs[i]) != greatest;
            SUMMED
            for (size i = 0; i < width; i++) {
                powers[i] = power_of(WIDE(zs[i]) - greatest);
                sum += powers[i];
            }
            hits[row] = first;
            losses[row] = logf(sum) - (own - greatest);
            if (gradient) {
                const float share = 1.0f / sum;
                const float wanted = powers[target] * share - 1.0f;
                for (size i = 0; i < width; i++) zs[i] = NARROW(powers[i] * share);
                zs[target] = NARROW(wanted);
            }
        }
    }
}

/* Attention's scores are dense [rows, heads, queries, keys], keys and values [rows, groups, keys, width]: heads of a
   group are next to each other, so that all their queries are those of one product. Of place i the keys after first + i
   are in the future, where first is not negative. A mask is added; it has strides by row, head and query. */

/* A number as the sum of two of this type. */
static inline void FORM(in_two)(float value, NUMBER *parts) {
    value = value < LEAST ? LEAST : value;
    parts[0] = NARROW(value);
    parts[1] = NARROW(value - WIDE(parts[0]));
}

/* y = scale * x, of any strides but the last; then, with columns, two more numbers: those whose sum is taken * share, or
   share twice. */
void FORM(pack)(const NUMBER *x, const size *of_x, NUMBER *y, const size *of_y, size rows, size heads, size places,
                size width, float scale, int columns, const float *taken, float share, int threads) {
    EACH_HEAD(places) {
        const NUMBER *xs = x + row * of_x[0] + head * of_x[1] + place * of_x[2];
        NUMBER *ys = y + row * of_y[0] + head * of_y[1] + place * of_y[2];
        if (scale == 1)
            memcpy(ys, xs, width * sizeof *ys);
        else
            for (size i = 0; i < width; i++) ys[i] = NARROW(WIDE(xs[i]) * scale);
        if (columns && taken)
            FORM(in_two)(taken[at] * share, ys + width);
        else if (columns)
            ys[width] = ys[width + 1] = NARROW(share);
    }
}

/* These numbers anew, in the last two columns of rows that are as wide. */
void FORM(columns)(NUMBER *y, size rows, size width, const float *taken, float share, int threads) {
    EACH_ROW
    for (size row = 0; row < rows; row++) FORM(in_two)(taken[row] * share, y + (row + 1) * width - 2);
}

/* Sums of x * y over the last axis. */
void FORM(dots)(const NUMBER *x, const size *of_x, const NUMBER *y, const size *of_y, float *found, size rows,
                size heads, size places, size width, int threads) {
    EACH_HEAD(places) {
        const NUMBER *xs = x + row * of_x[0] + head * of_x[1] + place * of_x[2];
        const NUMBER *ys = y + row * of_y[0] + head * of_y[1] + place * of_y[2];
        float sum = 0;
        SUMMED
        for (size i = 0; i < width; i++) sum += WIDE(xs[i]) * WIDE(ys[i]);
        found[at] = sum;
    }
}

/* The greatest of scale * score + mask of each query, not below the least finite number. */
void FORM(greatest)(const NUMBER *scores, const NUMBER *mask, const size *of_mask, float *found, size rows, size heads,
                    size queries, size keys, size first, float scale, int threads) {
    EACH_HEAD(queries) {
        const size seen = first < 0 || first + place + 1 > keys ? keys : first + place + 1;
        const NUMBER *ss = scores + at * keys;
        float best = LEAST;
        if (mask) {
            const NUMBER *ms = mask + row * of_mask[0] + head * of_mask[1] + place * of_mask[2];
#pragma omp simd reduction(max : best)
            for (size i = 0; i < seen; i++) {
                const float score = WIDE(ss[i]) * scale + WIDE(ms[i]);
                best = score > best ? score : best;
            }
        } else {
#pragma omp simd reduction(max : best)
            for (size i = 0; i < seen; i++) {
                const float score = WIDE(ss[i]) * scale;
                best = score > best ? score : best;
            }
        }
        found[at] = best;
    }
}

/* exp(scale * score + mask) in the place of scores, nought for keys in the future; and their sums. */
void FORM(powers)(NUMBER *scores, const NUMBER *mask, const size *of_mask, float *sums, size rows, size heads,
                  size queries, size keys, size first, float scale, int threads) {
    EACH_HEAD(queries) {
        const size seen = first < 0 || first + place + 1 > keys ? keys : first + place + 1;
        NUMBER *ss = scores + at * keys;
        float sum = 0;
        if (mask) {
            const NUMBER *ms = mask + row * of_mask[0] + head * of_mask[1] + place * of_mask[2];
            SUMMED
            for (size i = 0; i < seen; i++) {
                const float power = power_of(WIDE(ss[i]) * scale + WIDE(ms[i]));
                ss[i] = NARROW(power);
                sum += WIDE(ss[i]);
            }
        } else {
            SUMMED
            for (size i = 0; i < seen; i++) {
                const float power = power_of(WIDE(ss[i]) * scale);
                ss[i] = NARROW(power);
                sum += WIDE(ss[i]);
            }
        }
        memset(ss + seen, 0, (keys - seen) * sizeof *ss);
        sums[at] = sum;
    }
}

/* change * powers in the place of change. */
void FORM(change)(NUMBER *change, const NUMBER *powers, size rows, size width, int threads) {
    EACH_ROW
    for (size row = 0; row < rows; row++) {
        NUMBER *cs = change + row * width;
        const NUMBER *ps = powers + row * width;
        for (size i = 0; i < width; i++) cs[i] = NARROW(WIDE(cs[i]) * WIDE(ps[i]));
    }
}

/* y = x / sum, nought where nothing was seen, x dense and y of any strides but the last; logs += log(sum). */
void FORM(divided)(const NUMBER *x, const float *sums, float *logs, NUMBER *y, const size *of_y, size rows, size heads,
                   size places, size width, int threads) {
    EACH_HEAD(places) {
        const NUMBER *xs = x + at * width;
        NUMBER *ys = y + row * of_y[0] + head * of_y[1] + place * of_y[2];
        const float share = sums[at] > 0 ? 1.0f / sums[at] : 0.0f;
        for (size i = 0; i < width; i++) ys[i] = NARROW(WIDE(xs[i]) * share);
        logs[at] = sums[at] > 0 ? logs[at] + logf(sums[at]) : 0.0f;
    }
}
