/* Software prefetch, for the AVX2, AVX-512 and AMX tiers. phi_matmul.prefetch has the distances. */
#ifndef PHI_X86_PREFETCH_H
#define PHI_X86_PREFETCH_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "../../phi.h"
#include "../generic/unroll.h"

enum { CACHE_LINE_BYTES = 64, SMALL_PAGE_BYTES = 4096 /* a virtual-memory page, not one of the KV cache */ };

/* One cache line, into L2: a core tracks far more outstanding misses of L2 than of L1. */
PHI_INLINE void prefetch_l2_line(const void *line) { _mm_prefetch((const char *)line, _MM_HINT_T1); }

PHI_INLINE void prefetch_l1(const uint8_t *bytes, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += CACHE_LINE_BYTES) _mm_prefetch((const char *)bytes + i, _MM_HINT_T0);
}
PHI_INLINE void prefetch_l2(const uint8_t *bytes, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += CACHE_LINE_BYTES) _mm_prefetch((const char *)bytes + i, _MM_HINT_T1);
}

/* The first two lines of the next 4 KiB page, which begins at `bytes` or after it. The hardware prefetchers stop at
 * every 4 KiB boundary, even within a huge page, and restart once these two lines are on their way. */
PHI_INLINE void prefetch_next_page(const uint8_t *bytes) {
    const uint8_t *page = bytes + (-(uintptr_t)bytes & (SMALL_PAGE_BYTES - 1));
    prefetch_l2(page, (size_t)2 * CACHE_LINE_BYTES);
}

/* Issues what p requests while the n_bytes at `bytes` are multiplied. next_unit: the unit after the current one, for
 * its first sub-block, else NULL; so the next page is prefetched once per unit. */
PHI_INLINE void prefetch_ahead(const phi_prefetch *p, const uint8_t *bytes, size_t n_bytes, const uint8_t *next_unit) {
    if (next_unit && p->next_page) prefetch_next_page(next_unit);
    if (p->l1_bytes) prefetch_l1(bytes + p->l1_bytes, n_bytes);
    if (p->l2_bytes) prefetch_l2(bytes + p->l2_bytes, n_bytes);
}

#endif
