/* Products of F32, F16 and BF16 rows with float activations: generic/float_products.h on vectors of four floats.
 * A tile is 4 rows x 6 tokens: 24 FMAs per 10 loads, in 31 of 32 registers. F16 weights are converted to float32 by
 * base AArch64 instructions; FEAT_FP16 products would round every sum to half precision. */
#include "neon.h"
#include "simd.h"

#define INLINE PHI_INLINE
#define TOKENS 6
enum { STEP = 4 };

typedef float32x4_t vector;
typedef float32x4_t float4;

INLINE vector set_zero(void) { return vdupq_n_f32(0.0f); }
INLINE vector multiply_add(vector a, vector b, vector sum) { return vfmaq_f32(sum, a, b); }

/* The sums of four vectors, each in the same order. */
INLINE float4 sum_each(vector a, vector b, vector c, vector d) {
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

/* The others are 0. */
INLINE float4 float4_load(const float *p, int n) {
    float padded[4] = {0};
    if (n == 4) return vld1q_f32(p);
    for (int i = 0; i < n; i++) padded[i] = p[i];
    return vld1q_f32(padded);
}
INLINE void float4_store(float *p, int n, float4 v) {
    float padded[4];
    if (n == 4) {
        vst1q_f32(p, v);
        return;
    }
    vst1q_f32(padded, v);
    for (int i = 0; i < n; i++) p[i] = padded[i];
}
INLINE float4 float4_add(float4 a, float4 b) { return vaddq_f32(a, b); }
INLINE void prefetch_weights(const uint8_t *line) { phi_prefetch_line(line); }

INLINE vector load_f32(const uint8_t *w) { return vreinterpretq_f32_u8(vld1q_u8(w)); }
INLINE vector load_f16(const uint8_t *w) { return phi_load_half(w); }
INLINE vector load_bf16(const uint8_t *w) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(w)), 16));
}

#include "../generic/partial_loads.h"

#include "../generic/float_products.h"

void phi_matmul_f32_neon(const phi_matmul *m) { matmul((format){4, load_f32, load_partial_f32}, m); }
void phi_matmul_f16_neon(const phi_matmul *m) { matmul((format){2, load_f16, load_partial_f16}, m); }
void phi_matmul_bf16_neon(const phi_matmul *m) { matmul((format){2, load_bf16, load_partial_bf16}, m); }
