/* Kernel table of the AVX-512 tier. Products of row-major quantised weights and RoPE are inherited from AVX2. */
#include "avx512.h"

#include "../generic/peak.h"

#define PHI_SLOTS(UPPER, lower) \
    .pack[PHI_TYPE_##UPPER] = phi_pack_##lower, .matmul_packed[PHI_TYPE_##UPPER] = phi_matmul_packed_##lower##_avx512,

const phi_kernels phi_kernels_avx512 = {
    .name = "avx512",
    .matmul[PHI_TYPE_F32] = phi_matmul_f32_avx512,
    .matmul[PHI_TYPE_F16] = phi_matmul_f16_avx512,
    .matmul[PHI_TYPE_BF16] = phi_matmul_bf16_avx512,
    PHI_PACKED_TYPES(PHI_SLOTS).quantize_q8 = phi_quantize_q8_avx512,
    .rms_norm = phi_rms_norm_avx512,
    .layer_norm = phi_layer_norm_avx512,
    .silu_mul = phi_silu_mul_avx512,
    .gelu = phi_gelu_avx512,
    .add = phi_add_avx512,
    .store_kv = {phi_store_kv_f16_avx512, phi_store_kv_q8_avx512},
    .attention = {phi_attention_f16_avx512, phi_attention_q8_avx512},
    .peak = {PHI_PEAK(phi_peak_f32_avx512, 16), PHI_PEAK(phi_peak_q8_avx512, 64)},
};
