/* NEON helpers shared by the kernels of all ARM tiers. */
#ifndef PHI_NEON_SIMD_H
#define PHI_NEON_SIMD_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "../generic/unroll.h"

#ifdef _MSC_VER
#define phi_prefetch_line(p) __prefetch(p)
#else
#define phi_prefetch_line(p) __builtin_prefetch(p)
#endif

/* Hides how an address was computed, so that the compiler addresses its surroundings by offsets from one register. */
#ifdef __GNUC__
#define PHI_OPAQUE_ADDRESS(p) __asm__ volatile("" : "+r"(p))
#else
#define PHI_OPAQUE_ADDRESS(p) (void)(p)
#endif

/* Half-precision values at any address, to float. They are loaded as bytes: they may be unaligned. */
PHI_INLINE float32x4_t phi_load_half(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
PHI_INLINE float phi_half(const void *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

/* sum + a * lane i of b; i is a constant after inlining. */
PHI_INLINE float32x4_t phi_add_by_lane(float32x4_t sum, float32x4_t a, float32x4_t b, int i) {
    switch (i) {
    case 0:
        return vfmaq_laneq_f32(sum, a, b, 0);
    case 1:
        return vfmaq_laneq_f32(sum, a, b, 1);
    case 2:
        return vfmaq_laneq_f32(sum, a, b, 2);
    default:
        return vfmaq_laneq_f32(sum, a, b, 3);
    }
}

/* Shifts every byte left by n bits, or right by -n; n is a constant after inlining. */
PHI_INLINE uint8x16_t phi_shift(uint8x16_t bytes, int n) {
    switch (n) {
    case 4:
        return vshlq_n_u8(bytes, 4);
    case 3:
        return vshlq_n_u8(bytes, 3);
    case 2:
        return vshlq_n_u8(bytes, 2);
    case 1:
        return vshlq_n_u8(bytes, 1);
    case -1:
        return vshrq_n_u8(bytes, 1);
    case -2:
        return vshrq_n_u8(bytes, 2);
    case -3:
        return vshrq_n_u8(bytes, 3);
    case -4:
        return vshrq_n_u8(bytes, 4);
    case -5:
        return vshrq_n_u8(bytes, 5);
    case -6:
        return vshrq_n_u8(bytes, 6);
    default:
        return bytes;
    }
}

/* 16 bytes to 16 floats: f [4]. */
PHI_INLINE void phi_u8_to_floats(uint8x16_t bytes, float32x4_t *f) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    f[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
    f[1] = vcvtq_f32_u32(vmovl_high_u16(low));
    f[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
    f[3] = vcvtq_f32_u32(vmovl_high_u16(high));
}
PHI_INLINE void phi_s8_to_floats(int8x16_t bytes, float32x4_t *f) {
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    f[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    f[1] = vcvtq_f32_s32(vmovl_high_s16(low));
    f[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    f[3] = vcvtq_f32_s32(vmovl_high_s16(high));
}

/* e^x, relative error below 2e-7: x = n ln 2 + r, e^r by its Taylor series up to r^6, |r| <= ln(2) / 2.
 * x is clamped to [-87.3, 88.3]: smaller arguments give about the smallest normal float. NaN stays NaN. */
PHI_INLINE float32x4_t phi_exp(float32x4_t x) {
    x = vminq_f32(vdupq_n_f32(88.3f), vmaxq_f32(vdupq_n_f32(-87.3f), x));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    float32x4_t r = vfmsq_n_f32(x, n, 0.693359375f); /* ln 2 in two parts, the first exact */
    r = vfmsq_n_f32(r, n, -2.12194440e-4f);
    float32x4_t e = vdupq_n_f32(1.0f / 720.0f);
    e = vfmaq_f32(vdupq_n_f32(1.0f / 120.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f / 24.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f / 6.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(0.5f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f), e, r);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(e, vreinterpretq_f32_s32(power));
}

#endif
