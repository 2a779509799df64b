/* Kernels of the dotprod tier, collected by table.c. Requires FEAT_DotProd: optional from ARMv8.2, mandatory from
 * ARMv8.4. */
#ifndef PHI_DOTPROD_H
#define PHI_DOTPROD_H

#include "../neon/neon.h"

#define PHI_DECLARE(UPPER, lower) void phi_matmul_##lower##_dotprod(const phi_matmul *m);
PHI_NEON_LEGACY(PHI_DECLARE)
PHI_NEON_K(PHI_DECLARE)
#undef PHI_DECLARE

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_dotprod(const phi_matmul *m);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

double phi_peak_q8_dotprod(size_t n_steps);

#endif
