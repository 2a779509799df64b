/* Kernels of the AVX-VNNI tier, listed in table.c. Requires AVX2, FMA, F16C and AVX-VNNI. */
#ifndef PHI_AVXVNNI_H
#define PHI_AVXVNNI_H

#include "../generic/pack.h"

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_avxvnni(const phi_matmul *m);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

double phi_peak_q8_avxvnni(size_t n_steps);

#endif
