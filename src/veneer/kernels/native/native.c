/* Element-wise and row-wise parts of a training step on processors, each in one pass over its operands.

   What each computes, and where it rounds, is said by the plain form in the Python file that calls it; here it is done
   for float and for bfloat16 (forms.h is included once for either). Sums and functions are computed in float.

   All arrays are dense but where strides are given, counted in numbers. Threads are OpenMP's, of the library that torch
   has loaded: the object is linked without one of its own, since two pools would wait for each other's cores. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;
typedef int64_t size;

static inline float wide_bfloat16(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* To the nearest, ties to even. What is no number stays none: such come from 16-bit numbers or are made by the
   processor, and neither has ones in the half that is rounded away. */
static inline bfloat16 narrow_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* exp of x up to 88: 2^n times a polynomial on |r| <= log(2)/2, within two units of the last place; in a form that
   compilers vectorise. x log2(e) is rounded to n by adding a number whose last place is one. */
static inline float exp_of(float x) {
    const float ones = 12582912.0f;
    float shifted = x * 1.44269504088896341f + ones;
    float n = shifted - ones;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t power, of_n;
    memcpy(&power, &p, sizeof power);
    memcpy(&of_n, &shifted, sizeof of_n);
    power += of_n << 23;
    memcpy(&p, &power, sizeof p);
    return p;
}

/* The same of any x up to 88: nought below the least normal number, nothing of what is none. */
static inline float power_of(float x) {
    float y = exp_of(x);
    return x < -87.0f ? 0.0f : y;
}

/* Gates are x * sigmoid(a(x)), sigmoid(a) = 1 / (1 + e), e = exp(-a): SiLU with a = x, GELU's tanh form with
   a = 2 sqrt(2/pi) (x + 0.044715 x^3). */
enum { SILU = 0, GELU_TANH = 1 };

static inline float inner_of(float x, int act) {
    return act == SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
}

static inline float slope_of(float x, int act) {
    return act == SILU ? 1.0f : 1.5957691216057308f * (1.0f + 0.134145f * x * x);
}

/* 1 / y of y from 1 to 1e30: Newton's steps from a guess by the exponent. */
static inline float inverse_of(float y) {
    uint32_t bits;
    memcpy(&bits, &y, sizeof bits);
    bits = 0x7ef311c7u - bits;
    float z;
    memcpy(&z, &bits, sizeof z);
    z = z + z * (1.0f - y * z); /* fused, so that the last one rounds once */
    z = z + z * (1.0f - y * z);
    return z + z * (1.0f - y * z);
}

/* exp(-x) within bounds that make no difference to 1 / (1 + exp(-x)), and beyond which products with it would be too
   small to be normal numbers, for which processors take a hundred times as long. */
static inline float against_of(float x) { return exp_of(-x < 60.0f ? (-x > -60.0f ? -x : -60.0f) : 60.0f); }

#define SUMMED _Pragma("omp simd reduction(+ : sum)")
#define EACH_HEAD(many)                                                                  \
    _Pragma("omp parallel for collapse(2) num_threads(threads) schedule(static)")         \
    for (size row = 0; row < rows; row++)                                                 \
        for (size head = 0; head < heads; head++)                                         \
            for (size place = 0, at = (row * heads + head) * (many); place < (many); place++, at++)
#define EACH_ROW _Pragma("omp parallel for num_threads(threads) schedule(static)")

#define CONCAT_(a, b) a##_##b
#define CONCAT(a, b) CONCAT_(a, b)
#define FORM(name) CONCAT(name, NUMBER)

#define NUMBER float
#define LEAST -3.4028234e38f
#define WIDE(x) (x)
#define NARROW(x) (x)
#include "forms.h"
#undef NUMBER
#undef LEAST
#undef WIDE
#undef NARROW

#define NUMBER bfloat16
#define LEAST -3.3895314e38f
#define WIDE(x) wide_bfloat16(x)
#define NARROW(x) narrow_bfloat16(x)
#include "forms.h"

/* Of all that the forms by tiles need: a virtual machine may leave some of it out. */
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512BF16__) && defined(__x86_64__) && defined(__linux__)
#include "panels.h"

#include "products.h"

#include "thin.h"

#include "low_rank.h"

#include "attention.h"

#include "head.h"
#else
size products_there(void) { return 0; }
#endif
