/* Loading lanes, and the searches for a lane's best scale and min.
 *
 * A candidate scale gives quants by rounding; for these quants the best scale and min have a closed form (weighted
 * least squares), and what they gain over a constant tells which candidate is best. Candidates stretch the span of the
 * weights by steps, so that rounding falls out differently and outliers may be clipped. The best is then rounded and
 * solved again, as in Lloyd's algorithm, while that gains. */
#include "lanes.h"

#include <float.h>
#include <string.h>

enum { REFINEMENTS = 2 };

/* Quants that the span of a lane is stretched over, beside q_max. */
static const float stretches[] = {0.0f,  -0.9f, -0.7f, -0.5f, -0.35f, -0.2f, -0.1f, 0.1f, 0.2f,
                                  0.35f, 0.5f,  0.7f,  0.9f,  1.2f,   1.7f,  2.5f,  4.0f};
enum { N_STRETCHES = sizeof stretches / sizeof *stretches };

float phi_unit_of(const float *x, size_t n) {
    float largest = 0.0f;
    for (size_t i = 0; i < n; i++) {
        const float magnitude = fabsf(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < 0x1p-40f) return 0.0f; /* 127 of the least half, 2^-24, are above it by far */
    int exponent;
    (void)frexpf(largest, &exponent);
    return ldexpf(1.0f, exponent > 126 ? 126 : exponent);
}

float phi_largest_importance(const float *importance, size_t n) {
    float largest = 0.0f;
    for (size_t i = 0; i < n && importance; i++) largest = importance[i] > largest ? importance[i] : largest;
    return largest;
}

/* Importances over the largest; what is unimportant keeps enough weight to be stored sanely. */
static void load_importance(phi_lanes *lanes, int n_lanes, const float *importance, const float *largest) {
    const int n = lanes->n;
    for (int l = 0; l < PHI_LANES; l++) {
        const int has_importance = importance && l < n_lanes && largest[l] > 1e-30f;
        for (int i = 0; i < n; i++) {
            const float w = has_importance ? importance[l * n + i] / largest[l] : 1.0f;
            lanes->w[i][l] = w < 1e-6f ? 1e-6f : w;
        }
    }
}

void phi_load_lanes(phi_lanes *lanes, int n, int n_lanes, const float *x, const float *unit, const float *importance,
                    const float *largest_importance) {
    lanes->n = n;
    PHI_EACH_LANE(l) {
        const float u = l < n_lanes ? unit[l] : 0.0f;
        lanes->unit[l] = u == 0.0f ? 1.0f : u;
        const float inverse = u == 0.0f ? 0.0f : 1.0f / u;
        for (int i = 0; i < n; i++) lanes->x[i][l] = l < n_lanes ? x[l * n + i] * inverse : 0.0f;
    }
    load_importance(lanes, n_lanes, importance, largest_importance);
    float sum_w[PHI_LANES] = {0}, sum_wx[PHI_LANES] = {0};
    for (int i = 0; i < n; i++) {
        PHI_EACH_LANE(l) {
            sum_w[l] += lanes->w[i][l];
            sum_wx[l] += lanes->w[i][l] * lanes->x[i][l];
        }
    }
    PHI_EACH_LANE(l) {
        lanes->sum_w[l] = sum_w[l];
        lanes->mean[l] = sum_wx[l] / sum_w[l];
    }
    for (int i = 0; i < n; i++) {
        PHI_EACH_LANE(l) lanes->centred[i][l] = lanes->x[i][l] - lanes->mean[l];
    }
}

/* The sums, but for errors, of the quants that (x - low) * inverse rounds to. */
static void candidate_sums(const phi_lanes *lanes, const float *low, const float *inverse, float q_min, float q_max,
                           phi_lane_sums *sums) {
    float sum_q[PHI_LANES] = {0}, sum_qq[PHI_LANES] = {0}, sum_qx[PHI_LANES] = {0};
    for (int i = 0; i < lanes->n; i++) {
        PHI_EACH_LANE(l) {
            const float q = phi_round(phi_clamp((lanes->x[i][l] - low[l]) * inverse[l], q_min, q_max));
            const float wq = lanes->w[i][l] * q;
            sum_q[l] += wq;
            sum_qq[l] += wq * q;
            sum_qx[l] += wq * lanes->centred[i][l];
        }
    }
    memcpy(sums->q, sum_q, sizeof sum_q);
    memcpy(sums->qq, sum_qq, sizeof sum_qq);
    memcpy(sums->qx, sum_qx, sizeof sum_qx);
}

void phi_nearest(const phi_lanes *lanes, const float *scale, const float *min, float q_min, float q_max,
                 float (*q)[PHI_LANES], phi_lane_sums *sums) {
    float sum_q[PHI_LANES] = {0}, sum_qq[PHI_LANES] = {0}, sum_qx[PHI_LANES] = {0}, sum_err[PHI_LANES] = {0};
    float inverse[PHI_LANES], low[PHI_LANES];
    PHI_EACH_LANE(l) {
        inverse[l] = phi_inverse(scale[l]);
        low[l] = min ? min[l] : 0.0f;
    }
    for (int i = 0; i < lanes->n; i++) {
        PHI_EACH_LANE(l) {
            const float x = lanes->x[i][l] - low[l];
            const float quant = phi_round(phi_clamp(x * inverse[l], q_min, q_max));
            const float wq = lanes->w[i][l] * quant, off = x - scale[l] * quant;
            sum_q[l] += wq;
            sum_qq[l] += wq * quant;
            sum_qx[l] += wq * lanes->centred[i][l];
            sum_err[l] += lanes->w[i][l] * off * off;
            q[i][l] = quant;
        }
    }
    memcpy(sums->q, sum_q, sizeof sum_q);
    memcpy(sums->qq, sum_qq, sizeof sum_qq);
    memcpy(sums->qx, sum_qx, sizeof sum_qx);
    memcpy(sums->err, sum_err, sizeof sum_err);
}

/* The best scale and min of a lane for the quants summed, where they beat the gain so far: what they take from
 * sum w (x - mean)^2. */
static void keep_better_affine(const phi_lanes *lanes, const phi_lane_sums *sums, int min_at_most_zero, float *scale,
                               float *min, float *gain) {
    PHI_EACH_LANE(l) {
        const float mean = lanes->mean[l], sum_w = lanes->sum_w[l];
        const float spread = sums->qq[l] - sums->q[l] * sums->q[l] / sum_w;
        float s = spread > 1e-5f * sums->qq[l] ? sums->qx[l] / spread : 0.0f; /* else one quant, and noise */
        s = s > 0.0f ? s : 0.0f;
        float m = mean - s * sums->q[l] / sum_w;
        float g = s * sums->qx[l], noise = fabsf(gain[l]);
        if (min_at_most_zero && m > 0.0f) {
            const float whole = sums->qx[l] + mean * sums->q[l]; /* w q x */
            m = 0.0f;
            s = sums->qq[l] > 0.0f ? whole / sums->qq[l] : 0.0f;
            s = s > 0.0f ? s : 0.0f;
            g = s * whole - sum_w * mean * mean;
            noise += 8.0f * sum_w * mean * mean; /* both terms are sums of up to 32 */
        }
        const int is_better = g > gain[l] + PHI_ROUNDING * noise;
        scale[l] = is_better ? s : scale[l];
        min[l] = is_better ? m : min[l];
        gain[l] = is_better ? g : gain[l];
    }
}

void phi_fit_affine(const phi_lanes *lanes, float q_max, int min_at_most_zero, float *scale, float *min) {
    float low[PHI_LANES], high[PHI_LANES], inverse[PHI_LANES], gain[PHI_LANES];
    phi_lane_sums sums;
    PHI_EACH_LANE(l) {
        low[l] = high[l] = lanes->x[0][l];
        gain[l] = -FLT_MAX;
        scale[l] = min[l] = 0.0f;
    }
    for (int i = 1; i < lanes->n; i++) {
        PHI_EACH_LANE(l) {
            low[l] = lanes->x[i][l] < low[l] ? lanes->x[i][l] : low[l];
            high[l] = lanes->x[i][l] > high[l] ? lanes->x[i][l] : high[l];
        }
    }
    if (min_at_most_zero) {
        PHI_EACH_LANE(l) low[l] = low[l] < 0.0f ? low[l] : 0.0f;
    }
    for (int k = 0; k < N_STRETCHES; k++) {
        PHI_EACH_LANE(l) inverse[l] = (q_max + stretches[k]) * phi_inverse(high[l] - low[l]);
        candidate_sums(lanes, low, inverse, 0.0f, q_max, &sums);
        keep_better_affine(lanes, &sums, min_at_most_zero, scale, min, gain);
    }
    for (int k = 0; k < REFINEMENTS; k++) {
        PHI_EACH_LANE(l) inverse[l] = phi_inverse(scale[l]);
        candidate_sums(lanes, min, inverse, 0.0f, q_max, &sums);
        keep_better_affine(lanes, &sums, min_at_most_zero, scale, min, gain);
    }
}

static void keep_better_symmetric(const phi_lanes *lanes, const phi_lane_sums *sums, float *scale, float *gain) {
    PHI_EACH_LANE(l) {
        const float whole = sums->qx[l] + lanes->mean[l] * sums->q[l]; /* w q x */
        const float s = sums->qq[l] > 0.0f ? whole / sums->qq[l] : 0.0f;
        const float g = s * whole; /* of sum w x^2 */
        const int is_better = g > gain[l] * (1.0f + PHI_ROUNDING);
        scale[l] = is_better ? s : scale[l];
        gain[l] = is_better ? g : gain[l];
    }
}

void phi_fit_symmetric(const phi_lanes *lanes, float q_min, float q_max, float *scale) {
    static const float zero[PHI_LANES] = {0};
    float largest[PHI_LANES] = {0}, inverse[PHI_LANES], gain[PHI_LANES] = {0};
    phi_lane_sums sums;
    PHI_EACH_LANE(l) scale[l] = 0.0f;
    for (int i = 0; i < lanes->n; i++) {
        PHI_EACH_LANE(l) { largest[l] = fabsf(lanes->x[i][l]) > fabsf(largest[l]) ? lanes->x[i][l] : largest[l]; }
    }
    PHI_EACH_LANE(l) largest[l] = phi_inverse(largest[l]);
    /* The largest magnitude goes to q_min, which reaches one further than q_max; then to the other end. */
    for (int side = 0; side < 2; side++) {
        const float end = side == 0 ? q_min : q_max;
        for (int k = 0; k < N_STRETCHES; k++) {
            const float stretch = end < 0.0f ? -stretches[k] : stretches[k];
            PHI_EACH_LANE(l) inverse[l] = (end + stretch) * largest[l];
            candidate_sums(lanes, zero, inverse, q_min, q_max, &sums);
            keep_better_symmetric(lanes, &sums, scale, gain);
        }
    }
    for (int k = 0; k < REFINEMENTS; k++) {
        PHI_EACH_LANE(l) inverse[l] = phi_inverse(scale[l]);
        candidate_sums(lanes, zero, inverse, q_min, q_max, &sums);
        keep_better_symmetric(lanes, &sums, scale, gain);
    }
}
