/* Kernels of the AMX-BF16 tier, collected by table.c. Requires AMX-BF16, AVX512-BF16 and everything that the AVX-512
 * tier requires. */
#ifndef PHI_AMXBF16_H
#define PHI_AMXBF16_H

#include "../generic/pack.h"

/* Batches of up to this many tokens use the AVX-512 kernels, whose bits do not depend on the batch size. */
enum { PHI_AMXBF16_MAX_EXACT_BATCH = 16 };

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_amxbf16(const phi_matmul *m);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

void phi_quantize_tiled_amxbf16(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token);

#endif
