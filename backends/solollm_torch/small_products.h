/* What `attention.c` is made of: vectors of float32, and products of matrices that fit into the core's
 * cache. Vectors are GCC's and Clang's own, so that one text serves every processor.
 */

#include "exponential.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

#ifdef __AVX512F__
typedef float vec __attribute__((vector_size(64), aligned(4)));
enum { WIDTH = 16, LANES = 16, TALL = 8 };
#else
typedef float vec __attribute__((vector_size(32), aligned(4)));
enum { WIDTH = 8, LANES = 16, TALL = 6 };
#endif
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef float quad __attribute__((vector_size(16), aligned(4)));

static inline i64 at_most(i64 value, i64 limit) { return value < limit ? value : limit; }
static inline i64 padded(i64 count) { return (count + LANES - 1) / LANES * LANES; }

/* x in the lanes where `those` is -1, y where it is 0. */
static inline vec choose(ivec those, vec x, vec y) {
    return (vec)((those & (ivec)x) | (~those & (ivec)y));
}

/* The vector at z + j, with `other` in the lanes that lie at `end` or after it. */
static inline vec up_to(i64 end, const float *z, i64 j, float other) {
    vec x = *(const vec *)(z + j);
    if (j + WIDTH <= end) return x;
    ivec lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    return choose(lane < (int32_t)(end - j), x, (vec){0} + other);
}

/* exp of each, for what is not above 88. NaN stays NaN. */
static inline vec exp_(vec x) {
    const vec round = (vec){0} + 12582912.0f; /* 1.5 2^23: a sum with it is a whole number */
    x = choose(x < -87.0f, (vec){0} - 87.0f, x);
    vec shifted = x * LOG2_E + round, n = shifted - round;
    vec r = x - n * LN_2_HIGH;
    r = r - n * LN_2_LOW;
    return EXP_NEAR_0(r) * (vec)(((ivec)shifted - (ivec)round + 127) << 23);
}

static inline quad quarter(vec x, int i) {
    union {
        vec whole;
        quad parts[WIDTH / 4];
    } both = {x};
    return both.parts[i];
}

static inline float sum_of(vec x) {
    quad sum = quarter(x, 0);
    for (int i = 1; i < WIDTH / 4; i++) sum += quarter(x, i);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static inline float largest_of(vec x) {
    quad top = quarter(x, 0);
    for (int i = 1; i < WIDTH / 4; i++)
        for (int lane = 0; lane < 4; lane++)
            top[lane] = quarter(x, i)[lane] > top[lane] ? quarter(x, i)[lane] : top[lane];
    float even = top[0] > top[2] ? top[0] : top[2], odd = top[1] > top[3] ? top[1] : top[3];
    return even > odd ? even : odd;
}

/* ---- Small products ---------------------------------------------------------------------------
 *
 * The right factor lies in panels of LANES columns, [columns / LANES, depth, LANES], so that a tile
 * of the result, TALL x 2 vectors, is held in registers while both factors are read once and in
 * order. With AVX-512 a vector is a panel and a tile takes two of them; else a panel is two vectors.
 */

/* c[0..tall, 0..wide WIDTH] (+)= a b over `depth`; the element (r, k) of a is a[r * row + k * step],
 * the second vector of b lies `apart` floats from the first. */
static inline __attribute__((always_inline)) void tile(int tall, int wide, i64 depth, const float *a,
                                                       i64 row, i64 step, const float *b, i64 apart,
                                                       float *c, i64 ldc, int add) {
    vec sums[TALL][2];
#pragma GCC unroll 8
    for (int r = 0; r < tall; r++) sums[r][0] = sums[r][1] = (vec){0};
    for (i64 k = 0; k < depth; k++) {
        vec left = *(const vec *)(b + k * LANES), right = left;
        if (wide == 2) right = *(const vec *)(b + apart + k * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < tall; r++) {
            float factor = a[r * row + k * step];
            sums[r][0] += factor * left;
            if (wide == 2) sums[r][1] += factor * right;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < tall; r++) {
        vec *to = (vec *)(c + r * ldc), *beside = (vec *)(c + r * ldc + WIDTH);
        *to = add ? *to + sums[r][0] : sums[r][0];
        if (wide == 2) *beside = add ? *beside + sums[r][1] : sums[r][1];
    }
}

static inline __attribute__((always_inline)) void tiles(int tall, int wide, i64 depth,
                                                        const float *a, i64 row, i64 step,
                                                        const float *b, i64 apart, float *c,
                                                        i64 ldc, int add) {
    switch (tall) {
#ifdef __AVX512F__
        case 8: tile(8, wide, depth, a, row, step, b, apart, c, ldc, add); break;
        case 7: tile(7, wide, depth, a, row, step, b, apart, c, ldc, add); break;
#endif
        case 6: tile(6, wide, depth, a, row, step, b, apart, c, ldc, add); break;
        case 5: tile(5, wide, depth, a, row, step, b, apart, c, ldc, add); break;
        case 4: tile(4, wide, depth, a, row, step, b, apart, c, ldc, add); break;
        case 3: tile(3, wide, depth, a, row, step, b, apart, c, ldc, add); break;
        case 2: tile(2, wide, depth, a, row, step, b, apart, c, ldc, add); break;
        default: tile(1, wide, depth, a, row, step, b, apart, c, ldc, add);
    }
}

/* The same for `tall` of 1 to TALL rows and `panels` panels, `apart` floats from one to the next. */
static void multiply(int tall, i64 depth, const float *a, i64 row, i64 step, const float *b,
                     i64 panels, i64 apart, float *c, i64 ldc, int add) {
    enum { TAKEN = 2 * WIDTH / LANES }; /* panels of one tile */
    i64 second = TAKEN == 2 ? apart : WIDTH;
    for (; panels >= TAKEN; panels -= TAKEN, b += TAKEN * apart, c += 2 * WIDTH)
        tiles(tall, 2, depth, a, row, step, b, second, c, ldc, add);
    if (panels) tiles(tall, 1, depth, a, row, step, b, second, c, ldc, add);
}

/* x [rows, D] as panels of columns, [D / LANES, rows, LANES]. */
static void pack(const float *x, i64 rows, i64 D, float *panels) {
    for (i64 panel = 0; panel < D / LANES; panel++)
        for (i64 row = 0; row < rows; row++, panels += LANES)
            memcpy(panels, x + row * D + panel * LANES, LANES * sizeof(float));
}

#if defined(__AVX2__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
/* In every 128 bits: lanes i, j of a and k, l of b. */
#ifdef __AVX512F__
#define PICK(a, i, j, b, k, l)                                                                     \
    __builtin_shufflevector(a, b, i, j, 16 + k, 16 + l, 4 + i, 4 + j, 20 + k, 20 + l, 8 + i, 8 + j, \
                            24 + k, 24 + l, 12 + i, 12 + j, 28 + k, 28 + l)
#else
#define PICK(a, i, j, b, k, l)                                                                     \
    __builtin_shufflevector(a, b, i, j, 8 + k, 8 + l, 4 + i, 4 + j, 12 + k, 12 + l)
#endif

/* Four columns of rows 0, 4, 8, ..., one row in every 128 bits. */
static inline vec fourth_rows(const float *x, i64 D) {
    typedef float pair __attribute__((vector_size(32)));
    quad a = *(const quad *)x, b = *(const quad *)(x + 4 * D);
    pair low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#ifdef __AVX512F__
    quad c = *(const quad *)(x + 8 * D), d = *(const quad *)(x + 12 * D);
    pair high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    return low;
#endif
}

/* x [WIDTH, D] transposed: to[d LANES + row]. */
static void across(const float *x, i64 D, float *to) {
    for (i64 d = 0; d < D; d += 4, x += 4, to += 4 * LANES) {
        vec a = fourth_rows(x, D), b = fourth_rows(x + D, D);
        vec c = fourth_rows(x + 2 * D, D), e = fourth_rows(x + 3 * D, D);
        vec ab = PICK(a, 0, 1, b, 0, 1), ce = PICK(c, 0, 1, e, 0, 1);
        vec ab_high = PICK(a, 2, 3, b, 2, 3), ce_high = PICK(c, 2, 3, e, 2, 3);
        *(vec *)to = PICK(ab, 0, 2, ce, 0, 2);
        *(vec *)(to + LANES) = PICK(ab, 1, 3, ce, 1, 3);
        *(vec *)(to + 2 * LANES) = PICK(ab_high, 0, 2, ce_high, 0, 2);
        *(vec *)(to + 3 * LANES) = PICK(ab_high, 1, 3, ce_high, 1, 3);
    }
}
#else
static void across(const float *x, i64 D, float *to) {
    for (i64 row = 0; row < WIDTH; row++)
        for (i64 d = 0; d < D; d++) to[d * LANES + row] = x[row * D + d];
}
#endif
