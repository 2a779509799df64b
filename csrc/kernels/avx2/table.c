/* Kernel table of the AVX2 tier. Dequantisation, which is not speed-critical, is inherited from the scalar tier. */
#include "avx2.h"

#include "../generic/peak.h"

#define PHI_SLOT(UPPER, lower) .matmul[PHI_TYPE_##UPPER] = phi_matmul_##lower##_avx2,
#define PHI_PACKED_SLOTS(UPPER, lower) \
    .pack[PHI_TYPE_##UPPER] = phi_pack_##lower, .matmul_packed[PHI_TYPE_##UPPER] = phi_matmul_packed_##lower##_avx2,

const phi_kernels phi_kernels_avx2 = {
    .name = "avx2",
    PHI_AVX2_TYPES(PHI_SLOT) PHI_PACKED_TYPES(PHI_PACKED_SLOTS).quantize_q8 = phi_quantize_q8_avx2,
    .rms_norm = phi_rms_norm_avx2,
    .layer_norm = phi_layer_norm_avx2,
    .rope = {phi_rope_neox_avx2, phi_rope_interleaved_avx2},
    .silu_mul = phi_silu_mul_avx2,
    .gelu = phi_gelu_avx2,
    .add = phi_add_avx2,
    .store_kv = {phi_store_kv_f16_avx2, phi_store_kv_q8_avx2},
    .attention = {phi_attention_f16_avx2, phi_attention_q8_avx2},
    .peak = {PHI_PEAK(phi_peak_f32_avx2, 8), PHI_PEAK(phi_peak_q8_avx2, 32)},
};
