/* Multiplier rates of the AVX-512 tier (generic/peak.h). */
#include "avx512.h"

#include "../generic/peak.h"
#include "simd.h"

#define DOT(sum, x) _mm512_dpbusd_epi32(sum, x, x)
#define FMA(sum, x) _mm512_fmadd_ps(x, x, sum)
#define BROADCAST_FLOAT(i) _mm512_set1_ps((float)(i))

PHI_DEFINE_PEAK(phi_peak_q8_avx512, __m512i, int32_t, _mm512_set1_epi32, DOT, _mm512_set1_epi8((char)one))
PHI_DEFINE_PEAK(phi_peak_f32_avx512, __m512, float, BROADCAST_FLOAT, FMA, BROADCAST_FLOAT(one))
