/* Integer dot products without SDOT: byte products are summed in int16, then widened to int32.
 * csrc/kernels/dotprod/dot.h has the same functions by SDOT. */
#ifndef PHI_NEON_DOT_H
#define PHI_NEON_DOT_H

#include "simd.h"

/* sum + 16 products, in four int32 lanes. Two products share an int16: 2 * 128 * 127 < 2^15. */
PHI_INLINE int32x4_t phi_dot_16(int32x4_t sum, int8x16_t q, int8x16_t x) {
    const int16x8_t products = vmlal_high_s8(vmull_s8(vget_low_s8(q), vget_low_s8(x)), q, x);
    return vpadalq_s16(sum, products);
}

/* Sums of the products of lines: four columns of four rows, not yet added across columns. */
typedef struct {
    int16x8_t low, high; /* [2 rows, 4 columns] */
} phi_sums;

/* Lines that an int16 can sum without overflow: at most 8 * 31 * 127, 4 * 63 * 127, or 2 * 128 * 127. */
PHI_INLINE int phi_max_lines_per_sum(int bits) { return bits <= 5 ? 8 : bits == 6 ? 4 : 2; }

/* sums (NULL: 0) + products of q [4 rows, 4 columns] and columns 4 * line .. 4 * line + 3 of x. */
PHI_INLINE phi_sums phi_add_line(const phi_sums *sums, int8x16_t q, const int8_t *x, int line) {
    int32_t columns;
    memcpy(&columns, x + 4 * line, sizeof columns);
    const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(columns));
    if (!sums) return (phi_sums){vmull_s8(vget_low_s8(q), vget_low_s8(xs)), vmull_high_s8(q, xs)};
    return (phi_sums){vmlal_s8(sums->low, vget_low_s8(q), vget_low_s8(xs)), vmlal_high_s8(sums->high, q, xs)};
}

/* The initial int32 value of a sum (NULL: 0) is added by phi_end_sums here; with SDOT, phi_begin_sums returns it for
 * phi_add_line to add to. */
PHI_INLINE const phi_sums *phi_begin_sums(const int32x4_t *initial, phi_sums *sums) {
    (void)initial;
    (void)sums;
    return NULL;
}
PHI_INLINE int32x4_t phi_end_sums(const int32x4_t *initial, phi_sums sums) {
    const int32x4_t rows = vpaddq_s32(vpaddlq_s16(sums.low), vpaddlq_s16(sums.high));
    return initial ? vaddq_s32(*initial, rows) : rows;
}

#endif
