/* Products of Q2_K to Q6_K rows with int8 activations, on the integer products of the tier that includes this.
 * Layout: blocks of 256 weights as in the file (blocks.h); activations with a scale per 32 and a sum per 16.
 * Idea: 32 columns at a time are unpacked to bytes and multiplied by up to four tokens. The weights' offsets and minima
 * are one float product with the activations' sums.
 * Bound: with SDOT, four instructions per 32 products and their scaling, or reading the rows. */
#ifndef PHI_NEON_K_PRODUCTS_H
#define PHI_NEON_K_PRODUCTS_H

#include "../../blocks.h"
#include "../../kernels.h"
#include "simd.h"

enum { BLOCK = 256, SUB_BLOCKS = BLOCK / PHI_Q8_BLOCK, MAX_TOKENS = 4, MAX_VECTORS = 4 };

/* Scales and minima of a block, per group of 16 or 32 columns. */
typedef struct {
    float32x4_t scale[MAX_VECTORS], min[MAX_VECTORS];
} groups;

/* A weight type. All fields are constants after inlining. */
typedef struct {
    size_t block_bytes;
    int groups_per_block; /* groups per 32 columns: 1 or 2 */
    void (*unpack_groups)(const uint8_t *block, groups *g);
    void (*unpack_quants)(const uint8_t *block, int sub_block, int8x16_t q[2]);
} format;

#define AT(type, field) (block + offsetof(phi_block_##type, field))

PHI_INLINE uint8x16_t low_bits(uint8x16_t bytes, int n) { return vandq_u8(bytes, vdupq_n_u8((uint8_t)((1 << n) - 1))); }
PHI_INLINE uint8x16_t nibbles(uint8x16_t bytes, int high) { return high ? vshrq_n_u8(bytes, 4) : low_bits(bytes, 4); }

/* 16 scales of a type without minima: its offset becomes a minimum of offset * scale. */
PHI_INLINE void scale_groups(int8x16_t scales, float d, float offset, groups *g) {
    phi_s8_to_floats(scales, g->scale);
    for (int i = 0; i < 4; i++) {
        g->scale[i] = vmulq_n_f32(g->scale[i], d);
        g->min[i] = vmulq_n_f32(g->scale[i], offset);
    }
}

PHI_INLINE void groups_q2_k(const uint8_t *block, groups *g) {
    const uint8x16_t packed = vld1q_u8(AT(q2_k, scales));
    const float d = phi_half(AT(q2_k, d)), dmin = phi_half(AT(q2_k, dmin));
    phi_u8_to_floats(low_bits(packed, 4), g->scale);
    phi_u8_to_floats(vshrq_n_u8(packed, 4), g->min);
    for (int i = 0; i < 4; i++) {
        g->scale[i] = vmulq_n_f32(g->scale[i], d);
        g->min[i] = vmulq_n_f32(g->min[i], dmin);
    }
}
PHI_INLINE void quants_q2_k(const uint8_t *block, int sub_block, int8x16_t q[2]) {
    for (int i = 0; i < 2; i++) {
        const uint8x16_t bytes = vld1q_u8(AT(q2_k, qs) + sub_block / 4 * 32 + 16 * i);
        q[i] = vreinterpretq_s8_u8(low_bits(phi_shift(bytes, -2 * (sub_block % 4)), 2));
    }
}

PHI_INLINE void groups_q3_k(const uint8_t *block, groups *g) {
    uint32_t low[2], high;
    memcpy(low, AT(q3_k, scales), sizeof low);
    memcpy(&high, AT(q3_k, scales) + 8, sizeof high);
    const uint32_t six_bits[4] = {
        (low[0] & 0x0f0f0f0fu) | (high & 0x03030303u) << 4,
        (low[1] & 0x0f0f0f0fu) | (high >> 2 & 0x03030303u) << 4,
        (low[0] >> 4 & 0x0f0f0f0fu) | (high >> 4 & 0x03030303u) << 4,
        (low[1] >> 4 & 0x0f0f0f0fu) | (high >> 6 & 0x03030303u) << 4,
    };
    const int8x16_t scales = vsubq_s8(vreinterpretq_s8_u32(vld1q_u32(six_bits)), vdupq_n_s8(32));
    scale_groups(scales, phi_half(AT(q3_k, d)), 4.0f, g);
}
PHI_INLINE void quants_q3_k(const uint8_t *block, int sub_block, int8x16_t q[2]) {
    for (int i = 0; i < 2; i++) {
        const uint8x16_t bytes = vld1q_u8(AT(q3_k, qs) + sub_block / 4 * 32 + 16 * i);
        const uint8x16_t third = phi_shift(vld1q_u8(AT(q3_k, hmask) + 16 * i), 2 - sub_block);
        const uint8x16_t low = low_bits(phi_shift(bytes, -2 * (sub_block % 4)), 2);
        q[i] = vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(4), third, low));
    }
}

/* phi_unpack_scales_k4 (6-bit scales and minima of Q4_K and Q5_K) four at a time. */
PHI_INLINE void groups_k4(const uint8_t *packed, float d, float dmin, groups *g) {
    uint32_t p[3];
    memcpy(p, packed, sizeof p);
    const uint32_t bytes[4] = {
        p[0] & 0x3f3f3f3fu,
        (p[2] & 0x0f0f0f0fu) | (p[0] >> 6 & 0x03030303u) << 4,
        p[1] & 0x3f3f3f3fu,
        (p[2] >> 4 & 0x0f0f0f0fu) | (p[1] >> 6 & 0x03030303u) << 4,
    };
    float32x4_t f[4];
    phi_u8_to_floats(vreinterpretq_u8_u32(vld1q_u32(bytes)), f);
    for (int i = 0; i < 2; i++) {
        g->scale[i] = vmulq_n_f32(f[i], d);
        g->min[i] = vmulq_n_f32(f[2 + i], dmin);
    }
}

PHI_INLINE void groups_q4_k(const uint8_t *block, groups *g) {
    groups_k4(AT(q4_k, scales), phi_half(AT(q4_k, d)), phi_half(AT(q4_k, dmin)), g);
}
PHI_INLINE void quants_q4_k(const uint8_t *block, int sub_block, int8x16_t q[2]) {
    for (int i = 0; i < 2; i++)
        q[i] = vreinterpretq_s8_u8(nibbles(vld1q_u8(AT(q4_k, qs) + sub_block / 2 * 32 + 16 * i), sub_block % 2));
}

PHI_INLINE void groups_q5_k(const uint8_t *block, groups *g) {
    groups_k4(AT(q5_k, scales), phi_half(AT(q5_k, d)), phi_half(AT(q5_k, dmin)), g);
}
PHI_INLINE void quants_q5_k(const uint8_t *block, int sub_block, int8x16_t q[2]) {
    for (int i = 0; i < 2; i++) {
        const uint8x16_t low = nibbles(vld1q_u8(AT(q5_k, qs) + sub_block / 2 * 32 + 16 * i), sub_block % 2);
        const uint8x16_t fifth = phi_shift(vld1q_u8(AT(q5_k, qh) + 16 * i), 4 - sub_block);
        q[i] = vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(16), fifth, low));
    }
}

PHI_INLINE void groups_q6_k(const uint8_t *block, groups *g) {
    scale_groups(vld1q_s8((const int8_t *)AT(q6_k, scales)), phi_half(AT(q6_k, d)), 32.0f, g);
}
PHI_INLINE void quants_q6_k(const uint8_t *block, int sub_block, int8x16_t q[2]) {
    const int half = sub_block / 4, quarter = sub_block % 4;
    for (int i = 0; i < 2; i++) {
        const uint8x16_t bytes = vld1q_u8(AT(q6_k, ql) + 64 * half + 32 * (quarter % 2) + 16 * i);
        const uint8x16_t high = phi_shift(vld1q_u8(AT(q6_k, qh) + 32 * half + 16 * i), 4 - 2 * quarter);
        q[i] = vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(48), high, nibbles(bytes, quarter / 2)));
    }
}

/* Products of the weights' scales and the scales x [SUB_BLOCKS] of a token's activations. */
PHI_INLINE void combine_scales(const format f, const groups *g, const float *x, float32x4_t *scales) {
    for (int i = 0; i < 2; i++) {
        const float32x4_t xs = vld1q_f32(x + 4 * i);
        if (f.groups_per_block == 1) {
            scales[i] = vmulq_f32(g->scale[i], xs);
        } else {
            scales[2 * i] = vmulq_f32(g->scale[2 * i], vzip1q_f32(xs, xs));
            scales[2 * i + 1] = vmulq_f32(g->scale[2 * i + 1], vzip2q_f32(xs, xs));
        }
    }
}

/* One row by n_tokens tokens, a constant after inlining. */
PHI_INLINE void multiply_row(const format f, const phi_matmul *m, const uint8_t *block, int token, int n_tokens,
                             float *out) {
    const size_t n = (size_t)m->n_cols;
    const int n_vectors = 2 * f.groups_per_block;
    phi_q8 x[MAX_TOKENS];
    float32x4_t total[MAX_TOKENS], min_total[MAX_TOKENS];
    UNROLL for (int t = 0; t < n_tokens; t++) {
        x[t] = phi_q8_at(m->x->q8, (size_t)(m->first_token + token + t) * n);
        total[t] = min_total[t] = vdupq_n_f32(0.0f);
    }
    for (size_t i = 0; i < n; i += BLOCK, block += f.block_bytes) {
        groups g;
        float32x4_t scales[MAX_TOKENS][MAX_VECTORS];
        f.unpack_groups(block, &g);
        UNROLL for (int t = 0; t < n_tokens; t++) {
            const float *sums =
                f.groups_per_block == 1 ? x[t].block_sums + i / PHI_Q8_BLOCK : x[t].sums + i / PHI_SUM_BLOCK;
            combine_scales(f, &g, x[t].scales + i / PHI_Q8_BLOCK, scales[t]);
            UNROLL for (int v = 0; v < n_vectors; v++) {
                min_total[t] = vfmaq_f32(min_total[t], g.min[v], vld1q_f32(sums + 4 * v));
            }
        }
        UNROLL for (int j = 0; j < SUB_BLOCKS; j++) {
            int8x16_t q[2];
            f.unpack_quants(block, j, q);
            UNROLL for (int t = 0; t < n_tokens; t++) {
                const int8_t *xs = x[t].quants + i + (size_t)j * PHI_Q8_BLOCK;
                const int32x4_t zero = vdupq_n_s32(0), first = phi_dot_16(zero, q[0], vld1q_s8(xs));
                const int32x4_t second = phi_dot_16(f.groups_per_block == 1 ? first : zero, q[1], vld1q_s8(xs + 16));
                const int group = j * f.groups_per_block;
                if (f.groups_per_block == 2)
                    total[t] = phi_add_by_lane(total[t], vcvtq_f32_s32(first), scales[t][group / 4], group % 4);
                const int last = group + f.groups_per_block - 1;
                total[t] = phi_add_by_lane(total[t], vcvtq_f32_s32(second), scales[t][last / 4], last % 4);
            }
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) {
        out[(size_t)(token + t) * m->out_stride] = vaddvq_f32(vsubq_f32(total[t], min_total[t]));
    }
}

#include "multiply_rows.h"

#define PHI_DEFINE_K(type, n_groups, tier)                                                            \
    void phi_matmul_##type##_##tier(const phi_matmul *m) {                                            \
        multiply_rows((format){sizeof(phi_block_##type), n_groups, groups_##type, quants_##type}, m); \
    }

#define PHI_DEFINE_K_PRODUCTS(tier) \
    PHI_DEFINE_K(q2_k, 2, tier)     \
    PHI_DEFINE_K(q3_k, 2, tier)     \
    PHI_DEFINE_K(q4_k, 1, tier)     \
    PHI_DEFINE_K(q5_k, 1, tier)     \
    PHI_DEFINE_K(q6_k, 2, tier)

#endif
