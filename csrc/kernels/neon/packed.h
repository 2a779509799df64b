/* Products of packed rows with int8 activations, on the integer products of the tier that includes this.
 * Layout: panels of 16 interleaved rows (kernels/generic/pack.h). A line is four columns of 16 rows, in four vectors.
 * Idea: quants fit signed bytes (at most 63, or Q8_0's own), so a line's vectors are multiplied by four activations and
 * summed in integers, which are converted to float once per group and scaled. Types without minima subtract their
 * offset in integers: sums start from the activations' offsets. Decode and small batches of up to 4 tokens read lines
 * straight from the panel. Larger batches unpack 256 columns of four panels into L1 once and pass tiles of 8 rows x 4
 * tokens over them. A (row, token) pair is summed in the same order either way.
 * Use: include a tier's dot.h first. A file that defines PHI_MATRIX_PRODUCTS also defines rearrange_lines and
 * add_unpacked_block.
 * Bound: reading the panel for decode and small batches; the multiplications for prefill. */
#ifndef PHI_NEON_PACKED_H
#define PHI_NEON_PACKED_H

#include "../generic/pack.h"
#include "simd.h"

enum {
    TILE_TOKENS = 4,
    VECTORS = 4, /* per line, four rows each */
    TILE_VECTORS = 2,
    LINES = 8,
    MAX_GROUPS = 16,
    CHUNK_BLOCKS = 8, /* sub-blocks of 32 columns that are unpacked at a time */
    PANELS = 4,       /* unpacked at a time: all of them find the activations in L1 */
    TILE_PANELS = 1,  /* of a prefill tile */
};

/* Scales and minima of groups of 16 or 32 columns, each for 16 rows. */
typedef struct {
    float32x4_t scale[MAX_GROUPS][VECTORS], min[MAX_GROUPS][VECTORS]; /* centred types have no min */
} groups;

/* A weight type. All fields are constants after inlining. */
typedef struct {
    size_t unit_bytes;
    int bits;       /* per quant */
    int sub_blocks; /* of 32 columns per unit */
    int unrolled;   /* consecutive sub-blocks that are unpacked differently; later ones repeat at a stride */
    size_t stride; /* bytes from these to the next `unrolled` ones; 0: there are none, or unpack_line adds the offset */
    int groups_per_block; /* scales per sub-block: 1 or 2 */
    bool has_min;         /* w = scale * q - min; otherwise w = scale * (q - (128 >> centre_shift)) */
    int centre_shift;     /* 8: no offset, w = scale * q with signed q */
    void (*unpack_groups)(const void *unit, groups *g);
    /* Vector v of a line of sub-block i * unrolled + j, j < unrolled. unit: moved on by i strides. j, line and v are
     * constants after inlining, i is not. */
    int8x16_t (*unpack_line)(const void *unit, int i, int j, int line, int v);
} format;

PHI_INLINE uint8x16_t load_vector(const uint8_t *line, int v) { return vld1q_u8(line + 16 * v); }
PHI_INLINE int8x16_t unpack_nibbles(const uint8_t *line, int v, int high) {
    const uint8x16_t q = load_vector(line, v);
    return vreinterpretq_s8_u8(high ? vshrq_n_u8(q, 4) : vandq_u8(q, vdupq_n_u8(15)));
}

/* ---- blocks of 32 ---- */

PHI_INLINE void load_halves(const uint16_t *d, float32x4_t *f) {
    for (int v = 0; v < VECTORS; v++) f[v] = phi_load_half(d + 4 * v);
}

PHI_INLINE void groups_q4_0(const void *unit, groups *g) {
    load_halves(((const phi_panel_q4_0 *)unit)->d, g->scale[0]);
}
PHI_INLINE int8x16_t line_q4_0(const void *unit, int i, int j, int line, int v) {
    (void)i, (void)j;
    return unpack_nibbles(((const phi_panel_q4_0 *)unit)->lines[line % 4], v, line / 4);
}

PHI_INLINE void groups_q4_1(const void *unit, groups *g) {
    const phi_panel_q4_1 *u = unit;
    load_halves(u->d, g->scale[0]);
    load_halves(u->m, g->min[0]);
    for (int v = 0; v < VECTORS; v++) g->min[0][v] = vnegq_f32(g->min[0][v]);
}
PHI_INLINE int8x16_t line_q4_1(const void *unit, int i, int j, int line, int v) {
    (void)i, (void)j;
    return unpack_nibbles(((const phi_panel_q4_1 *)unit)->lines[line % 4], v, line / 4);
}

PHI_INLINE void groups_q8_0(const void *unit, groups *g) {
    load_halves(((const phi_panel_q8_0 *)unit)->d, g->scale[0]);
}
PHI_INLINE int8x16_t line_q8_0(const void *unit, int i, int j, int line, int v) {
    (void)i, (void)j;
    return vreinterpretq_s8_u8(load_vector(((const phi_panel_q8_0 *)unit)->lines[line], v));
}

/* ---- blocks of 256 ---- */

PHI_INLINE void scale_u8(uint8x16_t bytes, const float32x4_t *d, float32x4_t *scaled) {
    phi_u8_to_floats(bytes, scaled);
    for (int v = 0; v < VECTORS; v++) scaled[v] = vmulq_f32(scaled[v], d[v]);
}

/* phi_unpack_scales_k4 (6-bit scales and minima of Q4_K and Q5_K) for 16 rows at a time. */
PHI_INLINE void groups_k4(const uint8_t (*packed)[16], const uint16_t *d, const uint16_t *dmin, groups *g) {
    const uint8x16_t low4 = vdupq_n_u8(15), low6 = vdupq_n_u8(63), bits45 = vdupq_n_u8(48);
    float32x4_t ds[VECTORS], dmins[VECTORS];
    load_halves(d, ds);
    load_halves(dmin, dmins);
    UNROLL for (int j = 0; j < 4; j++) {
        const uint8x16_t a = vld1q_u8(packed[j]), b = vld1q_u8(packed[j + 4]), c = vld1q_u8(packed[j + 8]);
        scale_u8(vandq_u8(a, low6), ds, g->scale[j]);
        scale_u8(vandq_u8(b, low6), dmins, g->min[j]);
        scale_u8(vorrq_u8(vandq_u8(c, low4), vandq_u8(vshrq_n_u8(a, 2), bits45)), ds, g->scale[j + 4]);
        scale_u8(vorrq_u8(vshrq_n_u8(c, 4), vandq_u8(vshrq_n_u8(b, 2), bits45)), dmins, g->min[j + 4]);
    }
}

/* Sub-blocks come in pairs that share lines: the even one is in the low nibbles, the odd one in the high nibbles. */
PHI_INLINE void groups_q4_k(const void *unit, groups *g) {
    const phi_panel_q4_k *u = unit;
    groups_k4(u->scales, u->d, u->dmin, g);
}
PHI_INLINE int8x16_t line_q4_k(const void *unit, int i, int j, int line, int v) {
    (void)i;
    return unpack_nibbles(((const phi_panel_q4_k *)unit)->lines[line], v, j);
}

PHI_INLINE void groups_q5_k(const void *unit, groups *g) {
    const phi_panel_q5_k *u = unit;
    groups_k4(u->scales, u->d, u->dmin, g);
}
/* The stride is 0: the first 8 lines are stored apart from the rest. */
PHI_INLINE int8x16_t line_q5_k(const void *unit, int i, int j, int line, int v) {
    const phi_panel_q5_k *u = unit;
    const uint8_t *low = i ? u->rest[8 * (i - 1)] + 64 * line : u->first[line].low;
    const uint8x16_t high = load_vector(u->first[line].high, v);
    const uint8x16_t fifth = vshlq_u8(high, vdupq_n_s8((int8_t)(4 - 2 * i - j)));
    const uint8x16_t nibbles = vreinterpretq_u8_s8(unpack_nibbles(low, v, j));
    return vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(16), fifth, nibbles));
}

PHI_INLINE void groups_q6_k(const void *unit, groups *g) {
    const phi_panel_q6_k *u = unit;
    float32x4_t ds[VECTORS];
    load_halves(u->d, ds);
    for (int i = 0; i < MAX_GROUPS; i++) {
        phi_s8_to_floats(vld1q_s8(u->scales[i]), g->scale[i]);
        for (int v = 0; v < VECTORS; v++) g->scale[i][v] = vmulq_f32(g->scale[i][v], ds[v]);
    }
}
PHI_INLINE int8x16_t line_q6_k(const void *unit, int i, int j, int line, int v) {
    const phi_panel_q6_k *u = unit;
    const uint8_t *low = j % 2 ? u->halves[0].second[line] : u->halves[0].first[line].low;
    const uint8x16_t high = phi_shift(load_vector(u->halves[0].first[line].high, v), 4 - 2 * j);
    const uint8x16_t nibbles = vreinterpretq_u8_s8(unpack_nibbles(low, v, j / 2));
    (void)i;
    return vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(48), high, nibbles));
}

/* ---- products ---- */

/* A token's quantised activations, sub-block by sub-block. */
typedef struct {
    const int8_t *quants;   /* [n, 32] */
    const float *scales;    /* [n] */
    const float *sums;      /* [n, groups] */
    const int32_t *offsets; /* [n, groups] */
} activations;

/* Starting at sub-block `block`; token 0 is the first of the product. */
PHI_INLINE activations activations_at(const format f, const phi_matmul *m, int token, size_t block) {
    const size_t n_cols = (size_t)m->n_cols;
    const phi_q8 q8 = phi_q8_at(m->x->q8, (size_t)(m->first_token + token) * n_cols + block * PHI_Q8_BLOCK);
    const bool per_block = f.groups_per_block == 1;
    return (activations){q8.quants, q8.scales, per_block ? q8.block_sums : q8.sums,
                         per_block ? q8.block_offsets : q8.offsets};
}

PHI_INLINE bool is_centred(const format f) { return !f.has_min && f.centre_shift < 8; }

/* Scales the integer sums dot [n_tokens][n_vectors] of group k of sub-block b and adds them to total, from vector
 * `first` on. */
PHI_INLINE void scale_dots(const format f, const float32x4_t *scale, const float32x4_t *min, int k,
                           const activations *x, int b, int n_tokens, int first, int n_vectors,
                           int32x4_t (*dot)[VECTORS], float32x4_t (*total)[VECTORS]) {
    UNROLL for (int v = first; v < first + n_vectors; v++) {
        UNROLL for (int t = 0; t < n_tokens; t++) {
            const float32x4_t products = vmulq_f32(vcvtq_f32_s32(dot[t][v - first]), scale[v]);
            total[t][v] = vfmaq_n_f32(total[t][v], products, x[t].scales[b]);
            if (f.has_min) total[t][v] = vfmsq_n_f32(total[t][v], min[v], x[t].sums[b * f.groups_per_block + k]);
        }
    }
}

/* Where lines come from: already unpacked, or a sub-block of a unit (see format.unpack_line). */
typedef struct {
    const int8x16_t (*unpacked)[VECTORS];
    const void *unit;
    int i, j;
} line_source;

PHI_INLINE int8x16_t load_line(const format f, const line_source s, int line, int v) {
    return s.unpacked ? s.unpacked[line][v] : f.unpack_line(s.unit, s.i, s.j, line, v);
}

/* Adds sub-block b to n_vectors vectors of total, from vector `first` on. */
PHI_INLINE void add_block(const format f, const line_source s, const groups *g, int b, const activations *x,
                          int n_tokens, int first, int n_vectors, float32x4_t (*total)[VECTORS]) {
    const int group_lines = LINES / f.groups_per_block, group = b * f.groups_per_block;
    const int sum_lines = phi_max_lines_per_sum(f.bits) < group_lines ? phi_max_lines_per_sum(f.bits) : group_lines;
    UNROLL for (int k = 0; k < f.groups_per_block; k++) {
        int32x4_t dot[TILE_TOKENS][VECTORS], initial[TILE_TOKENS];
        UNROLL for (int t = 0; t < n_tokens; t++) {
            if (is_centred(f)) initial[t] = vdupq_n_s32(x[t].offsets[group + k] >> f.centre_shift);
        }
        UNROLL for (int line = k * group_lines; line < (k + 1) * group_lines; line += sum_lines) {
            phi_sums sum[TILE_TOKENS][VECTORS];
            const bool first_lines = line == k * group_lines;
            UNROLL for (int i = line; i < line + sum_lines; i++) {
                UNROLL for (int v = 0; v < n_vectors; v++) {
                    const int8x16_t q = load_line(f, s, i, first + v);
                    UNROLL for (int t = 0; t < n_tokens; t++) {
                        const int32x4_t *start = first_lines && is_centred(f) ? &initial[t] : NULL;
                        const phi_sums *partial = i > line ? &sum[t][v] : phi_begin_sums(start, &sum[t][v]);
                        sum[t][v] = phi_add_line(partial, q, x[t].quants + b * PHI_Q8_BLOCK, i);
                    }
                }
            }
            UNROLL for (int v = 0; v < n_vectors; v++) {
                UNROLL for (int t = 0; t < n_tokens; t++) {
                    const int32x4_t *start = !first_lines ? &dot[t][v] : is_centred(f) ? &initial[t] : NULL;
                    dot[t][v] = phi_end_sums(start, sum[t][v]);
                }
            }
        }
        scale_dots(f, g->scale[group + k], g->min[group + k], k, x, b, n_tokens, first, n_vectors, dot, total);
    }
}

PHI_INLINE void prefetch(const uint8_t *bytes, size_t n_bytes) {
    UNROLL for (size_t i = 0; i < n_bytes; i += 64) phi_prefetch_line(bytes + i);
}

/* Vectors of a line that are multiplied in one pass: more than two tokens need the registers for their sums. */
PHI_INLINE int vectors_per_pass(int n_tokens) { return n_tokens <= 2 ? VECTORS : TILE_VECTORS; }

/* Largest batch that reads lines straight from the panel. */
PHI_INLINE int max_small_batch(const format f) {
    (void)f;
    return TILE_TOKENS;
}

/* Decode and small batches: one panel by up to TILE_TOKENS tokens. n_tokens is a constant after inlining. */
PHI_INLINE void multiply_small_tile(const format f, const uint8_t *panel, const phi_matmul *m, int token, int n_tokens,
                                    float *out) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_Q8_BLOCK,
                 step_bytes = f.unit_bytes / (size_t)(f.sub_blocks / f.unrolled);
    const int n_vectors = vectors_per_pass(n_tokens);
    /* One prefetch, into L1: at the distance for L1 or else at that for L2. */
    const size_t ahead = m->prefetch.l1_bytes ? m->prefetch.l1_bytes : m->prefetch.l2_bytes;
    float32x4_t total[TILE_TOKENS][VECTORS];
    activations x[TILE_TOKENS];
    UNROLL for (int t = 0; t < n_tokens; t++) {
        x[t] = activations_at(f, m, token + t, 0);
        UNROLL for (int v = 0; v < VECTORS; v++) total[t][v] = vdupq_n_f32(0.0f);
    }
    for (size_t b = 0; b < n_blocks; b += (size_t)f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        f.unpack_groups(panel, &g);
        for (int i = 0; i < f.sub_blocks / f.unrolled; i++) {
            if (ahead) prefetch(panel + (size_t)i * step_bytes + ahead, step_bytes);
            UNROLL for (int j = 0; j < f.unrolled; j++) {
                const uint8_t *unit = panel + (size_t)i * f.stride;
                PHI_OPAQUE_ADDRESS(unit); /* lines are loaded again: kept for the next sub-block, they would spill */
                const line_source s = {.unit = unit, .i = i, .j = j};
                UNROLL for (int v = 0; v < VECTORS; v += n_vectors) {
                    add_block(f, s, &g, i * f.unrolled + j, x, n_tokens, v, n_vectors, total);
                }
            }
        }
        UNROLL for (int t = 0; t < n_tokens; t++) {
            x[t].quants += f.sub_blocks * PHI_Q8_BLOCK;
            x[t].scales += f.sub_blocks;
            x[t].sums += f.sub_blocks * f.groups_per_block;
            x[t].offsets += f.sub_blocks * f.groups_per_block;
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int v = 0; v < VECTORS; v++)
            vst1q_f32(out + (size_t)(token + t) * m->out_stride + 4 * v, total[t][v]);
    }
}

/* 256 columns of a panel, unpacked. */
typedef struct {
    groups g;
    int8x16_t lines[CHUNK_BLOCKS * LINES][VECTORS];
} chunk;

#ifndef PHI_MATRIX_PRODUCTS
PHI_INLINE void rearrange_lines(int8x16_t (*lines)[VECTORS]) { (void)lines; }
PHI_INLINE void add_unpacked_block(const format f, const chunk *c, int b, const activations *x, int n_tokens, int first,
                                   float32x4_t (*total)[VECTORS]) {
    const line_source s = {.unpacked = c->lines + b * LINES};
    add_block(f, s, &c->g, b, x, n_tokens, first, TILE_VECTORS, total);
}
#else
/* Brings the eight lines of a sub-block into the order in which add_unpacked_block reads them. */
PHI_INLINE void rearrange_lines(int8x16_t (*lines)[VECTORS]);
PHI_INLINE void add_unpacked_block(const format f, const chunk *c, int b, const activations *x, int n_tokens, int first,
                                   float32x4_t (*total)[VECTORS]);
#endif

PHI_INLINE void unpack_chunk(const format f, const uint8_t *panel, int n_blocks, size_t l2_bytes, chunk *c) {
    (void)l2_bytes; /* one prefetch, into L1 */
    for (int b = 0; b < n_blocks; b += f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        const int first = b * f.groups_per_block;
        f.unpack_groups(panel, &g);
        for (int i = 0; i < f.sub_blocks * f.groups_per_block; i++) {
            for (int v = 0; v < VECTORS; v++) {
                c->g.scale[first + i][v] = g.scale[i][v];
                if (f.has_min) c->g.min[first + i][v] = g.min[i][v];
            }
        }
        for (int i = 0; i < f.sub_blocks / f.unrolled; i++) {
            UNROLL for (int j = 0; j < f.unrolled; j++) {
                int8x16_t(*lines)[VECTORS] = c->lines + (b + i * f.unrolled + j) * LINES;
                UNROLL for (int line = 0; line < LINES; line++) {
                    for (int v = 0; v < VECTORS; v++)
                        lines[line][v] = f.unpack_line(panel + (size_t)i * f.stride, i, j, line, v);
                }
                rearrange_lines(lines);
            }
        }
    }
}

/* Adds the columns of a chunk, starting at sub-block first_block, to out. Meanwhile prefetches the chunk at `next`,
 * unless NULL. n_tokens is a constant after inlining. */
PHI_INLINE void multiply_chunk(const format f, const chunk *c, size_t first_block, int n_blocks, const phi_matmul *m,
                               int token, int n_tokens, int n_panels, const uint8_t *next, float *out) {
    (void)n_panels; /* always 1 */
    const size_t block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    out += (size_t)token * m->out_stride;
    for (int b = 0; next && b < n_blocks; b++) prefetch(next + (size_t)b * block_bytes, block_bytes);
    activations x[TILE_TOKENS];
    UNROLL for (int t = 0; t < n_tokens; t++) x[t] = activations_at(f, m, token + t, first_block);
    UNROLL for (int first = 0; first < VECTORS; first += TILE_VECTORS) {
        float32x4_t total[TILE_TOKENS][VECTORS];
        UNROLL for (int t = 0; t < n_tokens; t++) {
            UNROLL for (int v = first; v < first + TILE_VECTORS; v++) {
                total[t][v] = first_block ? vld1q_f32(out + (size_t)t * m->out_stride + 4 * v) : vdupq_n_f32(0.0f);
            }
        }
        for (int b = 0; b < n_blocks; b++) add_unpacked_block(f, c, b, x, n_tokens, first, total);
        UNROLL for (int t = 0; t < n_tokens; t++) {
            UNROLL for (int v = first; v < first + TILE_VECTORS; v++) {
                vst1q_f32(out + (size_t)t * m->out_stride + 4 * v, total[t][v]);
            }
        }
    }
}

#include "../generic/packed_products.h"

#define PHI_DEFINE_PACKED(type, bits, n_sub_blocks, unrolled, stride, n_groups, has_min, centre_shift, tier) \
    void phi_matmul_packed_##type##_##tier(const phi_matmul *m) {                                            \
        const format f = {sizeof(phi_panel_##type),                                                          \
                          bits,                                                                              \
                          n_sub_blocks,                                                                      \
                          unrolled,                                                                          \
                          stride,                                                                            \
                          n_groups,                                                                          \
                          has_min,                                                                           \
                          centre_shift,                                                                      \
                          groups_##type,                                                                     \
                          line_##type};                                                                      \
        multiply_packed(f, m);                                                                               \
    }

/* centre_shift: the activations' offsets are -128 times their sums; Q4_0 subtracts 8 = 128 >> 4, Q6_K 32 = 128 >> 2. */
#define PHI_DEFINE_PACKED_PRODUCTS(tier)                                                                \
    PHI_DEFINE_PACKED(q4_0, 4, 1, 1, 0, 1, false, 4, tier)                                              \
    PHI_DEFINE_PACKED(q4_1, 4, 1, 1, 0, 1, true, 8, tier)                                               \
    PHI_DEFINE_PACKED(q8_0, 8, 1, 1, 0, 1, false, 8, tier)                                              \
    PHI_DEFINE_PACKED(q4_k, 4, 8, 2, sizeof(((phi_panel_q4_k *)0)->lines[0]) * LINES, 1, true, 8, tier) \
    PHI_DEFINE_PACKED(q5_k, 5, 8, 2, 0, 1, true, 8, tier)                                               \
    PHI_DEFINE_PACKED(q6_k, 6, 8, 4, sizeof(((phi_panel_q6_k *)0)->halves[0]), 2, false, 2, tier)

#endif
