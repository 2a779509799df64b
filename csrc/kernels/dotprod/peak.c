/* Multiplier rate of the dotprod tier (generic/peak.h). */
#include "dotprod.h"

#include "../generic/peak.h"
#include "../neon/simd.h"

#define DOT(sum, x) vdotq_s32(sum, x, x)

PHI_DEFINE_PEAK(phi_peak_q8_dotprod, int32x4_t, int32_t, vdupq_n_s32, DOT, vdupq_n_s8((int8_t)one))
