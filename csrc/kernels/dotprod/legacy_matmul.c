/* neon/legacy_products.h (Q4_0 to Q8_0 rows in row-major layout) by SDOT. */
#include "dotprod.h"

#include "dot.h"

#include "../neon/legacy_products.h"

PHI_DEFINE_LEGACY_PRODUCTS(dotprod)
