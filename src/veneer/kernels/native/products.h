/* Products of bfloat16 matrices by tiles (Intel AMX).

   A product is a sum of terms, each left [rows, depth] times right, which is [columns, depth] or [depth, columns].
   Nothing is rounded before all is added up. Lefts are read where they are: their depth is a multiple of 32, what is
   beyond that of the right being nought. Rights are laid out as tiles take them, 32 columns at a time (a panel): for
   each 32 of depth two tiles, in which pairs that are neighbours in depth stand beside each other. As many panels as fit
   caches are laid out at once. Threads share out panels, or rows where there are few panels. */

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 32, TILE = SIDE * 16, STEP = 2 * TILE, TERMS = 16 };
enum { RIGHTS = 512 << 10, LEFTS = 256 << 10 }; /* numbers that are laid out, and multiplied with these, at once */

/* What is called of_... is the stride of that array's rows, counted in numbers. */
typedef struct {
    const bfloat16 *left;
    size of_left;
    const void *right;
    size of_right;
    int wide;     /* right is float */
    int by_depth; /* right is [depth, columns] */
    size depth, columns;
} Term;

typedef struct {
    Term terms[TERMS];
    int count;
    size rows, columns;
    void *to;
    size of_to;
    int wide;   /* what it gives is float */
    int turned; /* and goes to [columns, rows] */
    const bfloat16 *bias;
    float scale;
} Product;

/* 32 rows of a left, their stride, and the depth in steps of 32. */
typedef struct {
    const bfloat16 *at;
    size of, steps;
} Left;

static inline size steps_of(size depth) { return (depth + SIDE - 1) / SIDE; }

static inline __mmask32 first_of(size many) { return many >= 32 ? ~0u : many <= 0 ? 0 : (1u << many) - 1; }

/* Up to 32 numbers from a row of a right, as bfloat16. */
static inline __m512i loaded(const Term *term, size at, size many) {
    const __mmask32 there = first_of(many);
    if (!term->wide) return _mm512_maskz_loadu_epi16(there, (const bfloat16 *)term->right + at);
    const float *from = (const float *)term->right + at;
    const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, from);
    const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(there >> 16), from + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* 16 rows of 16 pairs become 16 rows of the pairs at one place each. */
static inline void turn(__m512i *r, bfloat16 *to) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + 32 * i, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + 32 * (i + 8), _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512(to + 32 * (i + 4), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(to + 32 * (i + 12), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

/* 32 columns of a right, from the given one on; what is beyond its ends is nought. */
static bfloat16 *lay_out(const Term *term, size column, bfloat16 *to) {
    const size columns = term->columns - column;
    if (term->by_depth) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (size pair = 0; pair < 16 * steps_of(term->depth); pair++) {
            const size at = 2 * pair, left = term->depth - at;
            const __m512i a = left > 0 ? loaded(term, at * term->of_right + column, columns) : _mm512_setzero_si512();
            const __m512i b =
                left > 1 ? loaded(term, (at + 1) * term->of_right + column, columns) : _mm512_setzero_si512();
            bfloat16 *tile = to + pair / 16 * STEP + pair % 16 * 32;
            _mm512_storeu_si512(tile, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(tile + TILE, _mm512_permutex2var_epi16(a, high, b));
        }
    } else {
        for (size step = 0; step < steps_of(term->depth); step++)
            for (int tile = 0; tile < 2; tile++) {
                __m512i r[16];
                for (int i = 0; i < 16; i++)
                    r[i] = 16 * tile + i < columns ? loaded(term, (column + 16 * tile + i) * term->of_right + 32 * step,
                                                            term->depth - 32 * step)
                                                   : _mm512_setzero_si512();
                turn(r, to + step * STEP + tile * TILE);
            }
    }
    return to + steps_of(term->depth) * STEP;
}

/* Compilers are not told what loads of tiles read: all that was written before is to be there. */
#define SETTLED __asm__ volatile("" ::: "memory")

static void begin_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    SETTLED;
    _tile_loadconfig(&config);
}

static void end_tiles(void) { _tile_release(); }

/* 32 x 32 numbers. */
static void multiply(const Left *lefts, int count, const bfloat16 *panel, float *to) {
    SETTLED;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int term = 0; term < count; term++) {
        const size of = lefts[term].of;
        const bfloat16 *left = lefts[term].at, *below = left + 16 * of;
        for (size step = 0; step < lefts[term].steps; step++, panel += STEP, left += SIDE, below += SIDE) {
            _tile_loadd(6, panel, 64);
            _tile_loadd(4, left, 2 * of);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, panel + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, below, 2 * of);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, to, 4 * SIDE);
    _tile_stored(1, to + 16, 4 * SIDE);
    _tile_stored(2, to + 16 * SIDE, 4 * SIDE);
    _tile_stored(3, to + 16 * SIDE + 16, 4 * SIDE);
}

/* A block of 32 x 32 sums to its place in what the product gives. */
static void put(const Product *p, const float *block, size row, size column) {
    const size rows = p->rows - row < SIDE ? p->rows - row : SIDE;
    const size columns = p->columns - column < SIDE ? p->columns - column : SIDE;
    const __mmask32 there = first_of(columns);
    if (p->turned) { /* of few columns: no need to be fast */
        for (size j = 0; j < columns; j++)
            for (size i = 0; i < rows; i++) {
                const size at = (column + j) * p->of_to + row + i;
                const float y = block[i * SIDE + j] * p->scale;
                if (p->wide)
                    ((float *)p->to)[at] = y;
                else
                    ((bfloat16 *)p->to)[at] = narrow_bfloat16(y);
            }
        return;
    }
    __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (p->bias) {
        const __m512i both = _mm512_maskz_loadu_epi16(there, p->bias + column);
        bias[0] = _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(both));
        bias[1] = _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(both, 1));
    }
    const __m512 scale = _mm512_set1_ps(p->scale);
    for (size i = 0; i < rows; i++) {
        const __m512 low = _mm512_fmadd_ps(_mm512_loadu_ps(block + i * SIDE), scale, bias[0]);
        const __m512 high = _mm512_fmadd_ps(_mm512_loadu_ps(block + i * SIDE + 16), scale, bias[1]);
        const size at = (row + i) * p->of_to + column;
        if (p->wide) {
            _mm512_mask_storeu_ps((float *)p->to + at, (__mmask16)there, low);
            _mm512_mask_storeu_ps((float *)p->to + at + 16, (__mmask16)(there >> 16), high);
        } else
            _mm512_mask_storeu_epi16((bfloat16 *)p->to + at, there, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

static size steps_of_all(const Product *p) {
    size steps = 0;
    for (int i = 0; i < p->count; i++) steps += steps_of(p->terms[i].depth);
    return steps;
}

/* The rows that are left over below the last 32, with noughts below them: tiles would read beyond the end. */
static void copy_last(const Product *p, Left *lefts, bfloat16 *to) {
    const size first = p->rows / SIDE * SIDE;
    for (int i = 0; i < p->count; i++) {
        const Term *term = &p->terms[i];
        const size width = SIDE * steps_of(term->depth);
        lefts[i] = (Left){to, width, steps_of(term->depth)};
        for (size row = first; row < first + SIDE; row++, to += width)
            if (row < p->rows)
                memcpy(to, term->left + row * term->of_left, width * sizeof *to);
            else
                memset(to, 0, width * sizeof *to);
    }
}

/* Some rows and panels of a product. Work has room for the panels laid out at once, and for one more. */
static void part(const Product *p, size first_row, size last_row, size first_panel, size last_panel, bfloat16 *work) {
    if (first_row >= last_row || first_panel >= last_panel) return;
    Left lefts[TERMS], last[TERMS];
    const size steps = steps_of_all(p);
    const size panels = RIGHTS / (steps * STEP) > 1 ? RIGHTS / (steps * STEP) : 1;
    const size rows = LEFTS / (steps * STEP) > 1 ? LEFTS / (steps * STEP) * SIDE : SIDE;
    float block[SIDE * SIDE] __attribute__((aligned(64)));
    if (last_row == p->rows && p->rows % SIDE) copy_last(p, last, work + panels * steps * STEP);
    for (size panel = first_panel; panel < last_panel; panel += panels) {
        const size end = panel + panels < last_panel ? panel + panels : last_panel;
        bfloat16 *to = work;
        for (size each = panel; each < end; each++)
            for (int i = 0; i < p->count; i++) to = lay_out(&p->terms[i], each * SIDE, to);
        for (size begin = first_row; begin < last_row; begin += rows)
            for (size each = panel; each < end; each++)
                for (size row = begin; row < last_row && row < begin + rows; row += SIDE) {
                    const int whole = p->rows - row >= SIDE;
                    for (int i = 0; whole && i < p->count; i++) {
                        const Term *term = &p->terms[i];
                        lefts[i] = (Left){term->left + row * term->of_left, term->of_left, steps_of(term->depth)};
                    }
                    multiply(whole ? lefts : last, p->count, work + (each - panel) * steps * STEP, block);
                    put(p, block, row, each * SIDE);
                }
    }
}

/* Numbers of work that a thread needs for products of this depth, all terms together, each padded to 32. */
size products_work_bfloat16(size depth) {
    const size panel = depth / SIDE * STEP;
    return (RIGHTS > panel ? RIGHTS : panel) + panel;
}

/* The share of one thread of several products, which don't need each other. */
static void share(const Product *products, int count, int thread, int threads, bfloat16 *work) {
    size panels = 0;
    for (int i = 0; i < count; i++) panels += steps_of(products[i].columns);
    const int by_rows = panels < 4 * threads;
    size first = panels * thread / threads, last = panels * (thread + 1) / threads;
    for (int i = 0; i < count; i++) {
        const Product *p = &products[i];
        const size own = steps_of(p->columns), blocks = steps_of(p->rows);
        if (by_rows)
            part(p, blocks * thread / threads * SIDE,
                 thread + 1 == threads ? p->rows : blocks * (thread + 1) / threads * SIDE, 0, own, work);
        else
            part(p, 0, p->rows, first < 0 ? 0 : first, last < own ? last : own, work);
        first -= own;
        last -= own;
    }
}

/* Whether the system lets this process use tiles: a request of Linux's, ARCH_REQ_XCOMP_PERM for tiles' data. */
size products_there_bfloat16(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
