/* The AMX tier's table. Panels, and products of few tokens, are those of the AVX-512 tier. Q4_0, Q4_1 and Q8_0, with a
 * scale for each 32 weights, lose too much to one scale for 256 (docs/performance.md): they stay with it whole. */
#include "amx.h"

const phi_kernels phi_kernels_amx = {
    .name = "amx",
    .max_exact_batch = PHI_AMX_FEW_TOKENS,
    .matmul_packed[PHI_TYPE_Q4_K] = phi_matmul_packed_q4_k_amx,
    .matmul_packed[PHI_TYPE_Q5_K] = phi_matmul_packed_q5_k_amx,
    .matmul_packed[PHI_TYPE_Q6_K] = phi_matmul_packed_q6_k_amx,
    .takes_tiled[PHI_TYPE_Q4_K] = true,
    .takes_tiled[PHI_TYPE_Q5_K] = true,
    .takes_tiled[PHI_TYPE_Q6_K] = true,
    .quantize_tiled = phi_quantize_tiled_amx,
};
