/* 16 bytes as one vector: SSE2 or NEON, which every 64-bit x86 and ARM CPU has. */
#ifndef PHI_GENERIC_BYTES16_H
#define PHI_GENERIC_BYTES16_H

/* PHI_ZIP(n): phi_zip_low_n(a, b) and phi_zip_high_n(a, b) interleave the n-bit elements of the low, and of the high,
 * eight bytes of a and b: a[0], b[0], a[1], b[1], ... */

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>

typedef __m128i phi_bytes16;
static inline phi_bytes16 phi_load16(const void *p) { return _mm_loadu_si128(p); }
static inline void phi_store16(void *p, phi_bytes16 v) { _mm_storeu_si128(p, v); }
#define PHI_ZIP(n)                                                                                                \
    static inline phi_bytes16 phi_zip_low_##n(phi_bytes16 a, phi_bytes16 b) { return _mm_unpacklo_epi##n(a, b); } \
    static inline phi_bytes16 phi_zip_high_##n(phi_bytes16 a, phi_bytes16 b) { return _mm_unpackhi_epi##n(a, b); }

#else
#include <arm_neon.h>

typedef uint8x16_t phi_bytes16;
static inline phi_bytes16 phi_load16(const void *p) { return vld1q_u8(p); }
static inline void phi_store16(void *p, phi_bytes16 v) { vst1q_u8(p, v); }
#define PHI_ZIP(n)                                                                                         \
    static inline phi_bytes16 phi_zip_low_##n(phi_bytes16 a, phi_bytes16 b) {                              \
        return vreinterpretq_u8_u##n(vzip1q_u##n(vreinterpretq_u##n##_u8(a), vreinterpretq_u##n##_u8(b))); \
    }                                                                                                      \
    static inline phi_bytes16 phi_zip_high_##n(phi_bytes16 a, phi_bytes16 b) {                             \
        return vreinterpretq_u8_u##n(vzip2q_u##n(vreinterpretq_u##n##_u8(a), vreinterpretq_u##n##_u8(b))); \
    }
#define vreinterpretq_u8_u8(v) (v)

#endif

PHI_ZIP(8)
PHI_ZIP(32)
PHI_ZIP(64)
#undef PHI_ZIP

#endif
