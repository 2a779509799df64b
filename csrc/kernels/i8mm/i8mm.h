/* Kernels of the i8mm tier, collected by table.c. Requires FEAT_DotProd and FEAT_I8MM: optional from ARMv8.2, mandatory
 * from ARMv8.6. */
#ifndef PHI_I8MM_H
#define PHI_I8MM_H

#include "../neon/neon.h"

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_i8mm(const phi_matmul *m);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

double phi_peak_q8_i8mm(size_t n_steps);

#endif
