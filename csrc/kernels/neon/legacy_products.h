/* Products of Q4_0 to Q8_0 rows with int8 activations, on the integer products of the tier that includes this.
 * Layout: blocks of 32 weights as in the file (blocks.h); activations with a scale per 32.
 * Idea: a block is unpacked to signed bytes once and multiplied by up to four tokens. Minima are multiplied by the
 * activations' sums.
 * Bound: with SDOT, eight instructions per 32 products, or reading the rows. */
#ifndef PHI_NEON_LEGACY_PRODUCTS_H
#define PHI_NEON_LEGACY_PRODUCTS_H

#include "../../blocks.h"
#include "../../kernels.h"
#include "simd.h"

enum { BLOCK = 32, MAX_TOKENS = 4 };

/* A weight type. All fields are constants after inlining. */
typedef struct {
    size_t block_bytes;
    bool has_min; /* w = d * q + m, with m stored after d; otherwise w = d * q */
    void (*unpack)(const uint8_t *block, int8x16_t q[2]);
} format;

#define AT(type, field) (block + offsetof(phi_block_##type, field))

PHI_INLINE void unpack_nibbles(const uint8_t *qs, uint8x16_t q[2]) {
    const uint8x16_t packed = vld1q_u8(qs);
    q[0] = vandq_u8(packed, vdupq_n_u8(15));
    q[1] = vshrq_n_u8(packed, 4);
}

/* 16 bits to 16 bytes, each 0 or 16. */
PHI_INLINE uint8x16_t fifth_bits(const uint8_t *qh) {
    const uint8x16_t bytes = vcombine_u8(vdup_n_u8(qh[0]), vdup_n_u8(qh[1]));
    const uint8x16_t bit_masks = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    return vandq_u8(vtstq_u8(bytes, bit_masks), vdupq_n_u8(16));
}

PHI_INLINE void subtract_offset(const uint8x16_t q[2], int offset, int8x16_t signed_q[2]) {
    for (int i = 0; i < 2; i++) signed_q[i] = vsubq_s8(vreinterpretq_s8_u8(q[i]), vdupq_n_s8((int8_t)offset));
}

PHI_INLINE void unpack_q4_0(const uint8_t *block, int8x16_t q[2]) {
    uint8x16_t u[2];
    unpack_nibbles(AT(q4_0, qs), u);
    subtract_offset(u, 8, q);
}

PHI_INLINE void unpack_q4_1(const uint8_t *block, int8x16_t q[2]) {
    uint8x16_t u[2];
    unpack_nibbles(AT(q4_1, qs), u);
    subtract_offset(u, 0, q);
}

PHI_INLINE void unpack_5_bits(const uint8_t *qs, const uint8_t *qh, uint8x16_t u[2]) {
    unpack_nibbles(qs, u);
    for (int i = 0; i < 2; i++) u[i] = vorrq_u8(u[i], fifth_bits(qh + 2 * i));
}

PHI_INLINE void unpack_q5_0(const uint8_t *block, int8x16_t q[2]) {
    uint8x16_t u[2];
    unpack_5_bits(AT(q5_0, qs), AT(q5_0, qh), u);
    subtract_offset(u, 16, q);
}

PHI_INLINE void unpack_q5_1(const uint8_t *block, int8x16_t q[2]) {
    uint8x16_t u[2];
    unpack_5_bits(AT(q5_1, qs), AT(q5_1, qh), u);
    subtract_offset(u, 0, q);
}

PHI_INLINE void unpack_q8_0(const uint8_t *block, int8x16_t q[2]) {
    for (int i = 0; i < 2; i++) q[i] = vld1q_s8((const int8_t *)AT(q8_0, qs) + 16 * i);
}

/* One row by n_tokens tokens, a constant after inlining. */
PHI_INLINE void multiply_row(const format f, const phi_matmul *m, const uint8_t *block, int token, int n_tokens,
                             float *out) {
    const size_t n_blocks = (size_t)m->n_cols / BLOCK;
    phi_q8 x[MAX_TOKENS];
    float32x4_t total[MAX_TOKENS];
    float min_total[MAX_TOKENS];
    UNROLL for (int t = 0; t < n_tokens; t++) {
        x[t] = phi_q8_at(m->x->q8, (size_t)(m->first_token + token + t) * (size_t)m->n_cols);
        total[t] = vdupq_n_f32(0.0f);
        min_total[t] = 0.0f;
    }
    for (size_t b = 0; b < n_blocks; b++, block += f.block_bytes) {
        int8x16_t q[2];
        const float d = phi_half(block), min = f.has_min ? phi_half(block + 2) : 0.0f;
        f.unpack(block, q);
        UNROLL for (int t = 0; t < n_tokens; t++) {
            const int8_t *xs = x[t].quants + b * BLOCK;
            const int32x4_t first = phi_dot_16(vdupq_n_s32(0), q[0], vld1q_s8(xs));
            const int32x4_t dot = phi_dot_16(first, q[1], vld1q_s8(xs + 16));
            total[t] = vfmaq_n_f32(total[t], vcvtq_f32_s32(dot), d * x[t].scales[b]);
            if (f.has_min) min_total[t] += min * x[t].block_sums[b];
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) {
        out[(size_t)(token + t) * m->out_stride] = vaddvq_f32(total[t]) + min_total[t];
    }
}

#include "multiply_rows.h"

#define PHI_DEFINE_LEGACY(type, has_min, tier)                                        \
    void phi_matmul_##type##_##tier(const phi_matmul *m) {                            \
        multiply_rows((format){sizeof(phi_block_##type), has_min, unpack_##type}, m); \
    }

#define PHI_DEFINE_LEGACY_PRODUCTS(tier) \
    PHI_DEFINE_LEGACY(q4_0, false, tier) \
    PHI_DEFINE_LEGACY(q4_1, true, tier)  \
    PHI_DEFINE_LEGACY(q5_0, false, tier) \
    PHI_DEFINE_LEGACY(q5_1, true, tier)  \
    PHI_DEFINE_LEGACY(q8_0, false, tier)

#endif
