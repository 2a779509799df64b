/* Products of packed rows with int8 activations: see packed.h. Two instructions for 16 products, and their widening. */
#include "neon.h"

#include "dot.h"
#include "packed.h"

PHI_DEFINE_PACKED_PRODUCTS(neon)
