/* Products of Q2_K to Q6_K rows with int8 activations: see neon/k_products.h, by SDOT. */
#include "dotprod.h"

#include "dot.h"

#include "../neon/k_products.h"

PHI_DEFINE_K_PRODUCTS(dotprod)
