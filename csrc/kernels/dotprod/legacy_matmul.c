/* Products of Q4_0 to Q8_0 rows with int8 activations: see neon/legacy_products.h, by SDOT. */
#include "dotprod.h"

#include "dot.h"

#include "../neon/legacy_products.h"

PHI_DEFINE_LEGACY_PRODUCTS(dotprod)
