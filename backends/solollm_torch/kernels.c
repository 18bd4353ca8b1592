/* The passes over memory between a block's matrix products, each as one loop; attention has a file
 * of its own, `attention.c`. Built and called by `kernels.py`, which says when; what they save is in
 * docs/results/torch_step_profile.md.
 *
 * Everything is float32. Rows are shared out to threads in equal parts, and every sum is taken in
 * an order that does not depend on timing, so equal inputs, threads and builds give equal bits.
 *
 * Letters: N rows, C hidden size, F intermediate size, V vocabulary.
 */

#include "exponential.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

/* In a form that compilers vectorise. NaN stays NaN. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * LOG2_E);
    float r = x - n * LN_2_HIGH;
    r = r - n * LN_2_LOW;
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) << 23};
    return EXP_NEAR_0(r) * power.f;
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
