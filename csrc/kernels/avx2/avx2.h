/* Kernels of the AVX2 tier, listed in table.c. Requires AVX2, FMA and F16C. */
#ifndef PHI_AVX2_H
#define PHI_AVX2_H

#include "../generic/pack.h"

#define PHI_AVX2_TYPES(X) \
    X(F32, f32)           \
    X(F16, f16)           \
    X(BF16, bf16)         \
    X(Q4_0, q4_0)         \
    X(Q4_1, q4_1)         \
    X(Q5_0, q5_0)         \
    X(Q5_1, q5_1)         \
    X(Q8_0, q8_0)         \
    X(Q2_K, q2_k)         \
    X(Q3_K, q3_k)         \
    X(Q4_K, q4_k)         \
    X(Q5_K, q5_k)         \
    X(Q6_K, q6_k)

#define PHI_DECLARE(UPPER, lower) void phi_matmul_##lower##_avx2(const phi_matmul *m);
PHI_AVX2_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_avx2(const phi_matmul *m);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

void phi_quantize_q8_avx2(const float *x, size_t n, phi_q8 q8);
void phi_rms_norm_avx2(const float *x, const float *weight, size_t n, float eps, float *y);
void phi_layer_norm_avx2(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y);
void phi_rope_neox_avx2(float *x, int rope_dims, const float *cos, const float *sin);
void phi_rope_interleaved_avx2(float *x, int rope_dims, const float *cos, const float *sin);
void phi_silu_mul_avx2(const float *gate, const float *up, size_t n, float *y);
void phi_gelu_avx2(const float *x, size_t n, float *y);
void phi_add_avx2(const float *x, size_t n, float *y);
void phi_store_kv_f16_avx2(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
void phi_store_kv_q8_avx2(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
void phi_attention_f16_avx2(const phi_attention *a);
void phi_attention_q8_avx2(const phi_attention *a);
double phi_peak_f32_avx2(size_t n_steps);
double phi_peak_q8_avx2(size_t n_steps);

#endif
