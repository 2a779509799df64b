/* Selection of the kernel table; phi_select_kernels and the other public functions are in phi.h. */
#ifndef PHI_DISPATCH_H
#define PHI_DISPATCH_H

#include "kernels.h"

/* The tier that implements the matrix product of a type in the table of `tier`; NULL for an unknown tier. */
const char *phi_matmul_tier(const char *tier, phi_type type);

/* The kernels that a tier implements itself, whether or not this machine can run it; NULL for an unknown tier. */
const phi_kernels *phi_own_kernels(const char *tier);

#endif
