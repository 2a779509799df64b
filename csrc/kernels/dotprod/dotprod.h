/* The dotprod tier's kernels, gathered into one table by table.c. Needs FEAT_DotProd (ARMv8.2, optional; 8.4). */
#ifndef PHI_DOTPROD_H
#define PHI_DOTPROD_H

#include "../neon/neon.h"

#define PHI_DECLARE(UPPER, lower) void phi_matmul_##lower##_dotprod(const phi_matmul *m);
PHI_NEON_LEGACY(PHI_DECLARE)
PHI_NEON_K(PHI_DECLARE)
#undef PHI_DECLARE

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_dotprod(const phi_matmul *m);
PHI_NEON_PACKED(PHI_DECLARE)
#undef PHI_DECLARE

#endif
