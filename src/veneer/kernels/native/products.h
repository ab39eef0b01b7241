/* Products of matrices by tiles, of bfloat16 or of float.

   A product is a sum of terms, each left [rows, depth] times right, which is [columns, depth] or [depth, columns].
   Nothing is rounded before all is added up. Lefts of bfloat16 are read where they are, their depth being a multiple of
   32 with noughts beyond that of the right; those of float are laid out when they are needed. As many panels as fit
   caches are laid out at once; where what is given is float, some of the depth is gone through at a time.
   Threads share out panels, or rows where there are few panels. */

#include <sys/syscall.h>
#include <unistd.h>

enum { TERMS = 16, CHUNK = 72 }; /* steps of depth, times parts, that are gone through at once where sums are float */
enum { RIGHTS = 576 << 10 };      /* numbers that are laid out at once */

/* What is called of_... is the stride of that array's rows, counted in numbers. */
typedef struct {
    const void *left;
    size of_left;
    Right right;
} Term;

typedef struct {
    Term terms[TERMS];
    int count, parts;
    size rows, columns;
    void *to;
    size of_to;
    int wide;   /* what it gives is float */
    int turned; /* and goes to [columns, rows] */
    int onto;   /* and is added to what is there, which is float */
    const void *bias;
    float scale;
} Product;

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

static inline void narrow_steps(const Left *left, const bfloat16 *panel) {
    const bfloat16 *at = left->at;
    for (size step = 0; step < left->steps; step++, panel += STEP, at += left->next) {
        _tile_loadd(6, panel, 64);
        _tile_loadd(4, at, 2 * left->of);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, at + left->below, 2 * left->of);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

#define TAKE_LEFT(part)                            \
    _tile_loadd(4, left + (part) * STEP, 64);      \
    _tile_loadd(5, left + (part) * STEP + TILE, 64)
#define TAKE_RIGHT(part)                           \
    _tile_loadd(6, right + (part) * STEP, 64);     \
    _tile_loadd(7, right + (part) * STEP + TILE, 64)
/* What was taken, while a sixth of the next step's right comes near: it is all read once for each 32 rows. */
#define ADD_UP(sixth)                                                               \
    _tile_dpbf16ps(0, 4, 6);                                                        \
    _tile_dpbf16ps(1, 4, 7);                                                        \
    _tile_dpbf16ps(2, 5, 6);                                                        \
    _tile_dpbf16ps(3, 5, 7);                                                        \
    for (int line = 16 * (sixth); line < 16 * (sixth) + 16; line++)                 \
        _mm_prefetch((const char *)(right + FLOAT_PARTS * STEP + 32 * line), _MM_HINT_T0)

/* The small ones first, in an order that keeps one side of most. */
static inline void float_steps(const Left *laid, const bfloat16 *right) {
    const bfloat16 *left = laid->at;
    for (size step = 0; step < laid->steps; step++, left += FLOAT_PARTS * STEP, right += FLOAT_PARTS * STEP) {
        TAKE_RIGHT(0);
        TAKE_LEFT(2);
        ADD_UP(0);
        TAKE_LEFT(1);
        ADD_UP(1);
        TAKE_RIGHT(1);
        ADD_UP(2);
        TAKE_LEFT(0);
        ADD_UP(3);
        TAKE_RIGHT(2);
        ADD_UP(4);
        TAKE_RIGHT(0);
        ADD_UP(5);
    }
}

/* 32 x 32 numbers, to rows so far from each other; or added to what is there. */
static void multiply(const Left *lefts, int count, const bfloat16 *panel, int parts, float *to, size of_to, int onto) {
    float *below = to + 16 * of_to;
    const size bytes = 4 * of_to;
    SETTLED;
    if (onto) {
        _tile_loadd(0, to, bytes);
        _tile_loadd(1, to + 16, bytes);
        _tile_loadd(2, below, bytes);
        _tile_loadd(3, below + 16, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < count; i++) {
        if (parts == NARROW_PARTS)
            narrow_steps(&lefts[i], panel);
        else
            float_steps(&lefts[i], panel);
        panel += lefts[i].steps * parts * STEP;
    }
    _tile_stored(0, to, bytes);
    _tile_stored(1, to + 16, bytes);
    _tile_stored(2, below, bytes);
    _tile_stored(3, below + 16, bytes);
}

/* A block whose columns are rows of what is given: they are few, there is no need to be fast. */
static void put_turned(const Product *p, const float *block, size row, size column, size rows, size columns) {
    for (size j = 0; j < columns; j++)
        for (size i = 0; i < rows; i++) {
            void *to = place(p->to, (column + j) * p->of_to + row + i, p->wide);
            const float y = block[i * SIDE + j] * p->scale;
            if (p->wide)
                *(float *)to = p->onto ? *(float *)to + y : y;
            else
                *(bfloat16 *)to = narrow_bfloat16(y);
        }
}

/* A block of 32 x 32 sums to its place in what the product gives. */
static void put(const Product *p, const float *block, size row, size column) {
    const size rows = least(p->rows - row, SIDE), columns = least(p->columns - column, SIDE);
    if (p->turned) {
        put_turned(p, block, row, column, rows, columns);
        return;
    }
    const __mmask32 there = first_of(columns);
    const __mmask16 first = (__mmask16)there, second = (__mmask16)(there >> 16);
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    if (p->bias && p->parts == NARROW_PARTS) {
        const __m512i both = _mm512_maskz_loadu_epi16(there, (const bfloat16 *)p->bias + column);
        low = low_of(both), high = high_of(both);
    } else if (p->bias) {
        low = _mm512_maskz_loadu_ps(first, (const float *)p->bias + column);
        high = _mm512_maskz_loadu_ps(second, (const float *)p->bias + column + 16);
    }
    const __m512 scale = _mm512_set1_ps(p->scale);
    for (size i = 0; i < rows; i++) {
        __m512 a = _mm512_fmadd_ps(_mm512_loadu_ps(block + i * SIDE), scale, low);
        __m512 b = _mm512_fmadd_ps(_mm512_loadu_ps(block + i * SIDE + 16), scale, high);
        void *at = place(p->to, (row + i) * p->of_to + column, p->wide);
        if (p->onto) {
            a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(first, at));
            b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(second, (float *)at + 16));
        }
        if (p->wide) {
            _mm512_mask_storeu_ps(at, first, a);
            _mm512_mask_storeu_ps((float *)at + 16, second, b);
        } else
            _mm512_mask_storeu_epi16(at, there, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

static size steps_of_all(const Product *p) {
    size steps = 0;
    for (int i = 0; i < p->count; i++) steps += steps_of(p->terms[i].right.depth);
    return steps;
}

/* 32 rows of all lefts: where they are, or laid out. Tiles would read beyond the end of fewer rows. */
static void take_rows(const Product *p, size row, Left *lefts, bfloat16 *to) {
    const int wide = p->parts > NARROW_PARTS;
    for (int i = 0; i < p->count; i++) {
        const Term *term = &p->terms[i];
        const size of = term->of_left, depth = term->right.depth, steps = steps_of(depth);
        const void *at = place(term->left, row * of, wide);
        if (!wide && p->rows - row >= SIDE)
            lefts[i] = (Left){at, of, 16 * of, SIDE, steps};
        else {
            lefts[i] = lay_rows(at, of, wide, p->rows - row, depth, p->parts, to);
            to += steps * p->parts * STEP;
        }
    }
}

/* Some rows and panels of a product. Work has room for the panels laid out at once, and for one more. */
static void part(const Product *p, size first_row, size last_row, size first_panel, size last_panel, bfloat16 *work) {
    if (first_row >= last_row || first_panel >= last_panel) return;
    const size of_panel = steps_of_all(p) * p->parts * STEP;
    const size many = last_panel - first_panel, most = RIGHTS / of_panel > 1 ? RIGHTS / of_panel : 1;
    const size times = (many + most - 1) / most, panels = (many + times - 1) / times;
    Left lefts[TERMS];
    float block[SIDE * SIDE] __attribute__((aligned(64)));
    for (size panel = first_panel; panel < last_panel; panel += panels) {
        const size end = least(panel + panels, last_panel);
        bfloat16 *to = work;
        for (int i = 0; i < p->count; i++) {
            lay_panels(&p->terms[i].right, panel * SIDE, end - panel, p->parts, of_panel, to);
            to += steps_of(p->terms[i].right.depth) * p->parts * STEP;
        }
        for (size row = first_row; row < last_row; row += SIDE) {
            take_rows(p, row, lefts, work + panels * of_panel);
            for (size each = panel; each < end; each++) {
                multiply(lefts, p->count, work + (each - panel) * of_panel, p->parts, block, SIDE, 0);
                put(p, block, row, each * SIDE);
            }
        }
    }
}

/* Some steps of a product's depth. */
static Product some_of(const Product *p, size first, size last) {
    Product some = *p;
    some.count = 0;
    some.onto = first > 0;
    if (some.onto) some.bias = NULL;
    for (int i = 0; i < p->count; i++) {
        Term term = p->terms[i];
        Right *right = &term.right;
        const size steps = steps_of(right->depth), from = SIDE * (first > 0 ? first : 0);
        if (first < steps && last > 0) {
            term.left = place(term.left, from, p->parts > NARROW_PARTS);
            right->at = place(right->at, right->by_depth ? from * right->of_at : from, right->wide);
            right->depth = least(right->depth, SIDE * last) - from;
            some.terms[some.count++] = term;
        }
        first -= steps;
        last -= steps;
    }
    return some;
}

static inline size chunks_of(size steps, int parts, int wide) {
    return wide ? (steps * parts + CHUNK - 1) / CHUNK : 1;
}

/* Numbers of work that a thread needs for products of this depth, all terms together, each padded to 32; wide: all that
   give float. */
size products_work(size depth, int parts, int wide) {
    const size steps = wide ? least(depth / SIDE, CHUNK / parts) : depth / SIDE, panel = steps * parts * STEP;
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
        const size own = steps_of(p->columns), blocks = steps_of(p->rows), steps = steps_of_all(p);
        const size chunks = chunks_of(steps, p->parts, p->wide);
        for (size chunk = 0; chunk < chunks; chunk++) {
            const Product some = some_of(p, steps * chunk / chunks, steps * (chunk + 1) / chunks);
            if (by_rows)
                part(&some, blocks * thread / threads * SIDE,
                     thread + 1 == threads ? p->rows : blocks * (thread + 1) / threads * SIDE, 0, own, work);
            else
                part(&some, 0, p->rows, first < 0 ? 0 : first, least(last, own), work);
        }
        first -= own;
        last -= own;
    }
}

/* y = x right' + bias, or x right where that is [depth, columns]; y may be wide where the others are not. */
void product(const void *x, size rows, size depth, const void *right, size of_right, size columns, int by_depth,
             const void *bias, void *y, int wide, bfloat16 *work, size of_work, int parts, int threads) {
    const Term term = {x, depth, {right, of_right, depth, columns, parts == FLOAT_PARTS, by_depth}};
    const Product only = {{term}, 1, parts, rows, columns, y, columns, wide, .bias = bias, .scale = 1};
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
        share(&only, 1, omp_get_thread_num(), omp_get_num_threads(), work + omp_get_thread_num() * of_work);
        end_tiles();
    }
}

/* Whether the system lets this process use tiles: a request of Linux's, ARCH_REQ_XCOMP_PERM for tiles' data. */
size products_there(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
