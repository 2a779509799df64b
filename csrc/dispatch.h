#ifndef PHI_DISPATCH_H
#define PHI_DISPATCH_H

#include "cpu.h"
#include "kernels.h"

/* The tier whose own kernel multiplies a type in the table of `tier`; NULL for an unknown tier. */
const char *phi_matmul_tier(const char *tier, phi_type type);

/* What a tier has of its own, on whatever machine; NULL for an unknown tier. */
const phi_kernels *phi_own_kernels(const char *tier);

/* Prefetch distances for a CPU. */
phi_prefetch phi_prefetch_for(const phi_cpu *cpu);

#endif
