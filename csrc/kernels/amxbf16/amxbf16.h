/* The AMX-BF16 tier's kernels, gathered into one table by table.c. Needs AMX-BF16, AVX512-BF16 and what the AVX-512
 * tier needs. */
#ifndef PHI_AMXBF16_H
#define PHI_AMXBF16_H

#include "../../kernels.h"

/* Up to here products are those of the AVX-512 tier: one token and a batch give the same bits. */
enum { PHI_AMXBF16_FEW_TOKENS = 16 };

#define PHI_DECLARE(type) void phi_matmul_packed_##type##_amxbf16(const phi_matmul *m);
PHI_DECLARE(q4_0)
PHI_DECLARE(q4_1)
PHI_DECLARE(q8_0)
PHI_DECLARE(q4_k)
PHI_DECLARE(q5_k)
PHI_DECLARE(q6_k)
#undef PHI_DECLARE

void phi_quantize_tiled_amxbf16(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token);

#endif
