/* k_products.h (Q2_K to Q6_K rows in row-major layout) without SDOT. */
#include "neon.h"

#include "dot.h"
#include "k_products.h"

PHI_DEFINE_K_PRODUCTS(neon)
