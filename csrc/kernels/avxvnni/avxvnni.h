/* Kernels of the AVX-VNNI tier, listed in table.c. Requires AVX2, FMA, F16C and AVX-VNNI. */
#ifndef PHI_AVXVNNI_H
#define PHI_AVXVNNI_H

#include "../../kernels.h"

#define PHI_AVXVNNI_PACKED(X) X(Q4_0, q4_0) X(Q4_1, q4_1) X(Q8_0, q8_0) X(Q4_K, q4_k) X(Q5_K, q5_k) X(Q6_K, q6_k)

#define PHI_DECLARE(UPPER, lower) void phi_matmul_packed_##lower##_avxvnni(const phi_matmul *m);
PHI_AVXVNNI_PACKED(PHI_DECLARE)
#undef PHI_DECLARE

#endif
