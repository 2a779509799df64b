/* Kernel table of the AMX tier: prefill products of Q4_K, Q5_K and Q6_K. Everything else, packing and batches of up to
 * PHI_AMX_MAX_EXACT_BATCH tokens included, is inherited from the AVX-512 tier. So are Q4_0, Q4_1 and Q8_0: they have a
 * scale per 32 weights, and requantising them to one scale per 256 loses too much accuracy (docs/performance.md). */
#include "amx.h"

const phi_kernels phi_kernels_amx = {
    .name = "amx",
    .max_exact_batch = PHI_AMX_MAX_EXACT_BATCH,
    .matmul_packed[PHI_TYPE_Q4_K] = phi_matmul_packed_q4_k_amx,
    .matmul_packed[PHI_TYPE_Q5_K] = phi_matmul_packed_q5_k_amx,
    .matmul_packed[PHI_TYPE_Q6_K] = phi_matmul_packed_q6_k_amx,
    .takes_tiled[PHI_TYPE_Q4_K] = true,
    .takes_tiled[PHI_TYPE_Q5_K] = true,
    .takes_tiled[PHI_TYPE_Q6_K] = true,
    .quantize_tiled = phi_quantize_tiled_amx,
};
