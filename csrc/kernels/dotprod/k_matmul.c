/* neon/k_products.h (Q2_K to Q6_K rows in row-major layout) by SDOT. */
#include "dotprod.h"

#include "dot.h"

#include "../neon/k_products.h"

PHI_DEFINE_K_PRODUCTS(dotprod)
