/* Multiplier rates of the NEON tier (generic/peak.h). Compilers would move a product of constants out of the loop, so
 * the result of SMULL is its next factor. */
#include "neon.h"

#include "../generic/peak.h"
#include "simd.h"

#define DOT(sum, x) vreinterpretq_s32_s16(vmull_s8(vget_low_s8(vreinterpretq_s8_s32(sum)), vget_low_s8(x)))
#define FMA(sum, x) vfmaq_f32(sum, x, x)
#define BROADCAST_FLOAT(i) vdupq_n_f32((float)(i))

PHI_DEFINE_PEAK(phi_peak_q8_neon, int32x4_t, int32_t, vdupq_n_s32, DOT, vdupq_n_s8((int8_t)one))
PHI_DEFINE_PEAK(phi_peak_f32_neon, float32x4_t, float, BROADCAST_FLOAT, FMA, BROADCAST_FLOAT(one))
