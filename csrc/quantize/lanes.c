/* Loading of lanes, and the searches for the best scale and min of a lane.
 *
 * A candidate scale determines quants by rounding. For these quants the best scale and min have a closed form (weighted
 * least squares), whose reduction of the error ranks the candidates. Candidates stretch or shrink the range of the
 * weights in steps: rounding falls differently, and outliers may be clipped. The best candidate is refined by rounding
 * and solving again while that reduces the error, as in Lloyd's algorithm. */
#include "lanes.h"

#include <float.h>
#include <string.h>

enum { REFINEMENTS = 2 };

/* Added to q_max: a candidate maps the range of a lane onto that many quants. */
static const float range_offsets[] = {0.0f,  -0.9f, -0.7f, -0.5f, -0.35f, -0.2f, -0.1f, 0.1f, 0.2f,
                                      0.35f, 0.5f,  0.7f,  0.9f,  1.2f,   1.7f,  2.5f,  4.0f};
enum { N_RANGE_OFFSETS = sizeof range_offsets / sizeof *range_offsets };

float phi_normaliser(const float *x, size_t n) {
    float largest = 0.0f;
    for (size_t i = 0; i < n; i++) {
        const float magnitude = fabsf(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < 0x1p-40f) return 0.0f; /* far below 127 times the smallest half, 2^-24 */
    int exponent;
    (void)frexpf(largest, &exponent);
    return ldexpf(1.0f, exponent > 126 ? 126 : exponent);
}

float phi_largest_importance(const float *importance, size_t n) {
    float largest = 0.0f;
    for (size_t i = 0; i < n && importance; i++) largest = importance[i] > largest ? importance[i] : largest;
    return largest;
}

/* Importances divided by the largest. At least 1e-6, so that weights without importance are still approximated. */
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

void phi_load_lanes(phi_lanes *lanes, int n, int n_lanes, const float *x, const float *normaliser,
                    const float *importance, const float *largest_importance) {
    lanes->n = n;
    PHI_FOR_EACH_LANE(l) {
        const float divisor = l < n_lanes ? normaliser[l] : 0.0f;
        lanes->normaliser[l] = divisor == 0.0f ? 1.0f : divisor;
        const float inverse = divisor == 0.0f ? 0.0f : 1.0f / divisor;
        for (int i = 0; i < n; i++) lanes->x[i][l] = l < n_lanes ? x[l * n + i] * inverse : 0.0f;
    }
    load_importance(lanes, n_lanes, importance, largest_importance);
    float sum_w[PHI_LANES] = {0}, sum_wx[PHI_LANES] = {0};
    for (int i = 0; i < n; i++) {
        PHI_FOR_EACH_LANE(l) {
            sum_w[l] += lanes->w[i][l];
            sum_wx[l] += lanes->w[i][l] * lanes->x[i][l];
        }
    }
    PHI_FOR_EACH_LANE(l) {
        lanes->sum_w[l] = sum_w[l];
        lanes->mean[l] = sum_wx[l] / sum_w[l];
    }
    for (int i = 0; i < n; i++) {
        PHI_FOR_EACH_LANE(l) lanes->centred[i][l] = lanes->x[i][l] - lanes->mean[l];
    }
}

/* Sums, all but err, of the quants that (x - low) * inverse rounds to. */
static void candidate_sums(const phi_lanes *lanes, const float *low, const float *inverse, float q_min, float q_max,
                           phi_lane_sums *sums) {
    float sum_wq[PHI_LANES] = {0}, sum_wqq[PHI_LANES] = {0}, sum_wqx[PHI_LANES] = {0};
    for (int i = 0; i < lanes->n; i++) {
        PHI_FOR_EACH_LANE(l) {
            const float q = phi_round(phi_clamp((lanes->x[i][l] - low[l]) * inverse[l], q_min, q_max));
            const float wq = lanes->w[i][l] * q;
            sum_wq[l] += wq;
            sum_wqq[l] += wq * q;
            sum_wqx[l] += wq * lanes->centred[i][l];
        }
    }
    memcpy(sums->wq, sum_wq, sizeof sum_wq);
    memcpy(sums->wqq, sum_wqq, sizeof sum_wqq);
    memcpy(sums->wqx, sum_wqx, sizeof sum_wqx);
}

void phi_nearest_quants(const phi_lanes *lanes, const float *scale, const float *min, float q_min, float q_max,
                        float (*q)[PHI_LANES], phi_lane_sums *sums) {
    float sum_wq[PHI_LANES] = {0}, sum_wqq[PHI_LANES] = {0}, sum_wqx[PHI_LANES] = {0}, sum_err[PHI_LANES] = {0};
    float inverse[PHI_LANES], low[PHI_LANES];
    PHI_FOR_EACH_LANE(l) {
        inverse[l] = phi_inverse(scale[l]);
        low[l] = min ? min[l] : 0.0f;
    }
    for (int i = 0; i < lanes->n; i++) {
        PHI_FOR_EACH_LANE(l) {
            const float x = lanes->x[i][l] - low[l];
            const float quant = phi_round(phi_clamp(x * inverse[l], q_min, q_max));
            const float wq = lanes->w[i][l] * quant, error = x - scale[l] * quant;
            sum_wq[l] += wq;
            sum_wqq[l] += wq * quant;
            sum_wqx[l] += wq * lanes->centred[i][l];
            sum_err[l] += lanes->w[i][l] * error * error;
            q[i][l] = quant;
        }
    }
    memcpy(sums->wq, sum_wq, sizeof sum_wq);
    memcpy(sums->wqq, sum_wqq, sizeof sum_wqq);
    memcpy(sums->wqx, sum_wqx, sizeof sum_wqx);
    memcpy(sums->err, sum_err, sizeof sum_err);
}

/* Replaces scale and min of each lane by the best ones for the summed quants if their gain is larger. Gain: reduction
 * of the error, sum w (x - mean)^2 without quants. */
static void update_affine(const phi_lanes *lanes, const phi_lane_sums *sums, int min_at_most_zero, float *scale,
                          float *min, float *gain) {
    PHI_FOR_EACH_LANE(l) {
        const float mean = lanes->mean[l], sum_w = lanes->sum_w[l];
        const float wqq_centred = sums->wqq[l] - sums->wq[l] * sums->wq[l] / sum_w;
        /* Below the threshold all quants are equal, and the quotient is noise. */
        float s = wqq_centred > 1e-5f * sums->wqq[l] ? sums->wqx[l] / wqq_centred : 0.0f;
        s = s > 0.0f ? s : 0.0f;
        float m = mean - s * sums->wq[l] / sum_w;
        float g = s * sums->wqx[l], noise = fabsf(gain[l]);
        if (min_at_most_zero && m > 0.0f) {
            const float wqx = sums->wqx[l] + mean * sums->wq[l]; /* w q x */
            m = 0.0f;
            s = sums->wqq[l] > 0.0f ? wqx / sums->wqq[l] : 0.0f;
            s = s > 0.0f ? s : 0.0f;
            g = s * wqx - sum_w * mean * mean;
            noise += 8.0f * sum_w * mean * mean; /* both terms are sums of up to 32 products */
        }
        const int is_better = g > gain[l] + PHI_MIN_GAIN * noise;
        scale[l] = is_better ? s : scale[l];
        min[l] = is_better ? m : min[l];
        gain[l] = is_better ? g : gain[l];
    }
}

void phi_fit_affine(const phi_lanes *lanes, float q_max, int min_at_most_zero, float *scale, float *min) {
    float low[PHI_LANES], high[PHI_LANES], inverse[PHI_LANES], gain[PHI_LANES];
    phi_lane_sums sums;
    PHI_FOR_EACH_LANE(l) {
        low[l] = high[l] = lanes->x[0][l];
        gain[l] = -FLT_MAX;
        scale[l] = min[l] = 0.0f;
    }
    for (int i = 1; i < lanes->n; i++) {
        PHI_FOR_EACH_LANE(l) {
            low[l] = lanes->x[i][l] < low[l] ? lanes->x[i][l] : low[l];
            high[l] = lanes->x[i][l] > high[l] ? lanes->x[i][l] : high[l];
        }
    }
    if (min_at_most_zero) {
        PHI_FOR_EACH_LANE(l) low[l] = low[l] < 0.0f ? low[l] : 0.0f;
    }
    for (int k = 0; k < N_RANGE_OFFSETS; k++) {
        PHI_FOR_EACH_LANE(l) inverse[l] = (q_max + range_offsets[k]) * phi_inverse(high[l] - low[l]);
        candidate_sums(lanes, low, inverse, 0.0f, q_max, &sums);
        update_affine(lanes, &sums, min_at_most_zero, scale, min, gain);
    }
    for (int k = 0; k < REFINEMENTS; k++) {
        PHI_FOR_EACH_LANE(l) inverse[l] = phi_inverse(scale[l]);
        candidate_sums(lanes, min, inverse, 0.0f, q_max, &sums);
        update_affine(lanes, &sums, min_at_most_zero, scale, min, gain);
    }
}

/* The same without a min. Gain: reduction of sum w x^2. */
static void update_symmetric(const phi_lanes *lanes, const phi_lane_sums *sums, float *scale, float *gain) {
    PHI_FOR_EACH_LANE(l) {
        const float wqx = sums->wqx[l] + lanes->mean[l] * sums->wq[l]; /* w q x */
        const float s = sums->wqq[l] > 0.0f ? wqx / sums->wqq[l] : 0.0f;
        const float g = s * wqx;
        const int is_better = g > gain[l] * (1.0f + PHI_MIN_GAIN);
        scale[l] = is_better ? s : scale[l];
        gain[l] = is_better ? g : gain[l];
    }
}

void phi_fit_symmetric(const phi_lanes *lanes, float q_min, float q_max, float *scale) {
    static const float zero[PHI_LANES] = {0};
    float largest[PHI_LANES] = {0}, inverse[PHI_LANES], gain[PHI_LANES] = {0};
    phi_lane_sums sums;
    PHI_FOR_EACH_LANE(l) scale[l] = 0.0f;
    for (int i = 0; i < lanes->n; i++) {
        PHI_FOR_EACH_LANE(l) { largest[l] = fabsf(lanes->x[i][l]) > fabsf(largest[l]) ? lanes->x[i][l] : largest[l]; }
    }
    PHI_FOR_EACH_LANE(l) largest[l] = phi_inverse(largest[l]);
    /* The weight of largest magnitude is mapped to q_min, which often has one step more than q_max, then to q_max. */
    for (int side = 0; side < 2; side++) {
        const float end = side == 0 ? q_min : q_max;
        for (int k = 0; k < N_RANGE_OFFSETS; k++) {
            const float offset = end < 0.0f ? -range_offsets[k] : range_offsets[k];
            PHI_FOR_EACH_LANE(l) inverse[l] = (end + offset) * largest[l];
            candidate_sums(lanes, zero, inverse, q_min, q_max, &sums);
            update_symmetric(lanes, &sums, scale, gain);
        }
    }
    for (int k = 0; k < REFINEMENTS; k++) {
        PHI_FOR_EACH_LANE(l) inverse[l] = phi_inverse(scale[l]);
        candidate_sums(lanes, zero, inverse, q_min, q_max, &sums);
        update_symmetric(lanes, &sums, scale, gain);
    }
}
