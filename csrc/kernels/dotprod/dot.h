/* Integer products by SDOT: four products of signed bytes added to each int32. */
#ifndef PHI_DOTPROD_DOT_H
#define PHI_DOTPROD_DOT_H

#include "../neon/simd.h"

PHI_INLINE int32x4_t phi_dot_16(int32x4_t sum, int8x16_t q, int8x16_t x) { return vdotq_s32(sum, q, x); }

typedef int32x4_t phi_sums; /* of four rows */

PHI_INLINE int phi_lines_a_sum(int bits) {
    (void)bits;
    return 8;
}

/* q [4 rows, 4 columns] with columns 4 * line .. 4 * line + 3 of x; line becomes a constant. */
PHI_INLINE phi_sums phi_add_line(const phi_sums *sums, int8x16_t q, const int8_t *x, int line) {
    const int32x4_t before = sums ? *sums : vdupq_n_s32(0);
    const int8x16_t xs = vld1q_s8(x + line / 4 * 16);
    switch (line % 4) {
    case 0:
        return vdotq_laneq_s32(before, q, xs, 0);
    case 1:
        return vdotq_laneq_s32(before, q, xs, 1);
    case 2:
        return vdotq_laneq_s32(before, q, xs, 2);
    default:
        return vdotq_laneq_s32(before, q, xs, 3);
    }
}

PHI_INLINE const phi_sums *phi_begin_sums(const int32x4_t *begin, phi_sums *sums) {
    if (!begin) return NULL;
    *sums = *begin;
    return sums;
}
PHI_INLINE int32x4_t phi_end_sums(const int32x4_t *begin, phi_sums sums) {
    (void)begin;
    return sums;
}

#endif
