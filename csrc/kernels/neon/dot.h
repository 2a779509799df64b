/* Integer products without the dot product instructions: products of bytes become int16 sums, then int32.
 * A tier that has better ones offers the same functions. */
#ifndef PHI_NEON_DOT_H
#define PHI_NEON_DOT_H

#include "simd.h"

/* Adds 16 products to four sums. Two share an int16: 2 * 128 * 127 < 2^15. */
PHI_INLINE int32x4_t phi_dot_16(int32x4_t sum, int8x16_t q, int8x16_t x) {
    const int16x8_t products = vmlal_high_s8(vmull_s8(vget_low_s8(q), vget_low_s8(x)), q, x);
    return vpadalq_s16(sum, products);
}

/* Sums of a line's products: four columns of four rows each. */
typedef struct {
    int16x8_t low, high; /* [2 rows, 4 columns] */
} phi_sums;

/* How many lines can be added up: their quants give at most 8 * 31 * 127, 4 * 63 * 127, or 2 * 128 * 127. */
PHI_INLINE int phi_lines_a_sum(int bits) { return bits <= 5 ? 8 : bits == 6 ? 4 : 2; }

/* The first line, or one more: q [4 rows, 4 columns] with columns 4 * line .. 4 * line + 3 of x. */
PHI_INLINE phi_sums phi_add_line(const phi_sums *sums, int8x16_t q, const int8_t *x, int line) {
    int32_t four;
    memcpy(&four, x + 4 * line, sizeof four);
    const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
    if (!sums) return (phi_sums){vmull_s8(vget_low_s8(q), vget_low_s8(xs)), vmull_high_s8(q, xs)};
    return (phi_sums){vmlal_s8(sums->low, vget_low_s8(q), vget_low_s8(xs)), vmlal_high_s8(sums->high, q, xs)};
}

/* What an int32 sum begins with is added at the end here; elsewhere it is what lines are added to. */
PHI_INLINE const phi_sums *phi_begin_sums(const int32x4_t *begin, phi_sums *sums) {
    (void)begin;
    (void)sums;
    return NULL;
}
PHI_INLINE int32x4_t phi_end_sums(const int32x4_t *begin, phi_sums sums) {
    const int32x4_t rows = vpaddq_s32(vpaddlq_s16(sums.low), vpaddlq_s16(sums.high));
    return begin ? vaddq_s32(*begin, rows) : rows;
}

#endif
