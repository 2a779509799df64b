/* Multiplier rate of the i8mm tier (generic/peak.h). */
#include "i8mm.h"

#include "../generic/peak.h"
#include "../neon/simd.h"

#define DOT(sum, x) vmmlaq_s32(sum, x, x)

PHI_DEFINE_PEAK(phi_peak_q8_i8mm, int32x4_t, int32_t, vdupq_n_s32, DOT, vdupq_n_s8((int8_t)one))
