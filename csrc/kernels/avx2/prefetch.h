/* Asking for memory before it is needed: what products on x86 take alike. */
#ifndef PHI_AVX2_PREFETCH_H
#define PHI_AVX2_PREFETCH_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "../generic/unroll.h"

enum { LINE_BYTES = 64, PAGE_BYTES = 4096 };

PHI_INLINE void prefetch(const uint8_t *bytes, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += LINE_BYTES) _mm_prefetch((const char *)bytes + i, _MM_HINT_T0);
}
PHI_INLINE void prefetch_to_second_level(const uint8_t *bytes, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += LINE_BYTES) _mm_prefetch((const char *)bytes + i, _MM_HINT_T1);
}

/* The first two lines of the page that begins at `bytes` or after it: the core's own prefetchers stop where a page of 4
 * KiB ends, huge pages or not, and go on once these are on their way. */
PHI_INLINE void prefetch_next_page(const uint8_t *bytes) {
    const uint8_t *page = bytes + (-(uintptr_t)bytes & (PAGE_BYTES - 1));
    prefetch_to_second_level(page, (size_t)2 * LINE_BYTES);
}

#endif
