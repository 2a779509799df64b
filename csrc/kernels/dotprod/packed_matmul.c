/* neon/packed.h (packed rows) by SDOT. */
#include "dotprod.h"

#include "dot.h"

#include "../neon/packed.h"

PHI_DEFINE_PACKED_PRODUCTS(dotprod)
