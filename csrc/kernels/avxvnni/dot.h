/* The dot product of AVX-VNNI; with PHI_AVXVNNI_BY_AVX512, that of AVX-512 VNNI in its place. */
#ifndef PHI_AVXVNNI_DOT_H
#define PHI_AVXVNNI_DOT_H

#include <immintrin.h>

#include "../generic/unroll.h"

/* sum + four products of unsigned q and signed x in each int32. */
PHI_INLINE __m256i phi_dpbusd(__m256i sum, __m256i q, __m256i x) {
#ifdef PHI_AVXVNNI_BY_AVX512
    return _mm256_dpbusd_epi32(sum, q, x);
#else
    return _mm256_dpbusd_avx_epi32(sum, q, x);
#endif
}

#endif
