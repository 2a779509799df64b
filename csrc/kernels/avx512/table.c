/* The AVX-512 tier's table. */
#include "avx512.h"

#include "../generic/pack.h"

#define PHI_SLOTS(UPPER, lower) \
    .pack[PHI_TYPE_##UPPER] = phi_pack_##lower, .matmul_packed[PHI_TYPE_##UPPER] = phi_matmul_packed_##lower##_avx512,

const phi_kernels phi_kernels_avx512 = {
    .name = "avx512",
    .matmul[PHI_TYPE_F32] = phi_matmul_f32_avx512,
    .matmul[PHI_TYPE_F16] = phi_matmul_f16_avx512,
    .matmul[PHI_TYPE_BF16] = phi_matmul_bf16_avx512,
    PHI_AVX512_PACKED(PHI_SLOTS).attention = phi_attention_avx512,
};
