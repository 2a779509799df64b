/* legacy_products.h (Q4_0 to Q8_0 rows in row-major layout) without SDOT. */
#include "neon.h"

#include "dot.h"
#include "legacy_products.h"

PHI_DEFINE_LEGACY_PRODUCTS(neon)
