/* Multiplier rate of the AVX-VNNI tier (generic/peak.h). */
#include "avxvnni.h"

#include "../avx2/simd.h"
#include "../generic/peak.h"
#include "dot.h"

#define DOT(sum, x) phi_dpbusd(sum, x, x)

PHI_DEFINE_PEAK(phi_peak_q8_avxvnni, __m256i, int32_t, _mm256_set1_epi32, DOT, _mm256_set1_epi8((char)one))
