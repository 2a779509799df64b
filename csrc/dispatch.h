#ifndef PHI_DISPATCH_H
#define PHI_DISPATCH_H

#include "kernels.h"

/* The tier whose own kernel multiplies a type in the table of `tier`; NULL for an unknown tier. */
const char *phi_matmul_tier(const char *tier, phi_type type);

#endif
