/* Conversions between float, half precision and bfloat16 in portable C, subnormal and non-finite values included. */
#ifndef PHI_HALF_H
#define PHI_HALF_H

#include <stdint.h>
#include <string.h>

static inline float phi_float_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t phi_bits_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* Exact. */
static inline float phi_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return phi_float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x0400u) { /* subnormal: a multiple of 2^-24 */
        const float f = (float)magnitude * 0x1p-24f;
        return phi_float_from_bits(sign | phi_bits_from_float(f));
    }
    return phi_float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
}

/* Rounds to nearest, ties to even, as the F16C instructions do. */
static inline uint16_t phi_float_to_half(float f) {
    const uint32_t bits = phi_bits_from_float(f);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* the addition rounds to a multiple of 2^-24 */
        const float shifted = phi_float_from_bits(magnitude) + 0x1p-1f;
        return (uint16_t)(sign | (phi_bits_from_float(shifted) - 0x3f000000u));
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

static inline float phi_bf16_to_float(uint16_t b) { return phi_float_from_bits((uint32_t)b << 16); }

#endif
