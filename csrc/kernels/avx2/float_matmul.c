/* Products of F32, F16 and BF16 rows with float activations: generic/float_products.h with vectors of 8 floats.
 * A tile is 4 rows x 3 tokens, the most that 16 registers hold: 12 FMAs for 7 loads, two of each per cycle. */
#include "avx2.h"
#include "simd.h"

#define TOKENS 3
enum { STEP = 8 };

typedef __m256 vector;

PHI_INLINE vector set_zero(void) { return _mm256_setzero_ps(); }
PHI_INLINE vector multiply_add(vector a, vector b, vector sum) { return _mm256_fmadd_ps(a, b, sum); }

/* The horizontal sums of four vectors, all in the same order of additions. */
PHI_INLINE __m128 sum_each(vector a, vector b, vector c, vector d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256 abcd = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

PHI_INLINE vector load_f32(const uint8_t *w) { return _mm256_loadu_ps((const float *)(const void *)w); }
PHI_INLINE vector load_f16(const uint8_t *w) { return phi_load_half((const uint16_t *)(const void *)w); }
PHI_INLINE vector load_bf16(const uint8_t *w) {
    const __m256i dwords = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)w));
    return _mm256_castsi256_ps(_mm256_slli_epi32(dwords, 16));
}

#include "../x86/float4.h"

#include "../generic/partial_loads.h"

#include "../generic/float_products.h"

void phi_matmul_f32_avx2(const phi_matmul *m) { matmul((format){4, load_f32, load_partial_f32}, m); }
void phi_matmul_f16_avx2(const phi_matmul *m) { matmul((format){2, load_f16, load_partial_f16}, m); }
void phi_matmul_bf16_avx2(const phi_matmul *m) { matmul((format){2, load_bf16, load_partial_bf16}, m); }
