/* Kernels of the AVX-512 tier, listed in table.c. Requires AVX-512 F, BW, VL, DQ and VNNI. */
#ifndef PHI_AVX512_H
#define PHI_AVX512_H

#include "../generic/pack.h"

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_avx512(const phi_matmul *m);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

void phi_matmul_f32_avx512(const phi_matmul *m);
void phi_matmul_f16_avx512(const phi_matmul *m);
void phi_matmul_bf16_avx512(const phi_matmul *m);
void phi_quantize_q8_avx512(const float *x, size_t n, phi_q8 q8);
void phi_rms_norm_avx512(const float *x, const float *weight, size_t n, float eps, float *y);
void phi_layer_norm_avx512(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y);
void phi_silu_mul_avx512(const float *gate, const float *up, size_t n, float *y);
void phi_gelu_avx512(const float *x, size_t n, float *y);
void phi_add_avx512(const float *x, size_t n, float *y);
void phi_store_kv_f16_avx512(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
void phi_store_kv_q8_avx512(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
void phi_attention_f16_avx512(const phi_attention *a);
void phi_attention_q8_avx512(const phi_attention *a);
double phi_peak_f32_avx512(size_t n_steps);
double phi_peak_q8_avx512(size_t n_steps);

#endif
