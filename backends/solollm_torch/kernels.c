/* The passes over memory between a block's matrix products, each as one loop, and causal attention.
 * Built and called by `kernels.py`, which says when; what they save is in docs/results/torch_step_profile.md.
 *
 * Everything is float32. Rows are shared out to threads in equal parts, and every sum is taken in
 * an order that does not depend on timing, so equal inputs, threads and builds give equal bits.
 *
 * Letters: N rows, C hidden size, F intermediate size, V vocabulary, B batch, T positions, H query
 * heads, K key/value heads, D head size.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

/* exp to within 2 units in the last place, in a form that compilers vectorise: 2^n e^r with
 * |r| <= ln(2)/2 and a polynomial for e^r (coefficients of Cephes' expf). NaN stays NaN. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) << 23};
    return p * power.f;
}

/* out = x / sqrt(mean(x^2) + eps) * weight; inverse [N] keeps 1 / sqrt(...). */
void rms_norm(const float *x, const float *weight, float *out, float *inverse, i64 N, i64 C,
              float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 row = 0; row < N; row++) {
        const float *in = x + row * C;
        float *to = out + row * C;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (i64 c = 0; c < C; c++) squares += in[c] * in[c];
        float scale = 1.0f / sqrtf(squares / C + eps);
        inverse[row] = scale;
#pragma omp simd
        for (i64 c = 0; c < C; c++) to[c] = in[c] * scale * weight[c];
    }
}

/* grad_x [N, C] of grad [N, C]; grad_weight [threads, C] gets one partial sum per thread. */
void rms_norm_backward(const float *grad, const float *x, const float *weight, const float *inverse,
                       float *grad_x, float *grad_weight, i64 N, i64 C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float *sums = grad_weight + part * C;
        memset(sums, 0, C * sizeof(float));
        for (i64 row = N * part / threads; row < N * (part + 1) / threads; row++) {
            const float *g = grad + row * C, *in = x + row * C;
            float *to = grad_x + row * C;
            float scale = inverse[row], along = 0;
#pragma omp simd reduction(+ : along)
            for (i64 c = 0; c < C; c++) along += g[c] * weight[c] * in[c];
            float back = along * scale * scale * scale / C;
#pragma omp simd
            for (i64 c = 0; c < C; c++) {
                sums[c] += g[c] * in[c] * scale;
                to[c] = g[c] * weight[c] * scale - in[c] * back;
            }
        }
    }
}

/* out [N, F] = silu(gate) * up of gate_up [N, 2 F]. */
void swiglu(const float *gate_up, float *out, i64 N, i64 F, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 row = 0; row < N; row++) {
        const float *gate = gate_up + row * 2 * F, *up = gate + F;
        float *to = out + row * F;
#pragma omp simd
        for (i64 f = 0; f < F; f++) to[f] = gate[f] / (1.0f + exp_(-gate[f])) * up[f];
    }
}

void swiglu_backward(const float *grad, const float *gate_up, float *grad_gate_up, i64 N, i64 F,
                     int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 row = 0; row < N; row++) {
        const float *g = grad + row * F, *gate = gate_up + row * 2 * F, *up = gate + F;
        float *to_gate = grad_gate_up + row * 2 * F, *to_up = to_gate + F;
#pragma omp simd
        for (i64 f = 0; f < F; f++) {
            float sigmoid = 1.0f / (1.0f + exp_(-gate[f]));
            to_up[f] = g[f] * gate[f] * sigmoid;
            to_gate[f] = g[f] * up[f] * sigmoid * (1.0f + gate[f] * (1.0f - sigmoid));
        }
    }
}

/* Rotate the halves of the first `rotated` of `heads` heads of x [N, heads, D] in place; row n
 * stands at position n % T of the tables [T, D/2]. sign -1 turns back. */
void rotate(float *x, const float *cosine, const float *sine, i64 N, i64 T, i64 heads, i64 rotated,
            i64 D, float sign, int threads) {
    i64 half = D / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 row = 0; row < N; row++) {
        const float *c = cosine + row % T * half, *s = sine + row % T * half;
        for (i64 head = 0; head < rotated; head++) {
            float *first = x + (row * heads + head) * D, *second = first + half;
#pragma omp simd
            for (i64 d = 0; d < half; d++) {
                float a = first[d], b = second[d], turn = sign * s[d];
                first[d] = a * c[d] - b * turn;
                second[d] = b * c[d] + a * turn;
            }
        }
    }
}

/* logits [N, V] become the loss's gradient, (softmax - onehot(label)) * scale; nll [N]. */
void cross_entropy(float *logits, const i64 *labels, const float *scale, float *nll, i64 N, i64 V,
                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 row = 0; row < N; row++) {
        float *z = logits + row * V, top = z[0], sum = 0;
#pragma omp simd reduction(max : top)
        for (i64 v = 0; v < V; v++) top = z[v] > top ? z[v] : top;
        float chosen = z[labels[row]] - top;
#pragma omp simd reduction(+ : sum)
        for (i64 v = 0; v < V; v++) sum += z[v] = exp_(z[v] - top);
        nll[row] = logf(sum) - chosen;
        float factor = scale[row] / sum;
#pragma omp simd
        for (i64 v = 0; v < V; v++) z[v] *= factor;
        z[labels[row]] -= scale[row];
    }
}

/* out [blocks, 64] = level * scale: NF4 `codes` [blocks, 32] hold two weights per byte, `pairs` [256]
 * both levels of every byte. */
void decode_nf4(const uint8_t *codes, const float *pairs, const float *scales, float *out,
                i64 blocks, int threads) {
    typedef float two __attribute__((vector_size(8), aligned(4)));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 block = 0; block < blocks; block++) {
        const uint8_t *in = codes + block * 32;
        two scale = {scales[block], scales[block]}, *to = (two *)(out + block * 64);
        for (int i = 0; i < 32; i++) to[i] = *(const two *)(pairs + 2 * in[i]) * scale;
    }
}

/* ---- Small products ---------------------------------------------------------------------------
 *
 * The right factor lies in panels of LANES columns, [columns / LANES, depth, LANES], so that a tile
 * of the result, TALL x 2 vectors, is held in registers while both factors are read once and in
 * order. With AVX-512 a vector is a panel and a tile takes two of them; else a panel is two vectors.
 */

#ifdef __AVX512F__
typedef float vec __attribute__((vector_size(64), aligned(4)));
enum { WIDTH = 16, LANES = 16, TALL = 8 };
#else
typedef float vec __attribute__((vector_size(32), aligned(4)));
enum { WIDTH = 8, LANES = 16, TALL = 6 };
#endif

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
static void pack(const float *x, i64 stride, i64 rows, i64 D, float *panels) {
    for (i64 panel = 0; panel < D / LANES; panel++)
        for (i64 row = 0; row < rows; row++, panels += LANES)
            memcpy(panels, x + row * stride + panel * LANES, LANES * sizeof(float));
}

/* x [rows, D] transposed as panels, [ceil(rows / LANES), D, LANES]; what is beyond `rows` is 0. */
static void pack_transposed(const float *x, i64 stride, i64 rows, i64 D, float *panels) {
    for (i64 first = 0; first < rows; first += LANES, panels += D * LANES) {
        i64 count = rows - first < LANES ? rows - first : LANES;
        if (count < LANES) memset(panels, 0, D * LANES * sizeof(float));
        for (i64 row = 0; row < count; row++)
            for (i64 d = 0; d < D; d++) panels[d * LANES + row] = x[(first + row) * stride + d];
    }
}

static inline i64 at_most(i64 value, i64 limit) { return value < limit ? value : limit; }
static inline i64 padded(i64 count) { return (count + LANES - 1) / LANES * LANES; }

/* ---- Causal attention within documents -------------------------------------------------------
 *
 * qkv [B T, H + 2 K, D] holds queries, keys and values of each position side by side, already
 * rotated; D is a multiple of LANES. A document is (first position in B T, length). The scores of
 * ROWS queries with all keys before them stay in the core's cache, what lies after a query is not
 * computed, and nothing of size T x T is kept: backward computes the scores anew from log_sum
 * (Dao et al. 2022, arXiv:2205.14135).
 */

enum { ROWS = 48 }; /* a multiple of TALL */

typedef struct {
    i64 H, K, D, stride; /* stride: floats from one position to the next in qkv */
} heads_t;

static void attend_one(heads_t s, const float *q, const float *k, const float *v, float *out,
                       float *log_sum, i64 length, float *scratch) {
    i64 D = s.D, out_stride = s.H * D, width = padded(length);
    float *keys = scratch, *values = keys + width * D, *scores = values + length * D;
    float scale = 1.0f / sqrtf(D);
    pack_transposed(k, s.stride, length, D, keys);
    pack(v, s.stride, length, D, values);
    for (i64 first = 0; first < length; first += TALL) {
        int tall = at_most(TALL, length - first);
        i64 seen_by_last = first + tall;
        multiply(tall, D, q + first * s.stride, s.stride, 1, keys, padded(seen_by_last) / LANES,
                 D * LANES, scores, width, 0);
        float factors[TALL];
        for (int row = 0; row < tall; row++) {
            float *z = scores + row * width, top = z[0], sum = 0;
            i64 seen = first + row + 1;
#pragma omp simd reduction(max : top)
            for (i64 j = 0; j < seen; j++) top = z[j] > top ? z[j] : top;
#pragma omp simd reduction(+ : sum)
            for (i64 j = 0; j < seen; j++) sum += z[j] = exp_((z[j] - top) * scale);
            for (i64 j = seen; j < seen_by_last; j++) z[j] = 0;
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

/* Gradients of one head. Those of keys and values are added to unless `fresh`. */
static void attend_back(heads_t s, const float *q, const float *k, const float *v,
                        const float *grad, const float *log_sum, float *dq, float *dk, float *dv,
                        i64 length, int fresh, float *scratch) {
    i64 D = s.D, stride = s.stride, out_stride = s.H * D, width = padded(length);
    float *keys_across = scratch, *values_across = keys_across + width * D;
    float *keys = values_across + width * D, *queries = keys + length * D;
    float *grads = queries + ROWS * D, *scores = grads + ROWS * D;
    float *grad_scores = scores + ROWS * width, scale = 1.0f / sqrtf(D);
    pack_transposed(k, stride, length, D, keys_across);
    pack_transposed(v, stride, length, D, values_across);
    pack(k, stride, length, D, keys);
    /* From the end, so that the first pass reaches every key and may overwrite. */
    for (i64 block = (length - 1) / ROWS * ROWS; block >= 0; block -= ROWS) {
        i64 rows = at_most(ROWS, length - block), columns = block + rows;
        int add = !(fresh && columns == length);
        pack(q + block * stride, stride, rows, D, queries);
        pack(grad + block * out_stride, out_stride, rows, D, grads);
        for (i64 first = 0; first < rows; first += TALL) {
            int tall = at_most(TALL, rows - first);
            i64 place = block + first, seen_by_last = place + tall;
            i64 panels = padded(seen_by_last) / LANES;
            float *p = scores + first * width, *dp = grad_scores + first * width;
            multiply(tall, D, q + place * stride, stride, 1, keys_across, panels, D * LANES, p,
                     width, 0);
            multiply(tall, D, grad + place * out_stride, out_stride, 1, values_across, panels,
                     D * LANES, dp, width, 0);
            for (int row = 0; row < tall; row++, p += width, dp += width) {
                float shift = log_sum[(place + row) * s.H], along = 0;
                i64 seen = place + row + 1;
#pragma omp simd reduction(+ : along)
                for (i64 j = 0; j < seen; j++) {
                    p[j] = exp_(p[j] * scale - shift);
                    along += p[j] * dp[j];
                }
#pragma omp simd
                for (i64 j = 0; j < seen; j++) dp[j] = p[j] * (dp[j] - along) * scale;
                for (i64 j = seen; j < columns; j++) p[j] = dp[j] = 0;
            }
            multiply(tall, seen_by_last, grad_scores + first * width, width, 1, keys, D / LANES,
                     length * LANES, dq + place * stride, stride, 0);
        }
        for (i64 key = 0; key < columns; key += TALL) {
            int tall = at_most(TALL, columns - key);
            i64 from = key > block ? key - block : 0; /* earlier queries do not see this key */
            i64 at = from * width + key, panel = rows * LANES;
            multiply(tall, rows - from, scores + at, 1, width, grads + from * LANES, D / LANES,
                     panel, dv + key * stride, stride, add);
            multiply(tall, rows - from, grad_scores + at, 1, width, queries + from * LANES,
                     D / LANES, panel, dk + key * stride, stride, add);
        }
    }
}

/* Floats that one thread needs for documents of up to `longest` positions. */
static i64 scratch_size(i64 longest, i64 D) {
    return 3 * padded(longest) * D + 2 * ROWS * (D + padded(longest));
}

/* out [B T, H, D], log_sum [B T, H]. `documents` [count, 2]; they cover qkv without overlap. */
void attention(const float *qkv, float *out, float *log_sum, const i64 *documents, i64 count,
               i64 longest, i64 H, i64 K, i64 D, int threads) {
    heads_t s = {H, K, D, (H + 2 * K) * D};
#pragma omp parallel num_threads(threads)
    {
        float *scratch = malloc(scratch_size(longest, D) * sizeof(float));
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < count * H; task++) {
            i64 start = documents[task / H * 2], head = task % H, kv = head / (H / K);
            const float *base = qkv + start * s.stride;
            attend_one(s, base + head * D, base + (H + kv) * D, base + (H + K + kv) * D,
                       out + (start * H + head) * D, log_sum + start * H + head,
                       documents[task / H * 2 + 1], scratch);
        }
        free(scratch);
    }
}

/* grad_qkv, laid out like qkv, of grad [B T, H, D]. One task holds all heads that share keys. */
void attention_backward(const float *grad, const float *qkv, const float *log_sum, float *grad_qkv,
                        const i64 *documents, i64 count, i64 longest, i64 H, i64 K, i64 D,
                        int threads) {
    heads_t s = {H, K, D, (H + 2 * K) * D};
#pragma omp parallel num_threads(threads)
    {
        float *scratch = malloc(scratch_size(longest, D) * sizeof(float));
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < count * K; task++) {
            i64 start = documents[task / K * 2], kv = task % K, group = H / K;
            const float *base = qkv + start * s.stride;
            float *to = grad_qkv + start * s.stride;
            for (i64 head = kv * group; head < (kv + 1) * group; head++)
                attend_back(s, base + head * D, base + (H + kv) * D, base + (H + K + kv) * D,
                            grad + (start * H + head) * D, log_sum + start * H + head,
                            to + head * D, to + (H + kv) * D, to + (H + K + kv) * D,
                            documents[task / K * 2 + 1], head == kv * group, scratch);
        }
        free(scratch);
    }
}
