/* Eight blocks of weights side by side: what the searches of quantize/ work on.
 *
 * Element i of all lanes lies together, so sums over a block are sums down a column: compilers vectorise them without
 * being told that additions may change places. Weights are divided by a power of two, their lane's unit, which brings
 * the largest near 1: squares neither overflow nor vanish, whatever the tensor's size. Scales are found in that measure
 * and rounded to what the file can hold, half precision in the tensor's own. */
#ifndef PHI_QUANTIZE_LANES_H
#define PHI_QUANTIZE_LANES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "half.h"

enum { PHI_LANES = 8, PHI_LANE_ELEMENTS = 32 };

/* What a candidate must gain over one before it: less is rounding. So lanes whose weights all are alike, for which many
 * scales are equally good, agree on the first, and share a super-block's scale well. */
#define PHI_ROUNDING 5e-7f

/* A loop over lanes. gcc would unroll it first, and then vectorise the loop around it, badly. */
#if defined(__GNUC__) && !defined(__clang__)
#define PHI_EACH_LANE(l) _Pragma("GCC unroll 1") for (int l = 0; l < PHI_LANES; l++)
#else
#define PHI_EACH_LANE(l) for (int l = 0; l < PHI_LANES; l++)
#endif

typedef struct {
    int n;                                       /* elements a lane: 16 or 32 */
    float x[PHI_LANE_ELEMENTS][PHI_LANES];       /* weights over the unit */
    float w[PHI_LANE_ELEMENTS][PHI_LANES];       /* their importances, above 0 */
    float centred[PHI_LANE_ELEMENTS][PHI_LANES]; /* x - mean: offsets do not swallow the digits of products */
    float sum_w[PHI_LANES];
    float mean[PHI_LANES]; /* sum(w x) / sum(w) */
    float unit[PHI_LANES]; /* a power of two */
} phi_lanes;

/* What a choice of quants q makes of a lane: sums over its elements. */
typedef struct {
    float q[PHI_LANES];   /* w q */
    float qq[PHI_LANES];  /* w q q */
    float qx[PHI_LANES];  /* w q (x - mean) */
    float err[PHI_LANES]; /* w (x - value of q)^2 */
} phi_lane_sums;

/* The nearest integer, ties to even, of |v| < 2^22; additions that every compiler vectorises. */
static inline float phi_round(float v) { return (v + 12582912.0f) - 12582912.0f; }

static inline float phi_clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

static inline float phi_inverse(float scale) { return fabsf(scale) < 1e-30f ? 0.0f : 1.0f / scale; }

/* The half that is nearest to value * unit and finite. A scale is not rounded to 0, for small codes and quants can make
 * up for a large one. phi_half_in_units: what a half stands for, over the unit. */
static inline uint16_t phi_half_of(float value, float unit) {
    return phi_float_to_half(phi_clamp(value * unit, -65504.0f, 65504.0f));
}

static inline uint16_t phi_scale_half(float value, float unit) {
    const uint16_t half = phi_half_of(value, unit);
    return value != 0.0f && (half & 0x7fffu) == 0 ? (uint16_t)(half | 1u) : half;
}

static inline float phi_half_in_units(uint16_t half, float unit) { return phi_half_to_float(half) / unit; }

/* The power of two that brings the largest of n magnitudes between 1/2 and 1; 0 where all vanish in half precision. */
float phi_unit_of(const float *x, size_t n);
float phi_largest_importance(const float *importance, size_t n); /* 0 for NULL */
/* Loads n_lanes blocks of n elements, which follow each other at x, the unit of each, and the importances of their
 * columns (NULL: all alike) over the lane's largest one; lanes left over hold zeros. */
void phi_load_lanes(phi_lanes *lanes, int n, int n_lanes, const float *x, const float *unit, const float *importance,
                    const float *largest_importance);

/* The scale (and min, below 0 if it must be) of each lane for which scale * q + min is nearest to its weights, weighted
 * squares summed, q from 0 (symmetric: from q_min) to q_max. */
void phi_fit_affine(const phi_lanes *lanes, float q_max, int min_at_most_zero, float *scale, float *min);
void phi_fit_symmetric(const phi_lanes *lanes, float q_min, float q_max, float *scale);

/* The nearest quants [n][lanes] for scales and mins (NULL: none), and their sums. */
void phi_nearest(const phi_lanes *lanes, const float *scale, const float *min, float q_min, float q_max,
                 float (*q)[PHI_LANES], phi_lane_sums *sums);

#endif
