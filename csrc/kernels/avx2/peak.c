/* Multiplier rates of the AVX2 tier (generic/peak.h). vpmaddubsw does not accumulate: its result is the next factor. */
#include "avx2.h"

#include "../generic/peak.h"
#include "simd.h"

#define DOT(sum, x) _mm256_maddubs_epi16(sum, x)
#define FMA(sum, x) _mm256_fmadd_ps(x, x, sum)
#define BROADCAST_FLOAT(i) _mm256_set1_ps((float)(i))

PHI_DEFINE_PEAK(phi_peak_q8_avx2, __m256i, int32_t, _mm256_set1_epi32, DOT, _mm256_set1_epi8((char)one))
PHI_DEFINE_PEAK(phi_peak_f32_avx2, __m256, float, BROADCAST_FLOAT, FMA, BROADCAST_FLOAT(one))
