/* Products of packed rows with int8 activations on AVX-VNNI; layout and loops are in avx2/packed.h.
 * Idea: vpdpbusd adds four products of unsigned quants and activations to an int32. Quants of Q8_0 are offset by 128 to
 * make them unsigned.
 * Bound: prefill: 12 vector instructions for 256 products. */
#include "avxvnni.h"

#include "../avx2/simd.h"
#include "dot.h"

#define PHI_SIGNED_BYTES 0

PHI_INLINE int phi_lines_per_sum(int bits) {
    (void)bits;
    return 8;
}

PHI_INLINE __m256i phi_add_products(int bits, __m256i q, __m256i x, const __m256i *sum) {
    const __m256i before = sum ? *sum : _mm256_setzero_si256();
    (void)bits;
    return phi_dpbusd(before, q, x);
}

PHI_INLINE __m256i phi_to_int32(__m256i sum) { return sum; }

#include "../avx2/packed.h"

#define PHI_DEFINE(type, bits, n_sub_blocks, n_groups)                      \
    void phi_matmul_packed_##type##_avxvnni(const phi_matmul *m) {          \
        multiply_packed(PHI_FORMAT(type, bits, n_sub_blocks, n_groups), m); \
    }
PHI_PACKED_FORMATS(PHI_DEFINE)
