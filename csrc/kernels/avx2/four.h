/* Four floats, one a row, for generic/float_products.h: what the AVX2 and the AVX-512 tier take alike. */
#ifndef PHI_AVX2_FOUR_H
#define PHI_AVX2_FOUR_H

#include <immintrin.h>

typedef __m128 four;

/* All ones for the first n of four floats. */
INLINE __m128i first_of_four(int n) { return _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3)); }
/* The others are 0. */
INLINE four load_first(const float *p, int n) { return _mm_maskload_ps(p, first_of_four(n)); }
INLINE void store_first(float *p, int n, four v) { _mm_maskstore_ps(p, first_of_four(n), v); }
INLINE four add_four(four a, four b) { return _mm_add_ps(a, b); }
INLINE void ask_for(const uint8_t *line) { _mm_prefetch((const char *)line, _MM_HINT_T1); }

#endif
