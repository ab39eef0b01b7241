/* Products of float one side of which is narrow, by vectors: for tiles the other one would have to be laid out, which
   takes longer than the product. Some depth is gone through at a time: what is read of the right is near, and sums of
   few numbers are more exact. */

enum { TALL = 8, VECTORS = 3, WIDTH = 16 * VECTORS, DEEP = 32 };

/* to = scale * left right. Left is read number by number, with strides by row and by depth; right [depth, columns] by
   vectors. What is given has as many columns as room, noughts after those of right. */
typedef struct {
    const float *left;
    size of_row, of_depth;
    const float *right;
    size of_right, rows, depth, columns;
    float *to;
    size of_to, room;
    float scale;
} Thin;

/* Some depth of 8 rows and up to 48 columns; all but the first is added to what is there. */
static inline __attribute__((always_inline)) void thin_block(const Thin *p, size row, size column, size first, size last,
                                                             const int vectors) {
    __m512 sums[TALL][VECTORS], scale = _mm512_set1_ps(p->scale);
    __mmask16 there[VECTORS], kept[VECTORS];
    const float *lefts[TALL], *right = p->right + first * p->of_right + column;
    const size of_depth = p->of_depth, of_right = p->of_right, rows = least(p->rows - row, TALL);
    for (int v = 0; v < vectors; v++) {
        there[v] = (__mmask16)first_of(least(p->columns - column - 16 * v, 16));
        kept[v] = (__mmask16)first_of(least(p->room - column - 16 * v, 16));
    }
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++) {
        lefts[i] = p->left + (row + least(i, rows - 1)) * p->of_row + first * of_depth; /* what is too many is not kept */
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sums[i][v] = _mm512_setzero_ps();
    }
    for (size at = 0; at < last - first; at++, right += of_right) {
        __m512 found[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) found[v] = _mm512_maskz_loadu_ps(there[v], right + 16 * v);
#pragma GCC unroll 8
        for (int i = 0; i < TALL; i++) {
            const __m512 factor = _mm512_set1_ps(lefts[i][at * of_depth]);
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sums[i][v] = _mm512_fmadd_ps(factor, found[v], sums[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
        if (i < rows) {
            float *to = p->to + (row + i) * p->of_to + column;
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) {
                const __m512 before = first ? _mm512_maskz_loadu_ps(kept[v], to + 16 * v) : _mm512_setzero_ps();
                _mm512_mask_storeu_ps(to + 16 * v, kept[v], _mm512_fmadd_ps(sums[i][v], scale, before));
            }
        }
}

static void thin_rows(const Thin *p, size row, size last_row, size column, size first, size last) {
    for (; row < last_row; row += TALL)
        if (p->room - column > 32)
            thin_block(p, row, column, first, last, 3);
        else if (p->room - column > 16)
            thin_block(p, row, column, first, last, 2);
        else
            thin_block(p, row, column, first, last, 1);
}

/* The share of one thread of many rows with few columns. */
static void share_tall(const Thin *p, int thread, int threads) {
    const size tall = (p->rows + TALL - 1) / TALL;
    const size begin = TALL * (tall * thread / threads), end = least(p->rows, TALL * (tall * (thread + 1) / threads));
    for (size row = begin; row < end; row += TALL)
        for (size first = 0; first < p->depth; first += DEEP)
            thin_rows(p, row, least(row + TALL, end), 0, first, least(first + DEEP, p->depth));
}

typedef struct {
    size first, last;
} Columns;

static inline Columns columns_of(const Thin *p, int thread, int threads) {
    const size blocks = (p->columns + WIDTH - 1) / WIDTH;
    return (Columns){WIDTH * (blocks * thread / threads), least(p->columns, WIDTH * (blocks * (thread + 1) / threads))};
}

/* Of few rows with many columns. */
static void share_deep(const Thin *p, int thread, int threads) {
    const Columns own = columns_of(p, thread, threads);
    for (size first = 0; first < p->depth; first += DEEP)
        for (size column = own.first; column < own.last; column += WIDTH)
            thin_rows(p, 0, p->rows, column, first, least(first + DEEP, p->depth));
}

/* The same, given turned: [columns, rows]. Work has room for all. */
static void share_turned(const Thin *p, int thread, int threads, float *work) {
    Thin some = *p;
    some.to = work;
    some.of_to = p->room;
    share_deep(&some, thread, threads);
    const Columns own = columns_of(p, thread, threads);
    for (size column = own.first; column < own.last; column++)
        for (size row = 0; row < p->rows; row++) p->to[column * p->of_to + row] = work[row * p->room + column];
}
