/* How matrices lie for tiles (Intel AMX), which multiply bfloat16 and add up float.

   A float is split in three parts, each the nearest bfloat16 of what is missing yet: x = a + b + c, with 8 bits each but
   for the smallest of numbers. Of the nine products of two numbers' parts the six with 2^-16 of the greatest or more are
   added up, the rest being below what float tells apart (Henry, Tang, Heinecke 2019, arXiv:1904.06376, sec. III). What is
   infinite, or within 2^-9 of the largest float, comes out as no number. A bfloat16 has one part.

   Lefts are laid out 32 rows at a time: for each 32 of depth, and each part, two tiles, one below the other. Rights 32
   columns at a time (a panel), two tiles beside each other, in which pairs in depth are beside each other, too: of
   bfloat16 neighbours, so that lefts can be read where they are; of float those that are 16 from each other. */

#include <immintrin.h>

enum { SIDE = 32, TILE = SIDE * 16, STEP = 2 * TILE, NARROW_PARTS = 1, FLOAT_PARTS = 3 };

static inline size steps_of(size depth) { return (depth + SIDE - 1) / SIDE; }

static inline size padded(size width) { return SIDE * steps_of(width); }

static inline size least(size a, size b) { return a < b ? a : b; }

/* The place of a number in an array of bfloat16, or float. */
static inline void *place(const void *array, size at, int wide) { return (char *)array + (wide ? 4 : 2) * at; }

static inline float number_at(const void *array, size at, int wide) {
    return wide ? ((const float *)array)[at] : wide_bfloat16(((const bfloat16 *)array)[at]);
}

static inline __mmask32 first_of(size many) { return many >= 32 ? ~0u : many <= 0 ? 0 : (1u << many) - 1; }

static inline __m512 low_of(__m512i x) { return _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(x)); }

static inline __m512 high_of(__m512i x) { return _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(x, 1)); }

/* Up to 32 numbers of a row as bfloat16, noughts after them. */
static inline __m512i narrow_row(const void *from, int wide, size many) {
    const __mmask32 there = first_of(many);
    if (!wide) return _mm512_maskz_loadu_epi16(there, from);
    const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, from);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps((__mmask16)(there >> 16), (const float *)from + 16), low);
}

/* The three parts of 16 floats each, in pairs. Halves are rounded up: adding half of its last place before what is below
   that is cut off rounds to the nearest; the last part has no more than 8 bits anyway. */
static inline void parts_of(__m512 a, __m512 b, __m512i *to) {
    const __m512i half = _mm512_set1_epi32(0x8000), kept = _mm512_set1_epi32((int)0xffff0000);
    for (int i = 0; i < FLOAT_PARTS; i++) {
        __m512i first = _mm512_castps_si512(a), second = _mm512_castps_si512(b);
        if (i + 1 < FLOAT_PARTS) {
            first = _mm512_add_epi32(first, half);
            second = _mm512_add_epi32(second, half);
            a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(first, kept)));
            b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(second, kept)));
        }
        to[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
    }
}

/* Of up to 32 numbers of a row, noughts after them. */
static inline void float_row(const float *from, size many, __m512i *to) {
    const __mmask32 there = first_of(many);
    const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, from);
    parts_of(low, _mm512_maskz_loadu_ps((__mmask16)(there >> 16), from + 16), to);
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

/* A right, [columns, depth] or by depth [depth, columns], of float if it is wide; of_at is the stride of its rows. */
typedef struct {
    const void *at;
    size of_at, depth, columns;
    int wide, by_depth;
} Right;

static void narrow_across(const Right *r, size column, bfloat16 *to) {
    for (size step = 0; step < steps_of(r->depth); step++)
        for (int half = 0; half < 2; half++, to += TILE) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) {
                const size at = column + 16 * half + i;
                rows[i] = narrow_row(place(r->at, at * r->of_at + SIDE * step, r->wide), r->wide,
                                     at < r->columns ? r->depth - SIDE * step : 0);
            }
            turn(rows, to);
        }
}

static void narrow_along(const Right *r, size column, size panels, size of_panel, bfloat16 *to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (size pair = 0; pair < 16 * steps_of(r->depth); pair++)
        for (size panel = 0; panel < panels; panel++) {
            const size first = column + SIDE * panel;
            __m512i rows[2];
            for (int i = 0; i < 2; i++)
                rows[i] = narrow_row(place(r->at, (2 * pair + i) * r->of_at + first, r->wide), r->wide,
                                     2 * pair + i < r->depth ? r->columns - first : 0);
            bfloat16 *tile = to + panel * of_panel + pair / 16 * STEP + pair % 16 * 32;
            _mm512_storeu_si512(tile, _mm512_permutex2var_epi16(rows[0], low, rows[1]));
            _mm512_storeu_si512(tile + TILE, _mm512_permutex2var_epi16(rows[0], high, rows[1]));
        }
}

static void float_across(const Right *r, size column, bfloat16 *to) {
    for (size step = 0; step < steps_of(r->depth); step++)
        for (int half = 0; half < 2; half++) {
            __m512i rows[FLOAT_PARTS][16], found[FLOAT_PARTS];
            for (int i = 0; i < 16; i++) {
                const size at = column + 16 * half + i;
                float_row((const float *)r->at + at * r->of_at + SIDE * step,
                          at < r->columns ? r->depth - SIDE * step : 0, found);
                for (int part = 0; part < FLOAT_PARTS; part++) rows[part][i] = found[part];
            }
            for (int part = 0; part < FLOAT_PARTS; part++)
                turn(rows[part], to + (step * FLOAT_PARTS + part) * STEP + half * TILE);
        }
}

static void float_along(const Right *r, size column, size panels, size of_panel, bfloat16 *to) {
    for (size pair = 0; pair < 16 * steps_of(r->depth); pair++) {
        const size row = pair / 16 * SIDE + pair % 16;
        const float *from = (const float *)r->at + row * r->of_at + column;
        for (size half = 0; half < 2 * panels; half++, from += 16) {
            const __mmask16 there = (__mmask16)first_of(least(r->columns - column - 16 * half, 16));
            bfloat16 *tile = to + half / 2 * of_panel + pair / 16 * FLOAT_PARTS * STEP + half % 2 * TILE + pair % 16 * 32;
            __m512i found[FLOAT_PARTS];
            parts_of(_mm512_maskz_loadu_ps(row < r->depth ? there : 0, from),
                     _mm512_maskz_loadu_ps(row + 16 < r->depth ? there : 0, from + 16 * r->of_at), found);
            for (int part = 0; part < FLOAT_PARTS; part++) _mm512_storeu_si512(tile + part * STEP, found[part]);
        }
    }
}

/* Panels of a right from the given column on, each so far from the one before; what is beyond its ends is nought. Rights
   by depth are read row by row. */
static void lay_panels(const Right *r, size column, size panels, int parts, size of_panel, bfloat16 *to) {
    const int narrow = parts == NARROW_PARTS;
    if (r->by_depth)
        (narrow ? narrow_along : float_along)(r, column, panels, of_panel, to);
    else
        for (size panel = 0; panel < panels; panel++)
            (narrow ? narrow_across : float_across)(r, column + SIDE * panel, to + panel * of_panel);
}

/* 32 rows of a left, or where it stands how these are loaded: from a row to the next, to the 16 below, to the next 32 of
   depth; all counted in numbers. */
typedef struct {
    const bfloat16 *at;
    size of, below, next, steps;
} Left;

/* Up to 32 rows; noughts below them, and after their depth. */
static Left lay_rows(const void *from, size of, int wide, size rows, size depth, int parts, bfloat16 *to) {
    const size steps = steps_of(depth);
    for (size row = 0; row < SIDE; row++)
        for (size step = 0; step < steps; step++) {
            const void *at = place(from, row * of + SIDE * step, wide);
            const size there = row < rows ? depth - SIDE * step : 0;
            bfloat16 *tile = to + step * parts * STEP + row * 32;
            if (parts == NARROW_PARTS)
                _mm512_storeu_si512(tile, narrow_row(at, wide, there));
            else {
                __m512i found[FLOAT_PARTS];
                float_row(at, there, found);
                for (int part = 0; part < FLOAT_PARTS; part++) _mm512_storeu_si512(tile + part * STEP, found[part]);
            }
        }
    return (Left){to, 32, TILE, parts * STEP, steps};
}
