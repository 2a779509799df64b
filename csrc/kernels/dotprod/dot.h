/* Integer dot products by SDOT, which adds four products of signed bytes to each int32. The same functions as in
 * csrc/kernels/neon/dot.h. */
#ifndef PHI_DOTPROD_DOT_H
#define PHI_DOTPROD_DOT_H

#include "../neon/simd.h"

/* sum + 16 products, in four int32 lanes. */
PHI_INLINE int32x4_t phi_dot_16(int32x4_t sum, int8x16_t q, int8x16_t x) { return vdotq_s32(sum, q, x); }

typedef int32x4_t phi_sums; /* of four rows */

/* int32 never overflows: a sub-block has eight lines. */
PHI_INLINE int phi_max_lines_per_sum(int bits) {
    (void)bits;
    return 8;
}

/* sums (NULL: 0) + products of q [4 rows, 4 columns] and columns 4 * line .. 4 * line + 3 of x. line is a constant
 * after inlining. */
PHI_INLINE phi_sums phi_add_line(const phi_sums *sums, int8x16_t q, const int8_t *x, int line) {
    const int32x4_t sum = sums ? *sums : vdupq_n_s32(0);
    const int8x16_t xs = vld1q_s8(x + line / 4 * 16);
    switch (line % 4) {
    case 0:
        return vdotq_laneq_s32(sum, q, xs, 0);
    case 1:
        return vdotq_laneq_s32(sum, q, xs, 1);
    case 2:
        return vdotq_laneq_s32(sum, q, xs, 2);
    default:
        return vdotq_laneq_s32(sum, q, xs, 3);
    }
}

/* Sums start from their initial value (NULL: 0), so nothing is left to add at the end. */
PHI_INLINE const phi_sums *phi_begin_sums(const int32x4_t *initial, phi_sums *sums) {
    if (!initial) return NULL;
    *sums = *initial;
    return sums;
}
PHI_INLINE int32x4_t phi_end_sums(const int32x4_t *initial, phi_sums sums) {
    (void)initial;
    return sums;
}

#endif
