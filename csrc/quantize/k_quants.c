/* Q2_K to Q6_K: super-blocks of 256 with one scale, and one min, in half precision, and a small integer for each
 * sub-block that says how much of it is meant: the code.
 *
 * First each sub-block gets the scale and min that suit it best; the largest fix the super-block's. Then, in rounds:
 * every sub-block takes the codes, of those around its own scale, whose quants are nearest; codes and quants fixed, the
 * super-block's scale and min are solved for (weighted least squares). The best round is kept. */
#include "quantize.h"

#include <string.h>

#include "blocks.h"
#include "lanes.h"

enum { SUPER_BLOCK = 256, MAX_SUB_BLOCKS = 16, MAX_GROUPS = 2, ROUNDS = 3 };

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

static int n_groups(const k_type *type) { return SUPER_BLOCK / PHI_LANES / type->n; }

static void load(phi_lanes *lanes, const k_type *type, const float *x, const float *importance) {
    const float unit = phi_unit_of(x, SUPER_BLOCK);
    const float largest = phi_largest_importance(importance, SUPER_BLOCK);
    float units[PHI_LANES];
    PHI_EACH_LANE(l) units[l] = unit;
    for (int g = 0; g < n_groups(type); g++) {
        const int at = g * PHI_LANES * type->n;
        phi_load_lanes(&lanes[g], type->n, PHI_LANES, x + at, units, importance ? importance + at : NULL, largest);
    }
}

/* Takes for each sub-block the scale code next to its own scale, and that one's best min code, which err least. */
static void choose_codes(const phi_lanes *lanes, const k_type *type, const float *own_scale, const float *own_min,
                         float d, float dmin, group *best) {
    static const float steps[] = {0.0f, -1.0f, 1.0f};
    const float per_d = phi_inverse(d), per_dmin = phi_inverse(dmin);
    float scale[PHI_LANES], min[PHI_LANES], scale_code[PHI_LANES], min_code[PHI_LANES], least[PHI_LANES];
    phi_lane_sums *sums = &best->sums;
    PHI_EACH_LANE(l) least[l] = INFINITY;
    for (int k = 0; k < 3; k++) {
        PHI_EACH_LANE(l) {
            const float code = phi_round(phi_clamp(own_scale[l] * per_d, type->code_min, type->code_max)) + steps[k];
            scale_code[l] = phi_clamp(code, type->code_min, type->code_max);
            scale[l] = d * scale_code[l];
            min_code[l] = min[l] = 0.0f;
        }
        if (own_min) {
            phi_nearest(lanes, scale, own_min, type->q_min, type->q_max, best->q, sums);
            PHI_EACH_LANE(l) {
                const float best_min = lanes->mean[l] - scale[l] * sums->q[l] / lanes->sum_w[l];
                min_code[l] = phi_round(phi_clamp(-best_min * per_dmin, 0.0f, type->code_max));
                min[l] = -dmin * min_code[l];
            }
        }
        phi_nearest(lanes, scale, min, type->q_min, type->q_max, best->q, sums);
        PHI_EACH_LANE(l) {
            const int is_better = sums->err[l] < least[l];
            least[l] = is_better ? sums->err[l] : least[l];
            best->scale[l] = is_better ? scale_code[l] : best->scale[l];
            best->min[l] = is_better ? min_code[l] : best->min[l];
        }
    }
    PHI_EACH_LANE(l) {
        scale[l] = d * best->scale[l];
        min[l] = -dmin * best->min[l];
    }
    phi_nearest(lanes, scale, min, type->q_min, type->q_max, best->q, sums);
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

/* The d for which the extreme of the sub-blocks' own scales has the extreme code. */
static float first_scale(const k_type *type, float (*scale)[PHI_LANES]) {
    float extreme = 0.0f;
    for (int g = 0; g < n_groups(type); g++) {
        for (int l = 0; l < PHI_LANES; l++) extreme = fabsf(scale[g][l]) > fabsf(extreme) ? scale[g][l] : extreme;
    }
    return extreme / (type->code_min < 0.0f ? type->code_min : type->code_max);
}

static void quantize_super_block(const k_type *type, const float *x, const float *importance, super_block *best) {
    const int is_affine = type->q_min == 0.0f;
    phi_lanes lanes[MAX_GROUPS];
    float scale[MAX_GROUPS][PHI_LANES], min[MAX_GROUPS][PHI_LANES] = {{0}};
    load(lanes, type, x, importance);
    for (int g = 0; g < n_groups(type); g++) {
        if (is_affine) {
            phi_fit_affine(&lanes[g], type->q_max, 1, scale[g], min[g]);
        } else {
            phi_fit_symmetric(&lanes[g], type->q_min, type->q_max, scale[g]);
        }
    }
    const float unit = lanes[0].unit[0];
    float d = first_scale(type, scale), dmin = -first_scale(type, min);
    for (int round = 0; round < ROUNDS; round++) {
        super_block tried = {.d = phi_half_of(d, unit), .dmin = phi_half_of(dmin, unit), .err = 0.0f};
        d = phi_half_in_units(tried.d, unit);
        dmin = phi_half_in_units(tried.dmin, unit);
        for (int g = 0; g < n_groups(type); g++) {
            choose_codes(&lanes[g], type, scale[g], is_affine ? min[g] : NULL, d, dmin, &tried.groups[g]);
            for (int l = 0; l < PHI_LANES; l++) tried.err += tried.groups[g].sums.err[l];
        }
        if (tried.err < best->err) *best = tried;
        solve(lanes, type, &tried, &d, &dmin);
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
            super_block best = {.err = INFINITY};                                                     \
            quantize_super_block(&type, x + i, importance ? importance + i : NULL, &best);            \
            store_##type(&best, (uint8_t *)out + i / SUPER_BLOCK * sizeof(phi_block_##type));         \
        }                                                                                             \
    }

K_ROW(q2_k)
K_ROW(q3_k)
K_ROW(q4_k)
K_ROW(q5_k)
K_ROW(q6_k)
