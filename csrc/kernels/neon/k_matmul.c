/* Products of Q2_K to Q6_K rows with int8 activations: see k_products.h. */
#include "neon.h"

#include "dot.h"
#include "k_products.h"

PHI_DEFINE_K_PRODUCTS(neon)
