/* Writes of one position's key and value to the KV cache, around a tier's conversions.
 * Layout: phi_kv_slice. A position's key is a column of its group, its value a row. */
#ifndef PHI_GENERIC_STORE_KV_H
#define PHI_GENERIC_STORE_KV_H

#include <string.h>

#include "../../kernels.h"
#include "unroll.h"

/* quantize_kv: quantises n <= PHI_KV_BLOCK dimensions to q [PHI_KV_BLOCK]; returns their scale in half precision. */
PHI_INLINE void phi_store_kv_q8(uint16_t (*quantize_kv)(const float *x, size_t n, int8_t *q), const float *k,
                                const float *v, int head_dim, int slot, uint8_t *slice) {
    const phi_kv_slice page = phi_kv_slice_of(PHI_KV_Q8, head_dim, slice);
    const size_t head = (size_t)head_dim, n_blocks = phi_kv_blocks(head_dim), s = (size_t)slot;
    uint8_t *keys = page.keys + s / PHI_KV_GROUP * head * PHI_KV_GROUP + s % PHI_KV_GROUP;
    for (size_t b = 0; b < n_blocks; b++) {
        const size_t d = b * PHI_KV_BLOCK, n = head - d < PHI_KV_BLOCK ? head - d : PHI_KV_BLOCK;
        int8_t q[PHI_KV_BLOCK];
        page.value_scales[s * n_blocks + b] = quantize_kv(v + d, n, q);
        memcpy(page.values + s * head + d, q, n);
        page.key_scales[b * PHI_PAGE_TOKENS + s] = quantize_kv(k + d, n, q);
        for (size_t i = 0; i < n; i++) keys[(d + i) * PHI_KV_GROUP] = (uint8_t)q[i];
    }
}

/* to_half: converts `step` floats, at most 8. */
PHI_INLINE void phi_store_kv_f16(void (*to_half)(const float *x, uint16_t *halves), size_t step, const float *k,
                                 const float *v, int head_dim, int slot, uint8_t *slice) {
    const phi_kv_slice page = phi_kv_slice_of(PHI_KV_F16, head_dim, slice);
    const size_t n = (size_t)head_dim, n_full = n / step * step, s = (size_t)slot;
    uint16_t *keys = (uint16_t *)(void *)page.keys + s / PHI_KV_GROUP * n * PHI_KV_GROUP + s % PHI_KV_GROUP;
    uint16_t *values = (uint16_t *)(void *)page.values + s * n;
    uint16_t halves[8] = {0};
    for (size_t d = 0; d < n_full; d += step) {
        to_half(k + d, halves);
        for (size_t i = 0; i < step; i++) keys[(d + i) * PHI_KV_GROUP] = halves[i];
        to_half(v + d, values + d);
    }
    if (n_full == n) return;
    float tail[8] = {0};
    memcpy(tail, k + n_full, (n - n_full) * sizeof *tail);
    to_half(tail, halves);
    for (size_t d = n_full; d < n; d++) keys[d * PHI_KV_GROUP] = halves[d - n_full];
    memcpy(tail, v + n_full, (n - n_full) * sizeof *tail);
    to_half(tail, halves);
    memcpy(values + n_full, halves, (n - n_full) * sizeof *halves);
}

#endif
