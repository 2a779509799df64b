/* Q2_K to Q6_K: super-blocks of 256 weights with one scale, and possibly one min, in half precision. Each sub-block has
 * integer codes that multiply them.
 *
 * Each sub-block first gets the scale and min that fit it best. The initial super-block scale and min are those whose
 * multiples by codes are nearest to these. Then follow rounds of two steps: every sub-block takes the codes, near its
 * own scale, whose quants have the smallest error; with codes and quants fixed, the super-block's scale and min are
 * solved by weighted least squares. The best round is used. If its error is much larger than that of the sub-blocks
 * alone, a few more initial scales are tried. */
#include "quantize.h"

#include <string.h>

#include "blocks.h"
#include "lanes.h"

enum { SUPER_BLOCK = 256, MAX_GROUPS = 2, ROUNDS = 3, EXTRA_TRIES = 6, N_STEPS = 9 };
#define STEP 0.1f            /* between candidates for the code of the extreme scale */
#define MAX_ERROR_RATIO 1.1f /* to the error of the sub-blocks alone; above it, more scales are tried */

/* Parameters of a tensor type. */
typedef struct {
    int n;                    /* elements per sub-block */
    float q_min, q_max;       /* range of the quants */
    float code_min, code_max; /* range of the scale codes; min codes: 0 to code_max */
} k_type;

static const k_type q2_k = {16, 0, 3, 0, 15}, q3_k = {16, -4, 3, -32, 31}, q4_k = {32, 0, 15, 0, 63},
                    q5_k = {32, 0, 31, 0, 63}, q6_k = {16, -32, 31, -128, 127};

/* Codes and quants of eight sub-blocks. */
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

/* The weights of a super-block, and the best scale and min of each sub-block alone, in float. Curvature: growth of the
 * error per squared deviation of the scale or min. */
typedef struct {
    const k_type *type;
    phi_lanes lanes[MAX_GROUPS];
    float scale[MAX_GROUPS][PHI_LANES], min[MAX_GROUPS][PHI_LANES];
    float scale_curvature[MAX_GROUPS][PHI_LANES], min_curvature[MAX_GROUPS][PHI_LANES];
} search_state;

static int n_groups(const k_type *type) { return SUPER_BLOCK / PHI_LANES / type->n; }

static int is_affine(const k_type *type) { return type->q_min == 0.0f; }

static void load(phi_lanes *lanes, const k_type *type, const float *x, const float *importance) {
    const float normaliser = phi_normaliser(x, SUPER_BLOCK);
    const float largest = phi_largest_importance(importance, SUPER_BLOCK);
    float normalisers[PHI_LANES], largest_per_lane[PHI_LANES];
    PHI_FOR_EACH_LANE(l) {
        normalisers[l] = normaliser;
        largest_per_lane[l] = largest;
    }
    for (int g = 0; g < n_groups(type); g++) {
        const int first = g * PHI_LANES * type->n;
        phi_load_lanes(&lanes[g], type->n, PHI_LANES, x + first, normalisers, importance ? importance + first : NULL,
                       largest_per_lane);
    }
}

/* Finds the nearest quants for the codes, and updates the codes of each sub-block whose error is below best_err. The
 * quants and sums of `best` are always those of the codes tried last. */
static void try_codes(const search_state *search, int g, float d, float dmin, const float *scale_code,
                      const float *min_code, float *best_err, group *best) {
    const k_type *type = search->type;
    float scale[PHI_LANES], min[PHI_LANES];
    PHI_FOR_EACH_LANE(l) {
        scale[l] = d * scale_code[l];
        min[l] = -dmin * min_code[l];
    }
    phi_nearest_quants(&search->lanes[g], scale, min, type->q_min, type->q_max, best->q, &best->sums);
    PHI_FOR_EACH_LANE(l) {
        const int is_better = best->sums.err[l] < best_err[l];
        best_err[l] = is_better ? best->sums.err[l] : best_err[l];
        best->scale[l] = is_better ? scale_code[l] : best->scale[l];
        best->min[l] = is_better ? min_code[l] : best->min[l];
    }
}

/* Finds the best codes of each sub-block for the super-block scale d and min dmin. Tries the scale codes next to the
 * sub-block's own scale, each with the best min code for its quants; then the best scale code for that min code. */
static void choose_codes(const search_state *search, int g, float d, float dmin, group *best) {
    static const float steps[] = {0.0f, -1.0f, 1.0f};
    const k_type *type = search->type;
    const phi_lanes *lanes = &search->lanes[g];
    const float inverse_d = phi_inverse(d), inverse_dmin = phi_inverse(dmin);
    float scale[PHI_LANES], scale_code[PHI_LANES], min_code[PHI_LANES] = {0}, best_err[PHI_LANES];
    phi_lane_sums *sums = &best->sums;
    PHI_FOR_EACH_LANE(l) best_err[l] = INFINITY;
    for (int k = 0; k < 3; k++) {
        PHI_FOR_EACH_LANE(l) {
            const float code = phi_round(phi_clamp(search->scale[g][l] * inverse_d, type->code_min, type->code_max));
            scale_code[l] = phi_clamp(code + steps[k], type->code_min, type->code_max);
            scale[l] = d * scale_code[l];
        }
        if (is_affine(type)) {
            phi_nearest_quants(lanes, scale, search->min[g], type->q_min, type->q_max, best->q, sums);
            PHI_FOR_EACH_LANE(l) {
                const float min = lanes->mean[l] - scale[l] * sums->wq[l] / lanes->sum_w[l];
                min_code[l] = phi_round(phi_clamp(-min * inverse_dmin, 0.0f, type->code_max));
            }
        }
        try_codes(search, g, d, dmin, scale_code, min_code, best_err, best);
    }
    if (is_affine(type)) {
        try_codes(search, g, d, dmin, best->scale, best->min, best_err, best); /* for the sums of the best codes */
        PHI_FOR_EACH_LANE(l) {
            const float shifted_mean = lanes->mean[l] + dmin * best->min[l];
            const float wqx = sums->wqx[l] + shifted_mean * sums->wq[l]; /* w q (x - min) */
            const float code = sums->wqq[l] > 0.0f ? wqx / sums->wqq[l] * inverse_d : 0.0f;
            scale_code[l] = phi_round(phi_clamp(code, type->code_min, type->code_max));
        }
        try_codes(search, g, d, dmin, scale_code, best->min, best_err, best);
    }
    try_codes(search, g, d, dmin, best->scale, best->min, best_err, best); /* for the quants of the best codes */
}

/* Sets d and dmin to the super-block scale and min that minimise sum w (x - d A + dmin B)^2 for the codes and quants of
 * `block`: A is scale code times quant, B the min code. */
static void solve_scale_and_min(const phi_lanes *lanes, const k_type *type, const super_block *block, float *d,
                                float *dmin) {
    double aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    for (int g = 0; g < n_groups(type); g++) {
        const group *codes = &block->groups[g];
        for (int l = 0; l < PHI_LANES; l++) {
            const double a = codes->scale[l], b = codes->min[l];
            const double sum_w = lanes[g].sum_w[l], mean = lanes[g].mean[l], q = codes->sums.wq[l];
            aa += a * a * codes->sums.wqq[l];
            ab += a * b * q;
            bb += b * b * sum_w;
            ax += a * (codes->sums.wqx[l] + mean * q);
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

/* The d whose multiples by codes are nearest to the sub-blocks' own scales (or mins), with deviations weighted by their
 * curvature. The candidates map the extreme scale to values about the extreme code. */
static float initial_scale(const k_type *type, float (*scale)[PHI_LANES], float (*curvature)[PHI_LANES]) {
    const float end = type->code_min < 0.0f ? type->code_min : type->code_max;
    float extreme = 0.0f, best = 0.0f, best_gain = 0.0f;
    for (int g = 0; g < n_groups(type); g++) {
        for (int l = 0; l < PHI_LANES; l++) extreme = fabsf(scale[g][l]) > fabsf(extreme) ? scale[g][l] : extreme;
    }
    const float inverse_extreme = phi_inverse(extreme);
    for (int k = 0; k <= 2 * N_STEPS; k++) {
        const float step = k % 2 ? STEP * (float)((k + 1) / 2) : STEP * (float)(-k / 2); /* 0, 1, -1, 2, -2, ... */
        const float inverse_d = (end + step) * inverse_extreme;
        float cc[PHI_LANES] = {0}, cs[PHI_LANES] = {0}, sum_cc = 0.0f, sum_cs = 0.0f;
        for (int g = 0; g < n_groups(type); g++) {
            PHI_FOR_EACH_LANE(l) {
                const float code = phi_round(phi_clamp(scale[g][l] * inverse_d, type->code_min, type->code_max));
                cc[l] += curvature[g][l] * code * code;
                cs[l] += curvature[g][l] * code * scale[g][l];
            }
        }
        for (int l = 0; l < PHI_LANES; l++) {
            sum_cc += cc[l];
            sum_cs += cs[l];
        }
        const float d = sum_cc > 0.0f ? sum_cs / sum_cc : 0.0f, gain = d * sum_cs;
        if (gain > best_gain * (1.0f + PHI_MIN_GAIN)) {
            best = d;
            best_gain = gain;
        }
    }
    return best;
}

/* Rounds d and dmin to half precision, chooses codes and quants for them, and updates best if the error is smaller. */
static void try_scale(const search_state *search, float d, float dmin, super_block *best) {
    const k_type *type = search->type;
    const float normaliser = search->lanes[0].normaliser[0];
    super_block tried = {
        .d = phi_scale_to_half(d, normaliser), .dmin = phi_scale_to_half(dmin, normaliser), .err = 0.0f};
    d = phi_half_to_value(tried.d, normaliser);
    dmin = phi_half_to_value(tried.dmin, normaliser);
    for (int g = 0; g < n_groups(type); g++) {
        choose_codes(search, g, d, dmin, &tried.groups[g]);
        for (int l = 0; l < PHI_LANES; l++) tried.err += tried.groups[g].sums.err[l];
    }
    if (tried.err < best->err) *best = tried;
}

/* Fits each sub-block alone. Returns the error, a lower bound for that of the super-block. */
static float fit_sub_blocks(search_state *search) {
    const k_type *type = search->type;
    float q[PHI_LANE_ELEMENTS][PHI_LANES], err = 0.0f;
    for (int g = 0; g < n_groups(type); g++) {
        phi_lane_sums sums;
        if (is_affine(type)) {
            phi_fit_affine(&search->lanes[g], type->q_max, 1, search->scale[g], search->min[g]);
        } else {
            phi_fit_symmetric(&search->lanes[g], type->q_min, type->q_max, search->scale[g]);
            PHI_FOR_EACH_LANE(l) search->min[g][l] = 0.0f;
        }
        phi_nearest_quants(&search->lanes[g], search->scale[g], search->min[g], type->q_min, type->q_max, q, &sums);
        for (int l = 0; l < PHI_LANES; l++) {
            err += sums.err[l];
            search->scale_curvature[g][l] = sums.wqq[l];
            search->min_curvature[g][l] = search->lanes[g].sum_w[l];
        }
    }
    return err;
}

static void quantize_super_block(const k_type *type, const float *x, const float *importance, super_block *best) {
    search_state search;
    search.type = type;
    load(search.lanes, type, x, importance);
    const float min_err = fit_sub_blocks(&search);
    const float initial_d = initial_scale(type, search.scale, search.scale_curvature);
    const float initial_dmin = -initial_scale(type, search.min, search.min_curvature);
    float d = initial_d, dmin = initial_dmin;
    *best = (super_block){.err = INFINITY};
    for (int round = 0; round < ROUNDS; round++) {
        try_scale(&search, d, dmin, best);
        solve_scale_and_min(search.lanes, type, best, &d, &dmin);
    }
    const float end = is_affine(type) ? type->code_max : type->code_min;
    for (int k = 1; k <= EXTRA_TRIES && best->err > MAX_ERROR_RATIO * min_err; k++) {
        const float stretch = end / (end - (end < 0.0f ? -(float)k : (float)k));
        try_scale(&search, initial_d * stretch, initial_dmin * stretch, best);
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

/* Stores the eight 6-bit scale and min codes of Q4_K and Q5_K in 12 bytes: the inverse of phi_unpack_scales_k4. */
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

#define DEFINE_QUANTIZE_ROW(type)                                                                     \
    void phi_quantize_row_##type(const float *x, const float *importance, size_t n_cols, void *out) { \
        for (size_t i = 0; i < n_cols; i += SUPER_BLOCK) {                                            \
            super_block best;                                                                         \
            quantize_super_block(&type, x + i, importance ? importance + i : NULL, &best);            \
            store_##type(&best, (uint8_t *)out + i / SUPER_BLOCK * sizeof(phi_block_##type));         \
        }                                                                                             \
    }

DEFINE_QUANTIZE_ROW(q2_k)
DEFINE_QUANTIZE_ROW(q3_k)
DEFINE_QUANTIZE_ROW(q4_k)
DEFINE_QUANTIZE_ROW(q5_k)
DEFINE_QUANTIZE_ROW(q6_k)
