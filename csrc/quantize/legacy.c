/* Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 with a scale, and a min, in half precision; eight blocks at a time.
 *
 * The best scale is rounded to half precision before quants are chosen for it, so these answer for its rounding; then
 * scale and quants improve each other, as long as the error falls. */
#include "quantize.h"

#include <string.h>

#include "blocks.h"
#include "lanes.h"

enum { BLOCK = 32, ROUNDS = 3 };

/* Eight blocks as they go into the file. */
typedef struct {
    uint16_t d[PHI_LANES], m[PHI_LANES];
    float q[BLOCK][PHI_LANES];
    float err[PHI_LANES];
} blocks_of_32;

static void load(phi_lanes *lanes, const float *x, const float *importance, int n_blocks) {
    float unit[PHI_LANES], largest[PHI_LANES];
    for (int l = 0; l < n_blocks; l++) {
        unit[l] = phi_unit_of(x + l * BLOCK, BLOCK);
        largest[l] = phi_largest_importance(importance ? importance + l * BLOCK : NULL, BLOCK);
    }
    phi_load_lanes(lanes, BLOCK, n_blocks, x, unit, importance, largest);
}

static void keep_better(blocks_of_32 *best, const uint16_t *d, const uint16_t *m, float (*q)[PHI_LANES],
                        const float *err) {
    int is_better[PHI_LANES];
    PHI_EACH_LANE(l) {
        is_better[l] = err[l] < best->err[l];
        if (!is_better[l]) continue;
        best->d[l] = d[l];
        best->m[l] = m ? m[l] : 0;
        best->err[l] = err[l];
    }
    for (int i = 0; i < BLOCK; i++) {
        PHI_EACH_LANE(l) best->q[i][l] = is_better[l] ? q[i][l] : best->q[i][l];
    }
}

/* Rounds scales, finds quants for them, and keeps what is better; then the scales that suit these quants. */
static void try_symmetric(const phi_lanes *lanes, float q_min, float q_max, float *scale, blocks_of_32 *best) {
    float q[BLOCK][PHI_LANES];
    uint16_t d[PHI_LANES];
    phi_lane_sums sums;
    PHI_EACH_LANE(l) {
        d[l] = phi_scale_half(scale[l], lanes->unit[l]);
        scale[l] = phi_half_in_units(d[l], lanes->unit[l]);
    }
    phi_nearest(lanes, scale, NULL, q_min, q_max, q, &sums);
    keep_better(best, d, NULL, q, sums.err);
    PHI_EACH_LANE(l) {
        const float whole = sums.qx[l] + lanes->mean[l] * sums.q[l]; /* w q x */
        scale[l] = sums.qq[l] > 0.0f ? whole / sums.qq[l] : 0.0f;
    }
}

/* w = d q, q from q_min to q_max. */
static void solve_symmetric(const phi_lanes *lanes, float q_min, float q_max, blocks_of_32 *best) {
    float scale[PHI_LANES];
    phi_fit_symmetric(lanes, q_min, q_max, scale);
    for (int round = 0; round < ROUNDS; round++) try_symmetric(lanes, q_min, q_max, scale, best);
    /* Where all weights are alike, what matters is how the scale is rounded: other quants, other scales. */
    for (float end = q_min; end < q_min + 3.0f; end += 1.0f) {
        PHI_EACH_LANE(l) scale[l] = lanes->mean[l] / end;
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
        PHI_EACH_LANE(l) {
            m[l] = phi_half_of(min[l], lanes->unit[l]);
            min[l] = phi_half_in_units(m[l], lanes->unit[l]);
            /* Without a scale all quants are alike: it may as well make up for the min's rounding. */
            d[l] = phi_scale_half(scale[l] == 0.0f ? lanes->mean[l] - min[l] : scale[l], lanes->unit[l]);
            scale[l] = phi_half_in_units(d[l], lanes->unit[l]);
        }
        phi_nearest(lanes, scale, min, 0.0f, q_max, q, &sums);
        keep_better(best, d, m, q, sums.err);
        PHI_EACH_LANE(l) {
            const float spread = sums.qq[l] - sums.q[l] * sums.q[l] / lanes->sum_w[l];
            scale[l] = spread > 1e-5f * sums.qq[l] ? sums.qx[l] / spread : 0.0f;
            min[l] = lanes->mean[l] - scale[l] * sums.q[l] / lanes->sum_w[l];
        }
    }
}

/* Quants of a lane, from 0: nibbles, element i beside i + 16, and the fifth bits. */
static void store_nibbles(const blocks_of_32 *blocks, int lane, int offset, uint8_t *qs, uint8_t *qh) {
    uint32_t fifth = 0;
    for (int i = 0; i < 16; i++) {
        const uint32_t low = (uint32_t)((int)blocks->q[i][lane] + offset);
        const uint32_t high = (uint32_t)((int)blocks->q[i + 16][lane] + offset);
        qs[i] = (uint8_t)((low & 15u) | (high & 15u) << 4);
        fifth |= low >> 4 << i | high >> 4 << (i + 16);
    }
    for (int i = 0; i < 4 && qh; i++) qh[i] = (uint8_t)(fifth >> 8 * i);
}

typedef void (*solve_blocks)(const phi_lanes *lanes, blocks_of_32 *best);
typedef void (*store_block)(const blocks_of_32 *blocks, int lane, void *out);

static void quantize_row(const float *x, const float *importance, size_t n_cols, solve_blocks solve, store_block store,
                         uint8_t *out, size_t block_bytes) {
    for (size_t first = 0; first < n_cols; first += PHI_LANES * BLOCK) {
        const size_t left = (n_cols - first) / BLOCK;
        const int n_blocks = left < PHI_LANES ? (int)left : PHI_LANES;
        phi_lanes lanes;
        blocks_of_32 best;
        memset(&best, 0, sizeof best);
        PHI_EACH_LANE(l) best.err[l] = INFINITY;
        load(&lanes, x + first, importance ? importance + first : NULL, n_blocks);
        solve(&lanes, &best);
        for (int l = 0; l < n_blocks; l++) store(&best, l, out + (first / BLOCK + (size_t)l) * block_bytes);
    }
}

static void solve_q4_0(const phi_lanes *lanes, blocks_of_32 *best) { solve_symmetric(lanes, -8.0f, 7.0f, best); }

static void solve_q5_0(const phi_lanes *lanes, blocks_of_32 *best) { solve_symmetric(lanes, -16.0f, 15.0f, best); }

/* Eight bits need no search: the span is used to its ends, then the scale is adjusted to the quants. */
static void solve_q8_0(const phi_lanes *lanes, blocks_of_32 *best) {
    float scale[PHI_LANES] = {0};
    for (int i = 0; i < BLOCK; i++) {
        PHI_EACH_LANE(l) scale[l] = fabsf(lanes->x[i][l]) > scale[l] ? fabsf(lanes->x[i][l]) : scale[l];
    }
    PHI_EACH_LANE(l) scale[l] /= 127.0f;
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

#define LEGACY_ROW(type)                                                                                \
    void phi_quantize_row_##type(const float *x, const float *importance, size_t n_cols, void *out) {   \
        quantize_row(x, importance, n_cols, solve_##type, store_##type, out, sizeof(phi_block_##type)); \
    }

LEGACY_ROW(q4_0)
LEGACY_ROW(q4_1)
LEGACY_ROW(q5_0)
LEGACY_ROW(q5_1)
LEGACY_ROW(q8_0)
