/* Loops of one multiply instruction without loads, for benchmarks: the rate of the multipliers alone. */
#ifndef PHI_GENERIC_PEAK_H
#define PHI_GENERIC_PEAK_H

#include <string.h>

#include "../../kernels.h"
#include "unroll.h"

enum { PHI_PEAK_SUMS = 12 }; /* hide a latency of six cycles at two instructions per cycle, and fit 16 registers */

/* 1, unknown to compilers, which would simplify products with a constant. */
PHI_INLINE int phi_peak_one(void) {
    static volatile int one = 1;
    return one;
}

/* Defines phi_peak.run. broadcast(int) returns a vector of lanes; multiply(sum, x) is the instruction, where every
 * number in x is 1. Sums start from different values: equal ones would be computed once. */
#define PHI_DEFINE_PEAK(function, vector, lane, broadcast, multiply, x)                    \
    double function(size_t n_steps) {                                                      \
        enum { N_LANES = sizeof(vector) / sizeof(lane) };                                  \
        const int one = phi_peak_one();                                                    \
        vector sums[PHI_PEAK_SUMS];                                                        \
        UNROLL for (int i = 0; i < PHI_PEAK_SUMS; i++) sums[i] = broadcast(i * one);       \
        for (size_t step = 0; step < n_steps; step++) {                                    \
            UNROLL for (int i = 0; i < PHI_PEAK_SUMS; i++) sums[i] = multiply(sums[i], x); \
        }                                                                                  \
        lane lanes[PHI_PEAK_SUMS * N_LANES];                                               \
        memcpy(lanes, sums, sizeof lanes);                                                 \
        double total = -(double)(N_LANES * PHI_PEAK_SUMS * (PHI_PEAK_SUMS - 1) / 2);       \
        for (int i = 0; i < PHI_PEAK_SUMS * N_LANES; i++) total += (double)lanes[i];       \
        return total;                                                                      \
    }

/* An element of a table's peak; macs: multiply-accumulates per instruction. */
#define PHI_PEAK(function, macs) {function, PHI_PEAK_SUMS * (macs)}

#endif
