/* float4: one float for each of the four rows of a tile, as generic/float_products.h needs it. Shared by the AVX2 and
 * AVX-512 tiers. */
#ifndef PHI_X86_FLOAT4_H
#define PHI_X86_FLOAT4_H

#include "prefetch.h"

typedef __m128 float4;

/* All ones in the first n lanes. */
PHI_INLINE __m128i float4_mask(int n) { return _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3)); }
/* The first n floats of p, then zeros. */
PHI_INLINE float4 float4_load(const float *p, int n) { return _mm_maskload_ps(p, float4_mask(n)); }
/* Stores the first n floats. */
PHI_INLINE void float4_store(float *p, int n, float4 v) { _mm_maskstore_ps(p, float4_mask(n), v); }
PHI_INLINE float4 float4_add(float4 a, float4 b) { return _mm_add_ps(a, b); }

PHI_INLINE void prefetch_weights(const uint8_t *line) { prefetch_l2_line(line); }

#endif
