/* Products of F32, F16 and BF16 rows with float activations: generic/float_products.h with vectors of 16 floats.
 * A tile is 4 rows x 6 tokens: 24 FMAs for 10 loads, one of each per cycle on Zen 4. */
#include "avx512.h"

#include <immintrin.h>

#include "../generic/unroll.h"

#define TOKENS 6
enum { STEP = 16 };

typedef __m512 vector;

PHI_INLINE vector set_zero(void) { return _mm512_setzero_ps(); }
PHI_INLINE vector multiply_add(vector a, vector b, vector sum) { return _mm512_fmadd_ps(a, b, sum); }

/* The horizontal sums of four vectors, all in the same order of additions. */
PHI_INLINE __m128 sum_each(vector a, vector b, vector c, vector d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

PHI_INLINE __mmask16 first_of_16(size_t n) { return (__mmask16)((1u << n) - 1); }
PHI_INLINE __m256i load_16_words(const uint8_t *w) { return _mm256_loadu_si256((const __m256i *)(const void *)w); }
PHI_INLINE vector from_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

PHI_INLINE vector load_f32(const uint8_t *w) { return _mm512_loadu_ps(w); }
PHI_INLINE vector load_f16(const uint8_t *w) { return _mm512_cvtph_ps(load_16_words(w)); }
PHI_INLINE vector load_bf16(const uint8_t *w) { return from_bf16(load_16_words(w)); }
PHI_INLINE vector load_partial_f32(const uint8_t *w, size_t n) { return _mm512_maskz_loadu_ps(first_of_16(n), w); }
PHI_INLINE vector load_partial_f16(const uint8_t *w, size_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_of_16(n), w));
}
PHI_INLINE vector load_partial_bf16(const uint8_t *w, size_t n) {
    return from_bf16(_mm256_maskz_loadu_epi16(first_of_16(n), w));
}

#include "../x86/float4.h"

#include "../generic/float_products.h"

void phi_matmul_f32_avx512(const phi_matmul *m) { matmul((format){4, load_f32, load_partial_f32}, m); }
void phi_matmul_f16_avx512(const phi_matmul *m) { matmul((format){2, load_f16, load_partial_f16}, m); }
void phi_matmul_bf16_avx512(const phi_matmul *m) { matmul((format){2, load_bf16, load_partial_bf16}, m); }
