/* Products of packed rows with int8 activations on AVX2; layout and loops are in packed.h.
 * Idea: vpmaddubsw adds pairs of products to int16. Lines are summed in int16 as long as no sum can overflow, then
 * vpmaddwd widens pairs to int32. A line of 4-bit quants adds at most 15 * 127 * 2 = 3810, so eight lines fit; 5 bits:
 * four lines; 6 bits: two. Signed bytes are multiplied as magnitudes, with their signs moved to the activations; a line
 * of them adds up to 128 * 127 * 2 = 32512, so one fits.
 * Bound: prefill, 4 bits: 20 vector instructions for 256 products. */
#include "avx2.h"
#include "simd.h"

#define PHI_SIGNED_BYTES 1

PHI_INLINE int phi_lines_per_sum(int bits) { return bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }

PHI_INLINE __m256i phi_add_products(int bits, __m256i q, __m256i x, const __m256i *sum) {
    const __m256i products =
        bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q)) : _mm256_maddubs_epi16(q, x);
    return sum ? _mm256_add_epi16(*sum, products) : products;
}

PHI_INLINE __m256i phi_to_int32(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

#include "packed.h"

#define PHI_DEFINE(type, bits, n_sub_blocks, n_groups)                      \
    void phi_matmul_packed_##type##_avx2(const phi_matmul *m) {             \
        multiply_packed(PHI_FORMAT(type, bits, n_sub_blocks, n_groups), m); \
    }
PHI_PACKED_FORMATS(PHI_DEFINE)
