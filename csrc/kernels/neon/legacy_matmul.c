/* Products of Q4_0 to Q8_0 rows with int8 activations: see legacy_products.h. */
#include "neon.h"

#include "dot.h"
#include "legacy_products.h"

PHI_DEFINE_LEGACY_PRODUCTS(neon)
