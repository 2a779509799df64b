/* The AMX tier's kernels, gathered into one table by table.c. Needs AMX-INT8 and what the AVX-512 tier needs. */
#ifndef PHI_AMX_H
#define PHI_AMX_H

#include "../../kernels.h"

/* Up to here products are those of the AVX-512 tier: one token and a batch give the same bits. */
enum { PHI_AMX_FEW_TOKENS = 16 };

#define PHI_DECLARE(type) void phi_matmul_packed_##type##_amx(const phi_matmul *m);
PHI_DECLARE(q4_k)
PHI_DECLARE(q5_k)
PHI_DECLARE(q6_k)
#undef PHI_DECLARE

void phi_quantize_tiled_amx(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token);

#endif
