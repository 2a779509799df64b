/* Loads of values from the KV cache, eight dimensions at a time, shared by the AVX2 and NEON tiers. Before it includes
 * this file a tier defines eight_floats, with eight_zeros, store_eight, eight_from_half (from eight halves) and
 * eight_from_int8 (from eight int8 and their scale, a half). */
#ifndef PHI_GENERIC_ATTENTION_VALUES_H
#define PHI_GENERIC_ATTENTION_VALUES_H

#include "attention_tile.h"

/* n <= 8 dimensions from d on of the value in a slot, then zeros. */
PHI_INLINE eight_floats load_values(phi_kv_type type, const phi_kv_slice *page, size_t head_dim, size_t slot, size_t d,
                                    size_t n) {
    const size_t at = slot * head_dim + d, element = phi_kv_element_bytes(type);
    const uint8_t *values = page->values + at * element;
    uint8_t padded[16] = {0};
    if (n < 8) {
        memcpy(padded, values, n * element);
        values = padded;
    }
    if (type == PHI_KV_F16) return eight_from_half(values);
    const size_t n_blocks = (head_dim + PHI_KV_BLOCK - 1) / PHI_KV_BLOCK;
    return eight_from_int8(values, page->value_scales + slot * n_blocks + d / PHI_KV_BLOCK);
}

PHI_INLINE void convert_values(const phi_attention *a, phi_kv_type type, int first, int end, size_t first_dim,
                               float *values) {
    const size_t head_dim = (size_t)a->head_dim, left = head_dim - first_dim;
    for (int p = first; p < end; p++, values += PHI_VALUE_DIMS) {
        const phi_kv_slice page = phi_kv_slice_at(a, type, p);
        const size_t slot = (size_t)(p % PHI_PAGE_TOKENS);
        for (size_t d = 0; d < PHI_VALUE_DIMS; d += 8) {
            const size_t n = left <= d ? 0 : left - d < 8 ? left - d : 8;
            store_eight(values + d, n ? load_values(type, &page, head_dim, slot, first_dim + d, n) : eight_zeros());
        }
    }
}

#endif
