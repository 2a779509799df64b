/* Kernel table of the NEON tier. Dequantisation of rows is inherited from the scalar tier: it is too rare to need a
 * kernel. */
#include "neon.h"

#include "../generic/peak.h"

#define PHI_SLOT(UPPER, lower) .matmul[PHI_TYPE_##UPPER] = phi_matmul_##lower##_neon,
#define PHI_PACKED_SLOTS(UPPER, lower) \
    .pack[PHI_TYPE_##UPPER] = phi_pack_##lower, .matmul_packed[PHI_TYPE_##UPPER] = phi_matmul_packed_##lower##_neon,

const phi_kernels phi_kernels_neon = {
    .name = "neon",
    PHI_NEON_FLOATS(PHI_SLOT) PHI_NEON_LEGACY(PHI_SLOT) PHI_NEON_K(PHI_SLOT) PHI_PACKED_TYPES(PHI_PACKED_SLOTS)
        .quantize_q8 = phi_quantize_q8_neon,
    .rms_norm = phi_rms_norm_neon,
    .layer_norm = phi_layer_norm_neon,
    .rope = {phi_rope_neox_neon, phi_rope_interleaved_neon},
    .silu_mul = phi_silu_mul_neon,
    .gelu = phi_gelu_neon,
    .add = phi_add_neon,
    .store_kv = {phi_store_kv_f16_neon, phi_store_kv_q8_neon},
    .attention = {phi_attention_f16_neon, phi_attention_q8_neon},
    .peak = {PHI_PEAK(phi_peak_f32_neon, 4), PHI_PEAK(phi_peak_q8_neon, 8)},
};
