/* Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 with a scale, and possibly a min, in half precision. Eight blocks at a
 * time.
 *
 * The best scale is rounded to half precision before quants are chosen, so the quants compensate for the rounding. Then
 * scale and quants are improved in turn, and the round with the smallest error is used. */
#include "quantize.h"

#include <string.h>

#include "blocks.h"
#include "lanes.h"

enum { BLOCK = 32, ROUNDS = 3 };

/* The contents of eight blocks, before they are packed into the file format. */
typedef struct {
    uint16_t d[PHI_LANES], m[PHI_LANES];
    float q[BLOCK][PHI_LANES];
    float err[PHI_LANES];
} blocks_of_32;

static void load(phi_lanes *lanes, const float *x, const float *importance, int n_blocks) {
    float normaliser[PHI_LANES], largest[PHI_LANES];
    for (int l = 0; l < n_blocks; l++) {
        normaliser[l] = phi_normaliser(x + l * BLOCK, BLOCK);
        largest[l] = phi_largest_importance(importance ? importance + l * BLOCK : NULL, BLOCK);
    }
    phi_load_lanes(lanes, BLOCK, n_blocks, x, normaliser, importance, largest);
}

/* Copies each lane whose error is smaller than that of the best so far. m: NULL for types without a min. */
static void update_best(blocks_of_32 *best, const uint16_t *d, const uint16_t *m, float (*q)[PHI_LANES],
                        const float *err) {
    int is_better[PHI_LANES];
    PHI_FOR_EACH_LANE(l) {
        is_better[l] = err[l] < best->err[l];
        if (!is_better[l]) continue;
        best->d[l] = d[l];
        best->m[l] = m ? m[l] : 0;
        best->err[l] = err[l];
    }
    for (int i = 0; i < BLOCK; i++) {
        PHI_FOR_EACH_LANE(l) best->q[i][l] = is_better[l] ? q[i][l] : best->q[i][l];
    }
}

/* Rounds scales to half precision, finds quants, updates best; then sets scale to the best one for these quants. */
static void try_symmetric(const phi_lanes *lanes, float q_min, float q_max, float *scale, blocks_of_32 *best) {
    float q[BLOCK][PHI_LANES];
    uint16_t d[PHI_LANES];
    phi_lane_sums sums;
    PHI_FOR_EACH_LANE(l) {
        d[l] = phi_scale_to_half(scale[l], lanes->normaliser[l]);
        scale[l] = phi_half_to_value(d[l], lanes->normaliser[l]);
    }
    phi_nearest_quants(lanes, scale, NULL, q_min, q_max, q, &sums);
    update_best(best, d, NULL, q, sums.err);
    PHI_FOR_EACH_LANE(l) {
        const float wqx = sums.wqx[l] + lanes->mean[l] * sums.wq[l]; /* w q x */
        scale[l] = sums.wqq[l] > 0.0f ? wqx / sums.wqq[l] : 0.0f;
    }
}

/* w = d q, q from q_min to q_max. */
static void solve_symmetric(const phi_lanes *lanes, float q_min, float q_max, blocks_of_32 *best) {
    float scale[PHI_LANES];
    phi_fit_symmetric(lanes, q_min, q_max, scale);
    for (int round = 0; round < ROUNDS; round++) try_symmetric(lanes, q_min, q_max, scale, best);
    /* Where all weights are equal, only the rounding of the scale matters: tries other quants, hence other scales. */
    for (float end = q_min; end < q_min + 3.0f; end += 1.0f) {
        PHI_FOR_EACH_LANE(l) scale[l] = lanes->mean[l] / end;
        try_symmetric(lanes, q_min, q_max, scale, best);
    }
}

/* w = d q + m, q from 0 to q_max. */
static void solve_affine(const phi_lanes *lanes, float q_max, blocks_of_32 *best) {
    float q[BLOCK][PHI_LANES], scale[PHI_LANES], min[PHI_LANES];
    uint16_t d[PHI_LANES], m[PHI_LANES];
    phi_lane_sums sums;
    phi_fit_affine(lanes, q_max, 0, scale, min);
    for (int round = 0; round < ROUNDS; round++) {
        PHI_FOR_EACH_LANE(l) {
            m[l] = phi_value_to_half(min[l], lanes->normaliser[l]);
            min[l] = phi_half_to_value(m[l], lanes->normaliser[l]);
            /* With a scale of 0 all quants are equal: the scale is then free to compensate for the rounding of the min.
             */
            d[l] = phi_scale_to_half(scale[l] == 0.0f ? lanes->mean[l] - min[l] : scale[l], lanes->normaliser[l]);
            scale[l] = phi_half_to_value(d[l], lanes->normaliser[l]);
        }
        phi_nearest_quants(lanes, scale, min, 0.0f, q_max, q, &sums);
        update_best(best, d, m, q, sums.err);
        PHI_FOR_EACH_LANE(l) {
            const float wqq_centred = sums.wqq[l] - sums.wq[l] * sums.wq[l] / lanes->sum_w[l];
            scale[l] = wqq_centred > 1e-5f * sums.wqq[l] ? sums.wqx[l] / wqq_centred : 0.0f;
            min[l] = lanes->mean[l] - scale[l] * sums.wq[l] / lanes->sum_w[l];
        }
    }
}

/* Stores quants + offset of a lane: low nibbles in qs (element i with i + 16), fifth bits in qh unless NULL. */
static void store_nibbles(const blocks_of_32 *blocks, int lane, int offset, uint8_t *qs, uint8_t *qh) {
    uint32_t fifth_bits = 0;
    for (int i = 0; i < 16; i++) {
        const uint32_t low = (uint32_t)((int)blocks->q[i][lane] + offset);
        const uint32_t high = (uint32_t)((int)blocks->q[i + 16][lane] + offset);
        qs[i] = (uint8_t)((low & 15u) | (high & 15u) << 4);
        fifth_bits |= low >> 4 << i | high >> 4 << (i + 16);
    }
    for (int i = 0; i < 4 && qh; i++) qh[i] = (uint8_t)(fifth_bits >> 8 * i);
}

typedef void (*solve_fn)(const phi_lanes *lanes, blocks_of_32 *best);
typedef void (*store_fn)(const blocks_of_32 *blocks, int lane, void *out);

static void quantize_row(const float *x, const float *importance, size_t n_cols, solve_fn solve, store_fn store,
                         uint8_t *out, size_t block_bytes) {
    for (size_t first = 0; first < n_cols; first += PHI_LANES * BLOCK) {
        const size_t n_left = (n_cols - first) / BLOCK;
        const int n_blocks = n_left < PHI_LANES ? (int)n_left : PHI_LANES;
        phi_lanes lanes;
        blocks_of_32 best;
        memset(&best, 0, sizeof best);
        PHI_FOR_EACH_LANE(l) best.err[l] = INFINITY;
        load(&lanes, x + first, importance ? importance + first : NULL, n_blocks);
        solve(&lanes, &best);
        for (int l = 0; l < n_blocks; l++) store(&best, l, out + (first / BLOCK + (size_t)l) * block_bytes);
    }
}

static void solve_q4_0(const phi_lanes *lanes, blocks_of_32 *best) { solve_symmetric(lanes, -8.0f, 7.0f, best); }

static void solve_q5_0(const phi_lanes *lanes, blocks_of_32 *best) { solve_symmetric(lanes, -16.0f, 15.0f, best); }

/* Eight bits need no search: the scale maps the largest magnitude to 127, then is adjusted to the quants. */
static void solve_q8_0(const phi_lanes *lanes, blocks_of_32 *best) {
    float scale[PHI_LANES] = {0};
    for (int i = 0; i < BLOCK; i++) {
        PHI_FOR_EACH_LANE(l) scale[l] = fabsf(lanes->x[i][l]) > scale[l] ? fabsf(lanes->x[i][l]) : scale[l];
    }
    PHI_FOR_EACH_LANE(l) scale[l] /= 127.0f;
    for (int round = 0; round < ROUNDS; round++) try_symmetric(lanes, -127.0f, 127.0f, scale, best);
}

static void solve_q4_1(const phi_lanes *lanes, blocks_of_32 *best) { solve_affine(lanes, 15.0f, best); }

static void solve_q5_1(const phi_lanes *lanes, blocks_of_32 *best) { solve_affine(lanes, 31.0f, best); }

static void store_q4_0(const blocks_of_32 *blocks, int lane, void *out) {
    phi_block_q4_0 block = {.d = blocks->d[lane]};
    store_nibbles(blocks, lane, 8, block.qs, NULL);
    memcpy(out, &block, sizeof block);
}

static void store_q5_0(const blocks_of_32 *blocks, int lane, void *out) {
    phi_block_q5_0 block = {.d = blocks->d[lane]};
    store_nibbles(blocks, lane, 16, block.qs, block.qh);
    memcpy(out, &block, sizeof block);
}

static void store_q8_0(const blocks_of_32 *blocks, int lane, void *out) {
    phi_block_q8_0 block = {.d = blocks->d[lane]};
    for (int i = 0; i < BLOCK; i++) block.qs[i] = (int8_t)blocks->q[i][lane];
    memcpy(out, &block, sizeof block);
}

static void store_q4_1(const blocks_of_32 *blocks, int lane, void *out) {
    phi_block_q4_1 block = {.d = blocks->d[lane], .m = blocks->m[lane]};
    store_nibbles(blocks, lane, 0, block.qs, NULL);
    memcpy(out, &block, sizeof block);
}

static void store_q5_1(const blocks_of_32 *blocks, int lane, void *out) {
    phi_block_q5_1 block = {.d = blocks->d[lane], .m = blocks->m[lane]};
    store_nibbles(blocks, lane, 0, block.qs, block.qh);
    memcpy(out, &block, sizeof block);
}

#define DEFINE_QUANTIZE_ROW(type)                                                                       \
    void phi_quantize_row_##type(const float *x, const float *importance, size_t n_cols, void *out) {   \
        quantize_row(x, importance, n_cols, solve_##type, store_##type, out, sizeof(phi_block_##type)); \
    }

DEFINE_QUANTIZE_ROW(q4_0)
DEFINE_QUANTIZE_ROW(q4_1)
DEFINE_QUANTIZE_ROW(q5_0)
DEFINE_QUANTIZE_ROW(q5_1)
DEFINE_QUANTIZE_ROW(q8_0)
