/* The i8mm tier's kernels, gathered into one table by table.c. Needs FEAT_I8MM (ARMv8.2, optional; 8.6) and
 * FEAT_DotProd. */
#ifndef PHI_I8MM_H
#define PHI_I8MM_H

#include "../neon/neon.h"

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_i8mm(const phi_matmul *m);
PHI_NEON_PACKED(PHI_DECLARE)
#undef PHI_DECLARE

#endif
