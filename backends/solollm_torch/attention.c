/* Rotation and causal attention within documents, float32, in both directions.
 * Built and called by `kernels.py`; what it saves is in docs/results/torch_step_profile.md.
 *
 * qkv [B T, H + 2 K, D] holds queries, keys and values of each position side by side; D is a
 * multiple of LANES. A document is (first position in B T, length). What is multiplied is first
 * copied into the core's cache, queries and keys rotated on the way (Su et al. 2021,
 * arXiv:2104.09864, by halves). The scores of a few queries with all keys before them stay there,
 * what lies after a query is not computed, and nothing of size T x T is kept: backward computes the
 * scores anew from log_sum (Dao et al. 2022, arXiv:2205.14135).
 *
 * Tasks are handed out in any order, and no sum is shared between them: equal inputs and builds give
 * equal bits. Letters: B batch, T positions, H query heads, K key/value heads, D head size.
 */

#include "small_products.h"

#include <stdlib.h>

enum { ROWS = 48 }; /* queries at once in backward, a multiple of TALL */

typedef struct {
    i64 H, K, D, stride;        /* stride: floats from one position to the next in qkv */
    const float *cosine, *sine; /* [length, D/2], from the document's first position */
} heads_t;

/* Rows to come are asked for meanwhile: they lie pages apart, where no processor looks ahead. */
static inline void ask_ahead(heads_t s, const float *x, i64 stride, const float *to, i64 to_stride) {
    for (i64 d = 0; d < s.D; d += 16) {
        __builtin_prefetch(x + LANES * stride + d);
        __builtin_prefetch(to + LANES * to_stride + d, 1);
    }
}

/* One head of `rows` positions to or from the cache. */
static void copy(heads_t s, const float *x, i64 stride, i64 rows, float *to, i64 to_stride) {
    for (i64 row = 0; row < rows; row++, x += stride, to += to_stride) {
        ask_ahead(s, x, stride, to, to_stride);
        memcpy(to, x, s.D * sizeof(float));
    }
}

/* The same, rotated; the first row stands at `place` in its document. sign -1 turns back. */
static void turn(heads_t s, i64 place, float sign, const float *x, i64 stride, i64 rows, float *to,
                 i64 to_stride) {
    i64 half = s.D / 2;
    for (i64 row = 0; row < rows; row++, x += stride, to += to_stride) {
        const float *cosine = s.cosine + (place + row) * half, *sine = s.sine + (place + row) * half;
        ask_ahead(s, x, stride, to, to_stride);
#pragma omp simd
        for (i64 d = 0; d < half; d++) {
            float a = x[d], b = x[d + half], by = sign * sine[d];
            to[d] = a * cosine[d] - b * by;
            to[d + half] = b * cosine[d] + a * by;
        }
    }
}

/* Keys, if `rotated`, or values: transposed as panels, [padded(length) / LANES, D, LANES], 0 beyond
 * `length`, and, unless NULL, as `panels`, [D / LANES, length, LANES]. `rows`,
 * [padded(length), D], is scratch. */
static void bring(heads_t s, const float *x, i64 length, int rotated, float *rows, float *panels_across,
                  float *panels) {
    i64 D = s.D;
    if (rotated)
        turn(s, 0, 1, x, s.stride, length, rows, D);
    else
        copy(s, x, s.stride, length, rows, D);
    if (panels) pack(rows, length, D, panels);
    if (!panels_across) return;
    memset(rows + length * D, 0, (padded(length) - length) * D * sizeof(float));
    for (i64 first = 0; first < length; first += LANES)
        for (i64 part = 0; part < LANES; part += WIDTH)
            across(rows + (first + part) * D, D, panels_across + first * D + part);
}

/* Scores z of a query become exp(scale (z - their largest)), 0 from `seen` on: their sum. */
static float softmax(float *z, i64 seen, i64 width, float scale, float *top) {
    vec largest = (vec){0} - INFINITY, sum = {0};
    for (i64 j = 0; j < width; j += WIDTH) {
        vec x = up_to(seen, z, j, -INFINITY);
        largest = choose(x > largest, x, largest);
    }
    *top = largest_of(largest);
    for (i64 j = 0; j < width; j += WIDTH) {
        *(vec *)(z + j) = exp_((*(vec *)(z + j) - *top) * scale);
        sum += *(vec *)(z + j) = up_to(seen, z, j, 0);
    }
    return sum_of(sum);
}

/* Scores p and gradients dp of their softmax become the softmax, and the gradients of the scores. */
static void softmax_backward(float *p, float *dp, i64 seen, i64 width, float scale, float shift) {
    vec along = {0};
    for (i64 j = 0; j < width; j += WIDTH) {
        *(vec *)(p + j) = exp_(*(vec *)(p + j) * scale - shift);
        vec weight = *(vec *)(p + j) = up_to(seen, p, j, 0);
        along += weight * (*(vec *)(dp + j) = up_to(seen, dp, j, 0));
    }
    float all = sum_of(along);
    for (i64 j = 0; j < width; j += WIDTH)
        *(vec *)(dp + j) = *(vec *)(p + j) * (*(vec *)(dp + j) - all) * scale;
}

/* One head. keys [padded(length) / LANES, D, LANES], values [D / LANES, length, LANES]. */
static void attend_one(heads_t s, const float *q, const float *keys, const float *values, float *out,
                       float *log_sum, i64 length, float *scratch) {
    i64 D = s.D, out_stride = s.H * D, width = padded(length) + LANES;
    float *queries = scratch, *scores = queries + TALL * D, scale = 1.0f / sqrtf(D);
    for (i64 first = 0; first < length; first += TALL) {
        int tall = at_most(TALL, length - first);
        i64 seen_by_last = first + tall, wide = padded(seen_by_last);
        turn(s, first, 1, q + first * s.stride, s.stride, tall, queries, D);
        multiply(tall, D, queries, D, 1, keys, wide / LANES, D * LANES, scores, width, 0);
        float factors[TALL], top;
        for (int row = 0; row < tall; row++) {
            float sum = softmax(scores + row * width, first + row + 1, wide, scale, &top);
            factors[row] = 1.0f / sum;
            log_sum[(first + row) * s.H] = top * scale + logf(sum);
        }
        float *to = out + first * out_stride;
        multiply(tall, seen_by_last, scores, width, 1, values, D / LANES, length * LANES, to,
                 out_stride, 0);
        for (int row = 0; row < tall; row++)
            for (i64 d = 0; d < D; d++) to[row * out_stride + d] *= factors[row];
    }
}

typedef struct { /* keys and values that some heads share, and the sums of their gradients */
    float *keys_across, *values_across, *keys; /* panels as above */
    float *dk, *dv;                            /* [length, D], dk of rotated keys */
} shared_t;

/* Gradients of one head; those of keys and values are added to unless `fresh`. */
static void attend_back(heads_t s, shared_t shared, const float *q, const float *grad,
                        const float *log_sum, float *dq, i64 length, int fresh, float *scratch) {
    i64 D = s.D, out_stride = s.H * D, width = padded(length) + LANES;
    float *queries = scratch, *query_panels = queries + ROWS * D;
    float *grads = query_panels + ROWS * D, *grad_panels = grads + ROWS * D;
    float *turned = grad_panels + ROWS * D, *scores = turned + TALL * D;
    float *grad_scores = scores + ROWS * width, scale = 1.0f / sqrtf(D);
    /* From the end, so that the first pass reaches every key and may overwrite. */
    for (i64 block = (length - 1) / ROWS * ROWS; block >= 0; block -= ROWS) {
        i64 rows = at_most(ROWS, length - block), columns = block + rows;
        int add = !(fresh && columns == length);
        turn(s, block, 1, q + block * s.stride, s.stride, rows, queries, D);
        copy(s, grad + block * out_stride, out_stride, rows, grads, D);
        pack(queries, rows, D, query_panels);
        pack(grads, rows, D, grad_panels);
        for (i64 first = 0; first < rows; first += TALL) {
            int tall = at_most(TALL, rows - first);
            i64 place = block + first, seen_by_last = place + tall, wide = padded(seen_by_last);
            float *p = scores + first * width, *dp = grad_scores + first * width;
            multiply(tall, D, queries + first * D, D, 1, shared.keys_across, wide / LANES, D * LANES,
                     p, width, 0);
            multiply(tall, D, grads + first * D, D, 1, shared.values_across, wide / LANES, D * LANES,
                     dp, width, 0);
            for (int row = 0; row < tall; row++)
                softmax_backward(p + row * width, dp + row * width, place + row + 1, wide, scale,
                                 log_sum[(place + row) * s.H]);
            multiply(tall, seen_by_last, dp, width, 1, shared.keys, D / LANES, length * LANES, turned,
                     D, 0);
            turn(s, place, -1, turned, D, tall, dq + place * s.stride, s.stride);
        }
        for (i64 key = 0; key < columns; key += TALL) {
            int tall = at_most(TALL, columns - key);
            i64 from = key > block ? key - block : 0; /* earlier queries do not see this key */
            i64 at = from * width + key, panel = rows * LANES;
            multiply(tall, rows - from, scores + at, 1, width, grad_panels + from * LANES, D / LANES,
                     panel, shared.dv + key * D, D, add);
            multiply(tall, rows - from, grad_scores + at, 1, width, query_panels + from * LANES,
                     D / LANES, panel, shared.dk + key * D, D, add);
        }
    }
}

/* Floats that one thread needs for documents of up to `longest` positions. */
static i64 scratch_size(i64 longest, i64 D) {
    return 6 * padded(longest) * D + (4 * ROWS + TALL) * D + 2 * ROWS * (padded(longest) + LANES);
}

/* out [B T, H, D], log_sum [B T, H]. `documents` [count, 2]; they cover qkv without overlap. cosine
 * and sine [T, D/2]: position n of qkv is n % T of its row. One task holds all heads that share keys. */
void attention(const float *qkv, const float *cosine, const float *sine, float *out, float *log_sum,
               const i64 *documents, i64 count, i64 longest, i64 T, i64 H, i64 K, i64 D,
               int threads) {
    i64 stride = (H + 2 * K) * D, group = H / K;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = malloc(scratch_size(longest, D) * sizeof(float));
        float *keys = scratch + padded(longest) * D, *values = keys + padded(longest) * D;
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < count * K; task++) {
            i64 start = documents[task / K * 2], length = documents[task / K * 2 + 1], kv = task % K;
            i64 place = start % T * (D / 2);
            heads_t s = {H, K, D, stride, cosine + place, sine + place};
            const float *base = qkv + start * stride;
            bring(s, base + (H + kv) * D, length, 1, scratch, keys, NULL);
            bring(s, base + (H + K + kv) * D, length, 0, scratch, NULL, values);
            for (i64 head = kv * group; head < (kv + 1) * group; head++)
                attend_one(s, base + head * D, keys, values, out + (start * H + head) * D,
                           log_sum + start * H + head, length, values + padded(longest) * D);
        }
        free(scratch);
    }
}

/* grad_qkv, laid out like qkv, of grad [B T, H, D]. */
void attention_backward(const float *grad, const float *qkv, const float *cosine, const float *sine,
                        const float *log_sum, float *grad_qkv, const i64 *documents, i64 count,
                        i64 longest, i64 T, i64 H, i64 K, i64 D, int threads) {
    i64 stride = (H + 2 * K) * D, group = H / K, size = padded(longest) * D;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = malloc(scratch_size(longest, D) * sizeof(float)), *rows = scratch;
        shared_t shared = {rows + size, rows + 2 * size, rows + 3 * size, rows + 4 * size,
                           rows + 5 * size};
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < count * K; task++) {
            i64 start = documents[task / K * 2], length = documents[task / K * 2 + 1], kv = task % K;
            i64 place = start % T * (D / 2);
            heads_t s = {H, K, D, stride, cosine + place, sine + place};
            const float *base = qkv + start * stride;
            float *to = grad_qkv + start * stride;
            bring(s, base + (H + kv) * D, length, 1, rows, shared.keys_across, shared.keys);
            bring(s, base + (H + K + kv) * D, length, 0, rows, shared.values_across, NULL);
            for (i64 head = kv * group; head < (kv + 1) * group; head++)
                attend_back(s, shared, base + head * D, grad + (start * H + head) * D,
                            log_sum + start * H + head, to + head * D, length, head == kv * group,
                            rows + 6 * size);
            turn(s, 0, -1, shared.dk, D, length, to + (H + kv) * D, stride);
            copy(s, shared.dv, D, length, to + (H + K + kv) * D, stride);
        }
        free(scratch);
    }
}
