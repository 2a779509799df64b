/* Q2_K to Q6_K: super-blocks of 256 with one scale, and one min, in half precision, and a small integer for each
 * sub-block that says how much of it is meant: the code.
 *
 * First each sub-block gets the scale and min that suit it best; the super-block's are those of which codes come
 * nearest to these. Then, in rounds: every sub-block takes the codes, of those around its own scale, whose quants are
 * nearest; codes and quants fixed, the super-block's scale and min are solved for (weighted least squares). The best
 * round is kept. Where it is much worse than sub-blocks alone would be, a few other scales are tried. */
#include "quantize.h"

#include <string.h>

#include "blocks.h"
#include "lanes.h"

enum { SUPER_BLOCK = 256, MAX_GROUPS = 2, ROUNDS = 3, MORE_TRIES = 6, N_STEPS = 9 };
#define STEP 0.1f        /* of the extreme code */
#define NEAR_ENOUGH 1.1f /* error over that of sub-blocks alone */

/* What a type is to the search. */
typedef struct {
    int n;              /* elements a sub-block */
    float q_min, q_max; /* quants */
    float code_min, code_max;
} k_type;

static const k_type q2_k = {16, 0, 3, 0, 15}, q3_k = {16, -4, 3, -32, 31}, q4_k = {32, 0, 15, 0, 63},
                    q5_k = {32, 0, 31, 0, 63}, q6_k = {16, -32, 31, -128, 127};

/* The quants and codes of eight sub-blocks. */
typedef struct {
    float scale[PHI_LANES], min[PHI_LANES]; /* codes */
    float q[PHI_LANE_ELEMENTS][PHI_LANES];
    phi_lane_sums sums;
} group;

typedef struct {
    uint16_t d, dmin;
    group groups[MAX_GROUPS];
    float err;
} super_block;

/* A super-block's weights, and the scale and min, in floats, that suit each of its sub-blocks best. */
typedef struct {
    const k_type *type;
    phi_lanes lanes[MAX_GROUPS];
    float scale[MAX_GROUPS][PHI_LANES], min[MAX_GROUPS][PHI_LANES];
    float scale_curvature[MAX_GROUPS][PHI_LANES], min_curvature[MAX_GROUPS][PHI_LANES];
} k_search;

static int n_groups(const k_type *type) { return SUPER_BLOCK / PHI_LANES / type->n; }

static int is_affine(const k_type *type) { return type->q_min == 0.0f; }

static void load(phi_lanes *lanes, const k_type *type, const float *x, const float *importance) {
    const float unit = phi_unit_of(x, SUPER_BLOCK);
    const float largest = phi_largest_importance(importance, SUPER_BLOCK);
    float units[PHI_LANES], largests[PHI_LANES];
    PHI_EACH_LANE(l) {
        units[l] = unit;
        largests[l] = largest;
    }
    for (int g = 0; g < n_groups(type); g++) {
        const int at = g * PHI_LANES * type->n;
        phi_load_lanes(&lanes[g], type->n, PHI_LANES, x + at, units, importance ? importance + at : NULL, largests);
    }
}

/* Keeps for each sub-block the codes if the quants nearest for them err less than the least so far. */
static void try_codes(const k_search *search, int g, float d, float dmin, const float *scale_code,
                      const float *min_code, float *least, group *best) {
    const k_type *type = search->type;
    float scale[PHI_LANES], min[PHI_LANES];
    PHI_EACH_LANE(l) {
        scale[l] = d * scale_code[l];
        min[l] = -dmin * min_code[l];
    }
    phi_nearest(&search->lanes[g], scale, min, type->q_min, type->q_max, best->q, &best->sums);
    PHI_EACH_LANE(l) {
        const int is_better = best->sums.err[l] < least[l];
        least[l] = is_better ? best->sums.err[l] : least[l];
        best->scale[l] = is_better ? scale_code[l] : best->scale[l];
        best->min[l] = is_better ? min_code[l] : best->min[l];
    }
}

/* Finds each sub-block's best codes: the scale code next to its own scale, with the min code that is best for its
 * quants; then the scale code that is best for that min. */
static void choose_codes(const k_search *search, int g, float d, float dmin, group *best) {
    static const float steps[] = {0.0f, -1.0f, 1.0f};
    const k_type *type = search->type;
    const phi_lanes *lanes = &search->lanes[g];
    const float per_d = phi_inverse(d), per_dmin = phi_inverse(dmin);
    float scale[PHI_LANES], scale_code[PHI_LANES], min_code[PHI_LANES] = {0}, least[PHI_LANES];
    phi_lane_sums *sums = &best->sums;
    PHI_EACH_LANE(l) least[l] = INFINITY;
    for (int k = 0; k < 3; k++) {
        PHI_EACH_LANE(l) {
            const float code = phi_round(phi_clamp(search->scale[g][l] * per_d, type->code_min, type->code_max));
            scale_code[l] = phi_clamp(code + steps[k], type->code_min, type->code_max);
            scale[l] = d * scale_code[l];
        }
        if (is_affine(type)) {
            phi_nearest(lanes, scale, search->min[g], type->q_min, type->q_max, best->q, sums);
            PHI_EACH_LANE(l) {
                const float min = lanes->mean[l] - scale[l] * sums->q[l] / lanes->sum_w[l];
                min_code[l] = phi_round(phi_clamp(-min * per_dmin, 0.0f, type->code_max));
            }
        }
        try_codes(search, g, d, dmin, scale_code, min_code, least, best);
    }
    if (is_affine(type)) {
        try_codes(search, g, d, dmin, best->scale, best->min, least, best); /* for its sums */
        PHI_EACH_LANE(l) {
            const float above = lanes->mean[l] + dmin * best->min[l];
            const float whole = sums->qx[l] + above * sums->q[l]; /* w q (x - min) */
            const float code = sums->qq[l] > 0.0f ? whole / sums->qq[l] * per_d : 0.0f;
            scale_code[l] = phi_round(phi_clamp(code, type->code_min, type->code_max));
        }
        try_codes(search, g, d, dmin, scale_code, best->min, least, best);
    }
    try_codes(search, g, d, dmin, best->scale, best->min, least, best); /* the quants that go with the best */
}

/* The super-block's scale and min that suit codes and quants best: the least sum of w (x - d A + dmin B)^2, where A is
 * code times quant and B the min's code. */
static void solve(const phi_lanes *lanes, const k_type *type, const super_block *block, float *d, float *dmin) {
    double aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    for (int g = 0; g < n_groups(type); g++) {
        const group *codes = &block->groups[g];
        for (int l = 0; l < PHI_LANES; l++) {
            const double a = codes->scale[l], b = codes->min[l];
            const double sum_w = lanes[g].sum_w[l], mean = lanes[g].mean[l], q = codes->sums.q[l];
            aa += a * a * codes->sums.qq[l];
            ab += a * b * q;
            bb += b * b * sum_w;
            ax += a * (codes->sums.qx[l] + mean * q);
            bx += b * sum_w * mean;
        }
    }
    const double determinant = aa * bb - ab * ab;
    if (bb > 0 && determinant > 1e-9 * aa * bb) {
        *d = (float)((ax * bb - ab * bx) / determinant);
        *dmin = (float)((ab * ax - aa * bx) / determinant);
    } else if (aa > 0) {
        *d = (float)(ax / aa);
    }
}

/* The d whose multiples by codes come nearest to the sub-blocks' own scales (or mins), of those that give the extreme
 * one about the extreme code. What a scale is off counts by its curvature: how fast the error grows with its square. */
static float first_scale(const k_type *type, float (*scale)[PHI_LANES], float (*curvature)[PHI_LANES]) {
    const float end = type->code_min < 0.0f ? type->code_min : type->code_max;
    float extreme = 0.0f, best = 0.0f, most = 0.0f;
    for (int g = 0; g < n_groups(type); g++) {
        for (int l = 0; l < PHI_LANES; l++) extreme = fabsf(scale[g][l]) > fabsf(extreme) ? scale[g][l] : extreme;
    }
    const float per_extreme = phi_inverse(extreme);
    for (int k = 0; k <= 2 * N_STEPS; k++) {
        const float step = k % 2 ? STEP * (float)((k + 1) / 2) : STEP * (float)(-k / 2); /* 0, 1, -1, 2, -2, ... */
        const float per_d = (end + step) * per_extreme;
        float cc[PHI_LANES] = {0}, cs[PHI_LANES] = {0}, sum_cc = 0.0f, sum_cs = 0.0f;
        for (int g = 0; g < n_groups(type); g++) {
            PHI_EACH_LANE(l) {
                const float code = phi_round(phi_clamp(scale[g][l] * per_d, type->code_min, type->code_max));
                cc[l] += curvature[g][l] * code * code;
                cs[l] += curvature[g][l] * code * scale[g][l];
            }
        }
        for (int l = 0; l < PHI_LANES; l++) {
            sum_cc += cc[l];
            sum_cs += cs[l];
        }
        const float d = sum_cc > 0.0f ? sum_cs / sum_cc : 0.0f, gain = d * sum_cs;
        if (gain > most * (1.0f + PHI_ROUNDING)) {
            best = d;
            most = gain;
        }
    }
    return best;
}

/* Chooses codes and quants for a scale and a min, and keeps them if they err less than the best so far. */
static void try_scale(const k_search *search, float d, float dmin, super_block *best) {
    const k_type *type = search->type;
    const float unit = search->lanes[0].unit[0];
    super_block tried = {.d = phi_scale_half(d, unit), .dmin = phi_scale_half(dmin, unit), .err = 0.0f};
    d = phi_half_in_units(tried.d, unit);
    dmin = phi_half_in_units(tried.dmin, unit);
    for (int g = 0; g < n_groups(type); g++) {
        choose_codes(search, g, d, dmin, &tried.groups[g]);
        for (int l = 0; l < PHI_LANES; l++) tried.err += tried.groups[g].sums.err[l];
    }
    if (tried.err < best->err) *best = tried;
}

/* Fits each sub-block alone; returns the error that is left: no super-block has less. */
static float fit_sub_blocks(k_search *search) {
    const k_type *type = search->type;
    float q[PHI_LANE_ELEMENTS][PHI_LANES], err = 0.0f;
    for (int g = 0; g < n_groups(type); g++) {
        phi_lane_sums sums;
        if (is_affine(type)) {
            phi_fit_affine(&search->lanes[g], type->q_max, 1, search->scale[g], search->min[g]);
        } else {
            phi_fit_symmetric(&search->lanes[g], type->q_min, type->q_max, search->scale[g]);
            PHI_EACH_LANE(l) search->min[g][l] = 0.0f;
        }
        phi_nearest(&search->lanes[g], search->scale[g], search->min[g], type->q_min, type->q_max, q, &sums);
        for (int l = 0; l < PHI_LANES; l++) {
            err += sums.err[l];
            search->scale_curvature[g][l] = sums.qq[l];
            search->min_curvature[g][l] = search->lanes[g].sum_w[l];
        }
    }
    return err;
}

static void quantize_super_block(const k_type *type, const float *x, const float *importance, super_block *best) {
    k_search search;
    search.type = type;
    load(search.lanes, type, x, importance);
    const float least = fit_sub_blocks(&search);
    const float first_d = first_scale(type, search.scale, search.scale_curvature);
    const float first_dmin = -first_scale(type, search.min, search.min_curvature);
    float d = first_d, dmin = first_dmin;
    *best = (super_block){.err = INFINITY};
    for (int round = 0; round < ROUNDS; round++) {
        try_scale(&search, d, dmin, best);
        solve(search.lanes, type, best, &d, &dmin);
    }
    const float end = is_affine(type) ? type->code_max : type->code_min;
    for (int k = 1; k <= MORE_TRIES && best->err > NEAR_ENOUGH * least; k++) {
        const float stretch = end / (end - (end < 0.0f ? -(float)k : (float)k));
        try_scale(&search, first_d * stretch, first_dmin * stretch, best);
    }
}

static int quant(const k_type *type, const super_block *block, int i) {
    const int lane = i / type->n;
    return (int)block->groups[lane / PHI_LANES].q[i % type->n][lane % PHI_LANES];
}

static int scale_code(const super_block *block, int lane) {
    return (int)block->groups[lane / PHI_LANES].scale[lane % PHI_LANES];
}

static int min_code(const super_block *block, int lane) {
    return (int)block->groups[lane / PHI_LANES].min[lane % PHI_LANES];
}

static void store_q2_k(const super_block *s, void *out) {
    phi_block_q2_k b = {.d = s->d, .dmin = s->dmin};
    for (int g = 0; g < 16; g++) b.scales[g] = (uint8_t)(scale_code(s, g) | min_code(s, g) << 4);
    for (int i = 0; i < SUPER_BLOCK; i++) {
        b.qs[i / 128 * 32 + i % 32] |= (uint8_t)(quant(&q2_k, s, i) << (i % 128 / 32 * 2));
    }
    memcpy(out, &b, sizeof b);
}

static void store_q3_k(const super_block *s, void *out) {
    phi_block_q3_k b = {.d = s->d};
    for (int g = 0; g < 16; g++) {
        const int code = scale_code(s, g) + 32;
        b.scales[g % 8] |= (uint8_t)((code & 15) << (g / 8 * 4));
        b.scales[8 + g % 4] |= (uint8_t)(code >> 4 << (g / 4 * 2));
    }
    for (int i = 0; i < SUPER_BLOCK; i++) {
        const int q = quant(&q3_k, s, i) + 4;
        b.qs[i / 128 * 32 + i % 32] |= (uint8_t)((q & 3) << (i % 128 / 32 * 2));
        b.hmask[i % 32] |= (uint8_t)(q >> 2 << (i / 32));
    }
    memcpy(out, &b, sizeof b);
}

/* The eight 6-bit scales and mins of Q4_K and Q5_K in 12 bytes: see phi_unpack_scales_k4. */
static void store_codes_k4(const super_block *s, uint8_t *scales) {
    for (int j = 0; j < 4; j++) {
        scales[j] = (uint8_t)(scale_code(s, j) | scale_code(s, j + 4) >> 4 << 6);
        scales[j + 4] = (uint8_t)(min_code(s, j) | min_code(s, j + 4) >> 4 << 6);
        scales[j + 8] = (uint8_t)((scale_code(s, j + 4) & 15) | (min_code(s, j + 4) & 15) << 4);
    }
}

static void store_q4_k(const super_block *s, void *out) {
    phi_block_q4_k b = {.d = s->d, .dmin = s->dmin};
    store_codes_k4(s, b.scales);
    for (int i = 0; i < SUPER_BLOCK; i++) {
        b.qs[i / 64 * 32 + i % 32] |= (uint8_t)(quant(&q4_k, s, i) << (i / 32 % 2 * 4));
    }
    memcpy(out, &b, sizeof b);
}

static void store_q5_k(const super_block *s, void *out) {
    phi_block_q5_k b = {.d = s->d, .dmin = s->dmin};
    store_codes_k4(s, b.scales);
    for (int i = 0; i < SUPER_BLOCK; i++) {
        const int q = quant(&q5_k, s, i);
        b.qs[i / 64 * 32 + i % 32] |= (uint8_t)((q & 15) << (i / 32 % 2 * 4));
        b.qh[i % 32] |= (uint8_t)(q >> 4 << (i / 32));
    }
    memcpy(out, &b, sizeof b);
}

static void store_q6_k(const super_block *s, void *out) {
    phi_block_q6_k b = {.d = s->d};
    for (int g = 0; g < 16; g++) b.scales[g] = (int8_t)scale_code(s, g);
    for (int i = 0; i < SUPER_BLOCK; i++) {
        const int q = quant(&q6_k, s, i) + 32;
        b.ql[i / 128 * 64 + i % 64] |= (uint8_t)((q & 15) << (i % 128 / 64 * 4));
        b.qh[i / 128 * 32 + i % 32] |= (uint8_t)(q >> 4 << (i % 128 / 32 * 2));
    }
    memcpy(out, &b, sizeof b);
}

#define K_ROW(type)                                                                                   \
    void phi_quantize_row_##type(const float *x, const float *importance, size_t n_cols, void *out) { \
        for (size_t i = 0; i < n_cols; i += SUPER_BLOCK) {                                            \
            super_block best;                                                                         \
            quantize_super_block(&type, x + i, importance ? importance + i : NULL, &best);            \
            store_##type(&best, (uint8_t *)out + i / SUPER_BLOCK * sizeof(phi_block_##type));         \
        }                                                                                             \
    }

K_ROW(q2_k)
K_ROW(q3_k)
K_ROW(q4_k)
K_ROW(q5_k)
K_ROW(q6_k)
