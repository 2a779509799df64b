/* Products of packed rows with int8 activations: see neon/packed.h.
 * Idea: SMMLA multiplies two rows of eight columns with two tokens of eight. When panels are unpacked for many tokens,
 * two lines (four columns each) are zipped to vectors of two rows x eight columns, so the layout of the panels is that
 * of all tiers. What comes out, [2 rows, 2 tokens], is sorted by token for the float part, which is that of few tokens.
 * Those few go by SDOT: a single token would leave half of a matrix product unused.
 * Bound for many tokens: 32 multiplications for 32 columns of 8 rows and 4 tokens, half as many as by SDOT. */
#include "i8mm.h"

#include "../dotprod/dot.h"

#define PHI_MATRIX_PRODUCTS 1
#include "../neon/packed.h"

/* Lines 2i and 2i + 1 become columns 8i .. 8i + 7: vector v has rows 4v and 4v + 1 in the first, the next in the
 * second.
 */
PHI_INLINE void arrange_lines(int8x16_t (*lines)[VECTORS]) {
    for (int i = 0; i < LINES; i += 2) {
        for (int v = 0; v < VECTORS; v++) {
            const int32x4_t a = vreinterpretq_s32_s8(lines[i][v]), b = vreinterpretq_s32_s8(lines[i + 1][v]);
            lines[i][v] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
            lines[i + 1][v] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
        }
    }
}

/* Eight columns, from `first` on, of two tokens. */
PHI_INLINE int8x16_t pair_of(const int8_t *a, const int8_t *b, int first) {
    return vcombine_s8(vld1_s8(a + first), vld1_s8(b + first));
}

PHI_INLINE void add_unpacked_block(const format f, const chunk *c, int b, const x_blocks *x, int n_tokens, int first,
                                   float32x4_t (*total)[VECTORS]) {
    const int8x16_t(*lines)[VECTORS] = c->lines + b * LINES;
    const int group_lines = LINES / f.groups_per_block, group = b * f.groups_per_block;
    UNROLL for (int k = 0; k < f.groups_per_block; k++) {
        int32x4_t dot[MANY_TOKENS][VECTORS];
        UNROLL for (int t = 0; t < n_tokens; t += 2) {
            const x_blocks x0 = x[t], x1 = x[t + 1 < n_tokens ? t + 1 : t]; /* a token alone is its own neighbour */
            int32x4_t begin = vdupq_n_s32(0);
            if (is_centred(f)) {
                const int32x2_t pair = vset_lane_s32(x1.offsets[group + k], vdup_n_s32(x0.offsets[group + k]), 1);
                begin = vshlq_s32(vcombine_s32(pair, pair), vdupq_n_s32(-f.centre_shift));
            }
            int32x4_t sum[TILE_VECTORS][2]; /* of two rows each, [2 rows, 2 tokens] */
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) sum[v][0] = sum[v][1] = begin;
            UNROLL for (int i = k * group_lines; i < (k + 1) * group_lines; i += 2) {
                const int8x16_t xs = pair_of(x0.quants, x1.quants, b * PHI_Q8_BLOCK + 4 * i);
                UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
                    sum[v][0] = vmmlaq_s32(sum[v][0], lines[i][first + v], xs);
                    sum[v][1] = vmmlaq_s32(sum[v][1], lines[i + 1][first + v], xs);
                }
            }
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
                dot[t][v] = vuzp1q_s32(sum[v][0], sum[v][1]);
                if (t + 1 < n_tokens) dot[t + 1][v] = vuzp2q_s32(sum[v][0], sum[v][1]);
            }
        }
        scale_dots(f, c->g.scale[group + k], c->g.min[group + k], k, x, b, n_tokens, first, TILE_VECTORS, dot, total);
    }
}

PHI_DEFINE_PACKED_PRODUCTS(i8mm)
