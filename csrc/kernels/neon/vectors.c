/* Operations on activations between the products: norms, RoPE, quantisation, SiLU and GELU, residual addition, KV-cache
 * writes. Four floats per step. FMAXNM and FMINNM return the operand that is not NaN, as fmaxf and fminf do. */
#include <float.h>
#include <math.h>

#include "../../half.h"
#include "../generic/rotate.h"
#include "../generic/store_kv.h"
#include "neon.h"
#include "simd.h"

/* The largest magnitude of 32 floats, compared as integers: NaN is above every number. */
PHI_INLINE float max_magnitude(const float32x4_t v[8]) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int i = 0; i < 8; i++) largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(v[i])));
    return phi_float_from_bits(vmaxvq_u32(largest));
}

/* Rounds 16 floats times `inverse` to integers from -127 to 127. NaN, the product of infinity and 0, becomes 127. */
PHI_INLINE int8x16_t round_to_int8(const float32x4_t v[4], float inverse) {
    const float32x4_t limit = vdupq_n_f32(127.0f);
    int32x4_t q[4];
    for (int i = 0; i < 4; i++) {
        const float32x4_t at_most = vminnmq_f32(limit, vmulq_n_f32(v[i], inverse));
        q[i] = vcvtnq_s32_f32(vmaxnmq_f32(vnegq_f32(limit), at_most));
    }
    const int16x8_t low = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]));
    return vcombine_s8(vmovn_s16(low), vmovn_s16(high));
}

void phi_quantize_q8_neon(const float *x, size_t n, phi_q8 q8) {
    for (size_t b = 0; b < n / PHI_Q8_BLOCK; b++) {
        float32x4_t v[8];
        for (int i = 0; i < 8; i++) v[i] = vld1q_f32(x + b * PHI_Q8_BLOCK + 4 * i);
        const float scale = max_magnitude(v) / 127.0f;
        /* As in the scalar kernel: a block whose scale is below the smallest normal float becomes 0. */
        const float inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
        int32_t sum[2];
        for (size_t i = 0; i < 2; i++) {
            const int8x16_t q = round_to_int8(v + 4 * i, inverse);
            vst1q_s8(q8.quants + b * PHI_Q8_BLOCK + 16 * i, q);
            sum[i] = vaddlvq_s8(q);
            q8.sums[2 * b + i] = scale * (float)sum[i];
            q8.offsets[2 * b + i] = -128 * sum[i];
        }
        q8.scales[b] = scale;
        q8.block_sums[b] = scale * (float)(sum[0] + sum[1]);
        q8.block_offsets[b] = -128 * (sum[0] + sum[1]);
    }
}

void phi_rms_norm_neon(const float *x, const float *weight, size_t n, float eps, float *y) {
    const size_t n4 = n / 4 * 4;
    float64x2_t squares[2] = {vdupq_n_f64(0.0), vdupq_n_f64(0.0)};
    for (size_t i = 0; i < n4; i += 4) {
        const float32x4_t v = vld1q_f32(x + i);
        const float64x2_t low = vcvt_f64_f32(vget_low_f32(v)), high = vcvt_high_f64_f32(v);
        squares[0] = vfmaq_f64(squares[0], low, low);
        squares[1] = vfmaq_f64(squares[1], high, high);
    }
    double total = vaddvq_f64(vaddq_f64(squares[0], squares[1]));
    for (size_t i = n4; i < n; i++) total += (double)x[i] * (double)x[i];

    const float inverse = (float)(1.0 / sqrt(total / (double)n + (double)eps));
    for (size_t i = 0; i < n4; i += 4)
        vst1q_f32(y + i, vmulq_f32(vmulq_n_f32(vld1q_f32(x + i), inverse), vld1q_f32(weight + i)));
    for (size_t i = n4; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

/* difference [4] = 4 floats - mean, in double. */
PHI_INLINE void subtract_mean(const float *x, double mean, float64x2_t difference[2]) {
    const float32x4_t v = vld1q_f32(x);
    difference[0] = vsubq_f64(vcvt_f64_f32(vget_low_f32(v)), vdupq_n_f64(mean));
    difference[1] = vsubq_f64(vcvt_high_f64_f32(v), vdupq_n_f64(mean));
}

void phi_layer_norm_neon(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y) {
    const size_t n4 = n / 4 * 4;
    float64x2_t difference[2], sums[2] = {vdupq_n_f64(0.0), vdupq_n_f64(0.0)}, squares[2] = {sums[0], sums[0]};
    for (size_t i = 0; i < n4; i += 4) {
        subtract_mean(x + i, 0.0, difference);
        for (int j = 0; j < 2; j++) sums[j] = vaddq_f64(sums[j], difference[j]);
    }
    double total = vaddvq_f64(vaddq_f64(sums[0], sums[1]));
    for (size_t i = n4; i < n; i++) total += (double)x[i];
    const double mean = total / (double)n;

    for (size_t i = 0; i < n4; i += 4) {
        subtract_mean(x + i, mean, difference);
        for (int j = 0; j < 2; j++) squares[j] = vfmaq_f64(squares[j], difference[j], difference[j]);
    }
    total = vaddvq_f64(vaddq_f64(squares[0], squares[1]));
    for (size_t i = n4; i < n; i++) total += ((double)x[i] - mean) * ((double)x[i] - mean);

    const float inverse = (float)(1.0 / sqrt(total / (double)n + (double)eps));
    const float32x4_t means = vdupq_n_f32((float)mean);
    for (size_t i = 0; i < n4; i += 4) {
        const float32x4_t scaled = vmulq_n_f32(vsubq_f32(vld1q_f32(x + i), means), inverse);
        vst1q_f32(y + i, vaddq_f32(vmulq_f32(scaled, vld1q_f32(weight + i)), vld1q_f32(bias + i)));
    }
    for (size_t i = n4; i < n; i++) y[i] = (x[i] - (float)mean) * inverse * weight[i] + bias[i];
}

PHI_INLINE float32x4_t silu_mul(float32x4_t gate, float32x4_t up) {
    const float32x4_t e = phi_exp(vnegq_f32(gate));
    return vmulq_f32(vdivq_f32(gate, vaddq_f32(vdupq_n_f32(1.0f), e)), up);
}

void phi_silu_mul_neon(const float *gate, const float *up, size_t n, float *y) {
    const size_t n4 = n / 4 * 4;
    for (size_t i = 0; i < n4; i += 4) vst1q_f32(y + i, silu_mul(vld1q_f32(gate + i), vld1q_f32(up + i)));
    if (n4 < n) { /* the tail, padded, by the same arithmetic */
        float g[4] = {0}, u[4] = {0};
        memcpy(g, gate + n4, (n - n4) * sizeof *g);
        memcpy(u, up + n4, (n - n4) * sizeof *u);
        vst1q_f32(g, silu_mul(vld1q_f32(g), vld1q_f32(u)));
        memcpy(y + n4, g, (n - n4) * sizeof *g);
    }
}

PHI_INLINE float32x4_t gelu(float32x4_t x) {
    const float32x4_t u = vfmaq_n_f32(x, vmulq_f32(vmulq_f32(x, x), x), 0.044715f);
    const float32x4_t e = phi_exp(vmulq_n_f32(u, -2.0f * 0.7978845608f));
    const float32x4_t bounded = vmaxq_f32(vdupq_n_f32(-1e6f), x); /* phi_exp is bounded: x = -inf would give -inf */
    return vdivq_f32(bounded, vaddq_f32(vdupq_n_f32(1.0f), e));
}

void phi_gelu_neon(const float *x, size_t n, float *y) {
    const size_t n4 = n / 4 * 4;
    for (size_t i = 0; i < n4; i += 4) vst1q_f32(y + i, gelu(vld1q_f32(x + i)));
    if (n4 < n) { /* the tail, padded, by the same arithmetic */
        float tail[4] = {0};
        memcpy(tail, x + n4, (n - n4) * sizeof *tail);
        vst1q_f32(tail, gelu(vld1q_f32(tail)));
        memcpy(y + n4, tail, (n - n4) * sizeof *tail);
    }
}

void phi_add_neon(const float *x, size_t n, float *y) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vaddq_f32(vld1q_f32(y + i), vld1q_f32(x + i)));
    for (; i < n; i++) y[i] += x[i];
}

/* No FMA, as in the scalar kernel: every tier rotates to the same bits. */
PHI_INLINE void rotate(float32x4_t *a, float32x4_t *b, float32x4_t cos, float32x4_t sin) {
    const float32x4_t x = *a, y = *b;
    *a = vsubq_f32(vmulq_f32(x, cos), vmulq_f32(y, sin));
    *b = vaddq_f32(vmulq_f32(y, cos), vmulq_f32(x, sin));
}

void phi_rope_neox_neon(float *x, int rope_dims, const float *cos, const float *sin) {
    const size_t half = (size_t)rope_dims / 2;
    size_t i = 0;
    for (; i + 4 <= half; i += 4) {
        float32x4_t a = vld1q_f32(x + i), b = vld1q_f32(x + half + i);
        rotate(&a, &b, vld1q_f32(cos + i), vld1q_f32(sin + i));
        vst1q_f32(x + i, a);
        vst1q_f32(x + half + i, b);
    }
    for (; i < half; i++) phi_rotate(x + i, x + half + i, cos[i], sin[i]);
}

void phi_rope_interleaved_neon(float *x, int rope_dims, const float *cos, const float *sin) {
    const size_t half = (size_t)rope_dims / 2;
    size_t i = 0;
    for (; i + 4 <= half; i += 4) {
        float32x4x2_t pairs = vld2q_f32(x + 2 * i);
        rotate(&pairs.val[0], &pairs.val[1], vld1q_f32(cos + i), vld1q_f32(sin + i));
        vst2q_f32(x + 2 * i, pairs);
    }
    for (; i < half; i++) phi_rotate(x + 2 * i, x + 2 * i + 1, cos[i], sin[i]);
}

PHI_INLINE void store_half(const float *x, uint16_t *halves) {
    vst1_u16(halves, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x))));
}

void phi_store_kv_f16_neon(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    phi_store_kv_f16(store_half, 4, k, v, head_dim, slot, slice);
}

/* Quantises n <= 32 dimensions to q [32] and returns their scale in half precision, as the scalar kernel does. */
static uint16_t quantize_kv(const float *x, size_t n, int8_t *q) {
    float padded[PHI_KV_BLOCK] = {0};
    float32x4_t v[8];
    uint32x4_t is_number = vdupq_n_u32(UINT32_MAX);
    memcpy(padded, x, n * sizeof *padded);
    for (int i = 0; i < 8; i++) {
        v[i] = vld1q_f32(padded + 4 * i);
        is_number = vandq_u32(is_number, vceqq_f32(v[i], v[i]));
    }
    const float exact_scale = vminvq_u32(is_number) ? max_magnitude(v) / 127.0f : NAN;
    const uint16_t half = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(exact_scale))), 0);
    const float scale = phi_half(&half);
    if (!(scale > 0.0f && scale < INFINITY)) {
        memset(q, 0, PHI_KV_BLOCK);
        return half;
    }
    for (int i = 0; i < 2; i++) vst1q_s8(q + 16 * i, round_to_int8(v + 4 * i, 1.0f / scale));
    return half;
}

void phi_store_kv_q8_neon(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    phi_store_kv_q8(quantize_kv, k, v, head_dim, slot, slice);
}
