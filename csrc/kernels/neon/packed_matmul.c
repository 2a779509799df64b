/* packed.h (packed rows) without SDOT: two instructions per 16 products, plus the widening to int32. */
#include "neon.h"

#include "dot.h"
#include "packed.h"

PHI_DEFINE_PACKED_PRODUCTS(neon)
