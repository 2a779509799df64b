/* Kernels of the NEON tier, collected by table.c. Require nothing beyond the base AArch64 instruction set. */
#ifndef PHI_NEON_H
#define PHI_NEON_H

#include "../generic/pack.h"

#define PHI_NEON_LEGACY(X) X(Q4_0, q4_0) X(Q4_1, q4_1) X(Q5_0, q5_0) X(Q5_1, q5_1) X(Q8_0, q8_0)
#define PHI_NEON_K(X) X(Q2_K, q2_k) X(Q3_K, q3_k) X(Q4_K, q4_k) X(Q5_K, q5_k) X(Q6_K, q6_k)
#define PHI_NEON_FLOATS(X) X(F32, f32) X(F16, f16) X(BF16, bf16)

#define PHI_DECLARE(UPPER, lower) void phi_matmul_##lower##_neon(const phi_matmul *m);
PHI_NEON_LEGACY(PHI_DECLARE)
PHI_NEON_K(PHI_DECLARE)
PHI_NEON_FLOATS(PHI_DECLARE)
#undef PHI_DECLARE

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_neon(const phi_matmul *m);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

void phi_quantize_q8_neon(const float *x, size_t n, phi_q8 q8);
void phi_rms_norm_neon(const float *x, const float *weight, size_t n, float eps, float *y);
void phi_rope_neox_neon(float *x, int rope_dims, const float *cos, const float *sin);
void phi_rope_interleaved_neon(float *x, int rope_dims, const float *cos, const float *sin);
void phi_layer_norm_neon(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y);
void phi_silu_mul_neon(const float *gate, const float *up, size_t n, float *y);
void phi_gelu_neon(const float *x, size_t n, float *y);
void phi_add_neon(const float *x, size_t n, float *y);
void phi_store_kv_f16_neon(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
void phi_store_kv_q8_neon(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
void phi_attention_f16_neon(const phi_attention *a);
void phi_attention_q8_neon(const phi_attention *a);
double phi_peak_f32_neon(size_t n_steps);
double phi_peak_q8_neon(size_t n_steps);

#endif
