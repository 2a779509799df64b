/* Unpacks a block of a quantised type to integers with a scale and a minimum per 16 of them: w = scale * q - min.
 * One function per type, used by both dequantisation and the scalar products. The order of the float operations is that
 * of ggml's reference, so that dequantised values agree bit for bit. */
#ifndef PHI_UNPACK_H
#define PHI_UNPACK_H

#include "../../blocks.h"
#include "../../half.h"

typedef struct {
    int8_t q[256];
    float scale[16], min[16]; /* per sub-block of 16 quants */
} phi_unpacked;

static inline void phi_fill_pair(float *groups, int sub_block, float value) {
    groups[2 * sub_block] = groups[2 * sub_block + 1] = value;
}

static inline void phi_unpack_nibbles(const uint8_t *qs, int8_t *q) {
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)(qs[i] & 15);
        q[i + 16] = (int8_t)(qs[i] >> 4);
    }
}

static inline void phi_add_fifth_bits(const uint8_t *qh, int8_t *q) {
    for (int i = 0; i < 32; i++) q[i] = (int8_t)(q[i] | (qh[i / 8] >> (i % 8) & 1) << 4);
}

static inline void phi_unpack_q4_0(const void *block, phi_unpacked *u) {
    const phi_block_q4_0 *b = block;
    phi_unpack_nibbles(b->qs, u->q);
    for (int i = 0; i < 32; i++) u->q[i] = (int8_t)(u->q[i] - 8);
    phi_fill_pair(u->scale, 0, phi_half_to_float(b->d));
    phi_fill_pair(u->min, 0, 0.0f);
}

static inline void phi_unpack_q4_1(const void *block, phi_unpacked *u) {
    const phi_block_q4_1 *b = block;
    phi_unpack_nibbles(b->qs, u->q);
    phi_fill_pair(u->scale, 0, phi_half_to_float(b->d));
    phi_fill_pair(u->min, 0, -phi_half_to_float(b->m));
}

static inline void phi_unpack_q5_0(const void *block, phi_unpacked *u) {
    const phi_block_q5_0 *b = block;
    phi_unpack_nibbles(b->qs, u->q);
    phi_add_fifth_bits(b->qh, u->q);
    for (int i = 0; i < 32; i++) u->q[i] = (int8_t)(u->q[i] - 16);
    phi_fill_pair(u->scale, 0, phi_half_to_float(b->d));
    phi_fill_pair(u->min, 0, 0.0f);
}

static inline void phi_unpack_q5_1(const void *block, phi_unpacked *u) {
    const phi_block_q5_1 *b = block;
    phi_unpack_nibbles(b->qs, u->q);
    phi_add_fifth_bits(b->qh, u->q);
    phi_fill_pair(u->scale, 0, phi_half_to_float(b->d));
    phi_fill_pair(u->min, 0, -phi_half_to_float(b->m));
}

static inline void phi_unpack_q8_0(const void *block, phi_unpacked *u) {
    const phi_block_q8_0 *b = block;
    memcpy(u->q, b->qs, 32);
    phi_fill_pair(u->scale, 0, phi_half_to_float(b->d));
    phi_fill_pair(u->min, 0, 0.0f);
}

static inline void phi_unpack_q2_k(const void *block, phi_unpacked *u) {
    const phi_block_q2_k *b = block;
    const float d = phi_half_to_float(b->d), dmin = phi_half_to_float(b->dmin);
    for (int g = 0; g < 16; g++) {
        u->scale[g] = d * (float)(b->scales[g] & 15);
        u->min[g] = dmin * (float)(b->scales[g] >> 4);
    }
    for (int i = 0; i < 256; i++) u->q[i] = (int8_t)(b->qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3);
}

static inline void phi_unpack_q3_k(const void *block, phi_unpacked *u) {
    const phi_block_q3_k *b = block;
    const float d = phi_half_to_float(b->d);
    for (int g = 0; g < 16; g++) {
        const int low = b->scales[g % 8] >> (g / 8 * 4) & 15;
        const int high = b->scales[8 + g % 4] >> (g / 4 * 2) & 3;
        u->scale[g] = d * (float)((low | high << 4) - 32);
        u->min[g] = 0.0f;
    }
    for (int i = 0; i < 256; i++) {
        const int low = b->qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        const int high = b->hmask[i % 32] >> (i / 32) & 1;
        u->q[i] = (int8_t)((low | high << 2) - 4);
    }
}

/* Eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K, in 12 bytes; see phi_block_q4_k. */
static inline void phi_unpack_scales_k4(const uint8_t *scales, float d, float dmin, phi_unpacked *u) {
    for (int j = 0; j < 8; j++) {
        const int scale = j < 4 ? scales[j] & 63 : (scales[j + 4] & 15) | scales[j - 4] >> 6 << 4;
        const int min = j < 4 ? scales[j + 4] & 63 : scales[j + 4] >> 4 | scales[j] >> 6 << 4;
        phi_fill_pair(u->scale, j, d * (float)scale);
        phi_fill_pair(u->min, j, dmin * (float)min);
    }
}

static inline void phi_unpack_q4_k(const void *block, phi_unpacked *u) {
    const phi_block_q4_k *b = block;
    phi_unpack_scales_k4(b->scales, phi_half_to_float(b->d), phi_half_to_float(b->dmin), u);
    for (int i = 0; i < 256; i++) u->q[i] = (int8_t)(b->qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15);
}

static inline void phi_unpack_q5_k(const void *block, phi_unpacked *u) {
    const phi_block_q5_k *b = block;
    phi_unpack_scales_k4(b->scales, phi_half_to_float(b->d), phi_half_to_float(b->dmin), u);
    for (int i = 0; i < 256; i++) {
        const int low = b->qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        u->q[i] = (int8_t)(low | (b->qh[i % 32] >> (i / 32) & 1) << 4);
    }
}

static inline void phi_unpack_q6_k(const void *block, phi_unpacked *u) {
    const phi_block_q6_k *b = block;
    const float d = phi_half_to_float(b->d);
    for (int g = 0; g < 16; g++) {
        u->scale[g] = d * (float)b->scales[g];
        u->min[g] = 0.0f;
    }
    for (int i = 0; i < 256; i++) {
        const int low = b->ql[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        const int high = b->qh[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        u->q[i] = (int8_t)((low | high << 4) - 32);
    }
}

#endif
