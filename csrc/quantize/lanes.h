/* Eight blocks of weights side by side, one per lane: the data that the searches in quantize/ work on.
 *
 * Element i of all lanes is contiguous, so a sum over a block runs down a column and compilers vectorise it without
 * permission to reorder additions. Weights are normalised: divided by a power of two per lane that brings the largest
 * near 1, so that squares neither overflow nor underflow whatever the scale of the tensor. Scales and minima are found
 * for normalised weights, then multiplied by the power of two and rounded to half precision. */
#ifndef PHI_QUANTIZE_LANES_H
#define PHI_QUANTIZE_LANES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "half.h"

enum { PHI_LANES = 8, PHI_LANE_ELEMENTS = 32 };

/* Relative gain below which a candidate counts as equal to an earlier one, since the difference may be rounding. Lanes
 * whose weights are all equal have many equally good scales: this way they choose the same one, which suits a
 * super-block's shared scale. */
#define PHI_MIN_GAIN 5e-7f

/* A loop over lanes. gcc must not unroll it: it would then vectorise the enclosing loop instead, which is slower. */
#if defined(__GNUC__) && !defined(__clang__)
#define PHI_FOR_EACH_LANE(l) _Pragma("GCC unroll 1") for (int l = 0; l < PHI_LANES; l++)
#else
#define PHI_FOR_EACH_LANE(l) for (int l = 0; l < PHI_LANES; l++)
#endif

typedef struct {
    int n;                                       /* elements per lane: 16 or 32 */
    float x[PHI_LANE_ELEMENTS][PHI_LANES];       /* normalised weights */
    float w[PHI_LANE_ELEMENTS][PHI_LANES];       /* importance of each, above 0 */
    float centred[PHI_LANE_ELEMENTS][PHI_LANES]; /* x - mean: products keep their precision when the mean is large */
    float sum_w[PHI_LANES];
    float mean[PHI_LANES];       /* sum(w x) / sum(w) */
    float normaliser[PHI_LANES]; /* the power of two that weights were divided by */
} phi_lanes;

/* Sums over the elements of each lane for one choice of quants q. */
typedef struct {
    float wq[PHI_LANES];  /* w q */
    float wqq[PHI_LANES]; /* w q q */
    float wqx[PHI_LANES]; /* w q (x - mean) */
    float err[PHI_LANES]; /* w (x - scale q - min)^2 */
} phi_lane_sums;

/* The nearest integer, ties to even, for |v| < 2^22. Only additions, which every compiler vectorises. */
static inline float phi_round(float v) { return (v + 12582912.0f) - 12582912.0f; }

static inline float phi_clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

static inline float phi_inverse(float scale) { return fabsf(scale) < 1e-30f ? 0.0f : 1.0f / scale; }

/* value * normaliser in half precision, clamped to finite values. */
static inline uint16_t phi_value_to_half(float value, float normaliser) {
    return phi_float_to_half(phi_clamp(value * normaliser, -65504.0f, 65504.0f));
}

/* The same for a scale. A nonzero scale does not become 0: a large code or quant can still make it matter. */
static inline uint16_t phi_scale_to_half(float value, float normaliser) {
    const uint16_t half = phi_value_to_half(value, normaliser);
    return value != 0.0f && (half & 0x7fffu) == 0 ? (uint16_t)(half | 1u) : half;
}

/* The normalised value of a half. */
static inline float phi_half_to_value(uint16_t half, float normaliser) { return phi_half_to_float(half) / normaliser; }

/* The power of two that brings the largest of n magnitudes into [1/2, 1); 0 if all round to 0 in half precision. */
float phi_normaliser(const float *x, size_t n);
float phi_largest_importance(const float *importance, size_t n); /* NULL: 0 */
/* Loads n_lanes consecutive blocks of n elements; unused lanes are filled with zeros.
 * x [n_lanes * n]: weights. normaliser [n_lanes]: from phi_normaliser. importance [n_lanes * n], NULL: all equal; it is
 * divided by largest_importance [n_lanes]. */
void phi_load_lanes(phi_lanes *lanes, int n, int n_lanes, const float *x, const float *normaliser,
                    const float *importance, const float *largest_importance);

/* Finds per lane the scale and min that minimise sum w (x - scale q - min)^2, q from 0 to q_max. min_at_most_zero: the
 * type cannot store a positive min. */
void phi_fit_affine(const phi_lanes *lanes, float q_max, int min_at_most_zero, float *scale, float *min);
/* The same without a min, q from q_min to q_max. */
void phi_fit_symmetric(const phi_lanes *lanes, float q_min, float q_max, float *scale);

/* Finds the nearest quants q [n][PHI_LANES] for a scale and a min (NULL: 0) per lane, and their sums. */
void phi_nearest_quants(const phi_lanes *lanes, const float *scale, const float *min, float q_min, float q_max,
                        float (*q)[PHI_LANES], phi_lane_sums *sums);

#endif
