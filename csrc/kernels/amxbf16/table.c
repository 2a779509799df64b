/* Kernel table of the AMX-BF16 tier: prefill products of every packed type. Everything else is inherited from the
 * AVX-512 tier: packing, batches of up to PHI_AMXBF16_MAX_EXACT_BATCH tokens, and F32, F16 and BF16 matrices, whose
 * activations stay in float32. The amx tier in between tiles activations differently, so every product
 * that takes tiled activations is replaced together with quantize_tiled. */
#include "amxbf16.h"

const phi_kernels phi_kernels_amxbf16 = {
    .name = "amxbf16",
    .max_exact_batch = PHI_AMXBF16_MAX_EXACT_BATCH,
    .matmul_packed[PHI_TYPE_Q4_0] = phi_matmul_packed_q4_0_amxbf16,
    .matmul_packed[PHI_TYPE_Q4_1] = phi_matmul_packed_q4_1_amxbf16,
    .matmul_packed[PHI_TYPE_Q8_0] = phi_matmul_packed_q8_0_amxbf16,
    .matmul_packed[PHI_TYPE_Q4_K] = phi_matmul_packed_q4_k_amxbf16,
    .matmul_packed[PHI_TYPE_Q5_K] = phi_matmul_packed_q5_k_amxbf16,
    .matmul_packed[PHI_TYPE_Q6_K] = phi_matmul_packed_q6_k_amxbf16,
    .takes_tiled[PHI_TYPE_Q4_0] = true,
    .takes_tiled[PHI_TYPE_Q4_1] = true,
    .takes_tiled[PHI_TYPE_Q8_0] = true,
    .takes_tiled[PHI_TYPE_Q4_K] = true,
    .takes_tiled[PHI_TYPE_Q5_K] = true,
    .takes_tiled[PHI_TYPE_Q6_K] = true,
    .quantize_tiled = phi_quantize_tiled_amxbf16,
};
