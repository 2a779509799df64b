/* Loads of the last weights of a row, fewer than a vector, for tiers without masked loads (AVX2 and NEON). Before it
 * includes this file a tier defines vector, STEP, load_f32, load_f16 and load_bf16 (see float_products.h). */
#ifndef PHI_GENERIC_PARTIAL_LOADS_H
#define PHI_GENERIC_PARTIAL_LOADS_H

#include <string.h>

#include "unroll.h"

PHI_INLINE vector load_partial_f32(const uint8_t *w, size_t n) {
    uint8_t bytes[STEP * 4] = {0};
    memcpy(bytes, w, n * 4);
    return load_f32(bytes);
}
PHI_INLINE vector load_partial_f16(const uint8_t *w, size_t n) {
    uint8_t bytes[STEP * 2] = {0};
    memcpy(bytes, w, n * 2);
    return load_f16(bytes);
}
PHI_INLINE vector load_partial_bf16(const uint8_t *w, size_t n) {
    uint8_t bytes[STEP * 2] = {0};
    memcpy(bytes, w, n * 2);
    return load_bf16(bytes);
}

#endif
