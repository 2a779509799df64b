/* Products of packed rows with int8 activations: see neon/packed.h, by SDOT. */
#include "dotprod.h"

#include "dot.h"

#include "../neon/packed.h"

PHI_DEFINE_PACKED_PRODUCTS(dotprod)
