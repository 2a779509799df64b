/* Products and dequantisation of the quantised types in plain C: the reference for every other tier, not tuned.
 * Layout: row-major blocks as in the file.
 * Idea: a block is unpacked once (unpack.h) and used for every token. */
#include "quantised.h"

#include "unpack.h"

typedef void (*unpack_fn)(const void *block, phi_unpacked *u);

static inline void dequantize(unpack_fn unpack, size_t block_bytes, size_t block, const void *row, size_t n, float *y) {
    phi_unpacked u;
    for (size_t i = 0; i < n; i += block) {
        unpack((const uint8_t *)row + i / block * block_bytes, &u);
        for (size_t k = 0; k < block; k++) {
            y[i + k] = u.scale[k / PHI_SUM_BLOCK] * (float)u.q[k] - u.min[k / PHI_SUM_BLOCK];
        }
    }
}

static float dot_block(const phi_unpacked *u, size_t block, phi_q8 x) {
    float total = 0.0f;
    for (size_t g = 0; g < block / PHI_SUM_BLOCK; g++) {
        int32_t dot = 0;
        for (size_t k = g * PHI_SUM_BLOCK; k < (g + 1) * PHI_SUM_BLOCK; k++) dot += u->q[k] * x.quants[k];
        total += u->scale[g] * x.scales[g * PHI_SUM_BLOCK / PHI_Q8_BLOCK] * (float)dot - u->min[g] * x.sums[g];
    }
    return total;
}

static inline void matmul(unpack_fn unpack, size_t block_bytes, size_t block, const phi_matmul *m) {
    const size_t n_cols = (size_t)m->n_cols;
    phi_unpacked u;
    for (int r = 0; r < m->n_rows; r++) {
        const uint8_t *row = m->rows + (size_t)r * m->row_bytes;
        for (int t = 0; t < m->n_tokens; t++) m->out[(size_t)t * m->out_stride + (size_t)r] = 0.0f;
        for (size_t i = 0; i < n_cols; i += block) {
            unpack(row + i / block * block_bytes, &u);
            for (int t = 0; t < m->n_tokens; t++) {
                const size_t x = (size_t)(m->first_token + t) * n_cols + i;
                m->out[(size_t)t * m->out_stride + (size_t)r] += dot_block(&u, block, phi_q8_at(m->x->q8, x));
            }
        }
    }
}

#define PHI_DEFINE(type, block)                                                    \
    void phi_dequantize_##type##_scalar(const void *row, size_t n, float *y) {     \
        dequantize(phi_unpack_##type, sizeof(phi_block_##type), block, row, n, y); \
    }                                                                              \
    void phi_matmul_##type##_scalar(const phi_matmul *m) {                         \
        matmul(phi_unpack_##type, sizeof(phi_block_##type), block, m);             \
    }
PHI_QUANTISED_TYPES(PHI_DEFINE)

void phi_quantize_q8_scalar(const float *x, size_t n, phi_q8 q8) {
    for (size_t b = 0; b < n / PHI_Q8_BLOCK; b++) {
        const float *block = x + b * PHI_Q8_BLOCK;
        /* Magnitudes order as their bits do, infinity and NaN above all finite values. A block that holds one gets a
         * scale that is not finite, so that its products are not finite either. */
        uint32_t largest = 0;
        for (size_t i = 0; i < PHI_Q8_BLOCK; i++) {
            const uint32_t magnitude = phi_bits_from_float(fabsf(block[i]));
            largest = magnitude > largest ? magnitude : largest;
        }
        const float scale = phi_float_from_bits(largest) / 127.0f;
        /* The inverse of a subnormal scale may overflow: such a block becomes zero. */
        const float inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
        int sum[2] = {0, 0};
        for (size_t i = 0; i < PHI_Q8_BLOCK; i++) {
            const int q = (int)fmaxf(-127.0f, fminf(127.0f, rintf(block[i] * inverse)));
            q8.quants[b * PHI_Q8_BLOCK + i] = (int8_t)q;
            sum[i / PHI_SUM_BLOCK] += q;
        }
        q8.scales[b] = scale;
        q8.sums[2 * b] = scale * (float)sum[0];
        q8.sums[2 * b + 1] = scale * (float)sum[1];
        q8.block_sums[b] = scale * (float)(sum[0] + sum[1]);
        q8.offsets[2 * b] = -128 * sum[0];
        q8.offsets[2 * b + 1] = -128 * sum[1];
        q8.block_offsets[b] = -128 * (sum[0] + sum[1]);
    }
}
