/* The weighted sum of values for a tile of one row, straight from the pages, shared by the AVX2 and AVX-512 tiers.
 * Before it includes this file a tier defines `vector` and STEP, the floats in one; load_floats, store_floats,
 * repeat_float, multiply and multiply_add for vectors; and load_values, which loads STEP dimensions of a value, with
 * zeros instead of dimension n and later ones. */
#ifndef PHI_X86_ATTENTION_ONE_ROW_H
#define PHI_X86_ATTENTION_ONE_ROW_H

#include "../generic/attention_tile.h"
#include "prefetch.h"

/* STEP * n_vectors dimensions from first_dim on, of which the last vector has only n_dims. n_vectors is a compile-time
 * constant once inlined. Prefetches the keys of the next block. */
PHI_INLINE void accumulate_pv_dims(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int first,
                                   int end, const float *weights, size_t first_dim, int n_vectors, size_t n_dims) {
    const size_t head_dim = (size_t)a->head_dim, element = phi_kv_element_bytes(type);
    float *acc = t->acc + first_dim;
    vector sum[96 / STEP];
    UNROLL for (int i = 0; i < n_vectors; i++) sum[i] =
        multiply(load_floats(acc + STEP * i), repeat_float(&t->rescale[0]));
    for (int p = first; p < end;) {
        const phi_kv_slice page = phi_kv_slice_at(a, type, p);
        const int next = p + PHI_ATTENTION_BLOCK;
        const uint8_t *next_keys = next < t->any_end ? phi_page_of(a, next) : NULL;
        const int page_end = phi_min(end, (p / PHI_PAGE_TOKENS + 1) * PHI_PAGE_TOKENS);
        for (; p < page_end; p++, weights++) {
            const size_t slot = (size_t)(p % PHI_PAGE_TOKENS);
            const vector weight = repeat_float(weights);
            UNROLL for (int i = 0; i < n_vectors; i++) {
                const size_t n = i == n_vectors - 1 ? n_dims : STEP;
                const vector v = load_values(type, &page, head_dim, slot, first_dim + STEP * (size_t)i, n);
                sum[i] = multiply_add(weight, v, sum[i]);
            }
            for (size_t i = 0; next_keys && i < (size_t)n_vectors * STEP * element; i += CACHE_LINE_BYTES)
                prefetch_l2_line(next_keys + (slot * head_dim + first_dim) * element + i);
        }
    }
    UNROLL for (int i = 0; i < n_vectors; i++) store_floats(acc + STEP * i, sum[i]);
}

#endif
