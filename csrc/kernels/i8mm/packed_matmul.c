/* Products of packed rows with int8 activations by SMMLA: neon/packed.h with its own product of unpacked lines.
 * Idea: SMMLA multiplies two rows of eight columns by eight columns of two tokens. When panels are unpacked (prefill),
 * two lines of four columns are zipped to vectors of two rows x eight columns, so panels have the same layout in every
 * tier. The sums, [2 rows, 2 tokens], are sorted by token for the float part, which is that of a small batch. Decode
 * and small batches use SDOT: a single token would leave half of every SMMLA unused.
 * Bound (prefill): 32 SMMLA per 32 columns of 8 rows and 4 tokens, half as many as by SDOT. */
#include "i8mm.h"

#include "../dotprod/dot.h"

#define PHI_MATRIX_PRODUCTS 1
#include "../neon/packed.h"

/* Zips lines 2i and 2i + 1 to columns 8i .. 8i + 7: vector v of the first then holds rows 4v and 4v + 1, vector v of
 * the second rows 4v + 2 and 4v + 3. */
PHI_INLINE void rearrange_lines(int8x16_t (*lines)[VECTORS]) {
    for (int i = 0; i < LINES; i += 2) {
        for (int v = 0; v < VECTORS; v++) {
            const int32x4_t a = vreinterpretq_s32_s8(lines[i][v]), b = vreinterpretq_s32_s8(lines[i + 1][v]);
            lines[i][v] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
            lines[i + 1][v] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
        }
    }
}

/* Columns first .. first + 7 of two tokens. */
PHI_INLINE int8x16_t load_token_pair(const int8_t *a, const int8_t *b, int first) {
    return vcombine_s8(vld1_s8(a + first), vld1_s8(b + first));
}

PHI_INLINE void add_unpacked_block(const format f, const chunk *c, int b, const activations *x, int n_tokens, int first,
                                   float32x4_t (*total)[VECTORS]) {
    const int8x16_t(*lines)[VECTORS] = c->lines + b * LINES;
    const int group_lines = LINES / f.groups_per_block, group = b * f.groups_per_block;
    UNROLL for (int k = 0; k < f.groups_per_block; k++) {
        int32x4_t dot[TILE_TOKENS][VECTORS];
        UNROLL for (int t = 0; t < n_tokens; t += 2) {
            const activations x0 = x[t], x1 = x[t + 1 < n_tokens ? t + 1 : t]; /* a last token is paired with itself */
            int32x4_t initial = vdupq_n_s32(0);
            if (is_centred(f)) {
                const int32x2_t pair = vset_lane_s32(x1.offsets[group + k], vdup_n_s32(x0.offsets[group + k]), 1);
                initial = vshlq_s32(vcombine_s32(pair, pair), vdupq_n_s32(-f.centre_shift));
            }
            int32x4_t sum[TILE_VECTORS][2]; /* [2 rows, 2 tokens] each */
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) sum[v][0] = sum[v][1] = initial;
            UNROLL for (int i = k * group_lines; i < (k + 1) * group_lines; i += 2) {
                const int8x16_t xs = load_token_pair(x0.quants, x1.quants, b * PHI_Q8_BLOCK + 4 * i);
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
