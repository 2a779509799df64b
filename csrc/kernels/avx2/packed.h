/* Products of packed rows with int8 activations in 256-bit registers, shared by the AVX2 and AVX-VNNI tiers.
 * Layout: panels of 16 interleaved rows (generic/pack.h): a line is four columns of 16 rows, two halves of 8 rows.
 * Idea: the 32 columns of a sub-block are unpacked to eight lines of unsigned bytes, multiplied by four activations
 * broadcast from memory. The integer sums of a group are converted to float once and scaled. Decode and small batches
 * unpack the lines straight from the panel into registers, once for each tile of tokens. Prefill unpacks 256 columns of
 * two panels into L1 once for all tiles. The order of a token's sum is the same in both.
 * The including file defines phi_add_products, which adds a line's products to integer sums; phi_lines_per_sum(bits),
 * how many lines these can hold; phi_to_int32, which widens them; and PHI_SIGNED_BYTES, whether 8-bit quants stay
 * signed (1) or are offset by 128 (0).
 * Bound: decode: reading the panel, with prefetch; prefill: the multiplications, see the including file. */
#ifndef PHI_AVX2_PACKED_H
#define PHI_AVX2_PACKED_H

#include "../generic/pack.h"
#include "../x86/prefetch.h"
#include "simd.h"

/* Keeps sums in program order: compilers rebalance them into trees and run out of registers. */
#ifdef __GNUC__
#define KEEP_IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define KEEP_IN_REGISTER(v) (void)(v)
#endif

enum {
    TILE_TOKENS = 4, /* multiplied at a time, at most: their integer sums stay in registers */
    HALVES = 2,      /* vectors of a line */
    LINES = 8,       /* of a sub-block */
    MAX_GROUPS = 16, /* of a unit */
};

/* Scales and minima of a unit's groups of columns, each for 16 rows: w = scale * q - min. */
typedef struct {
    __m256 scale[MAX_GROUPS][HALVES], min[MAX_GROUPS][HALVES];
} groups;

/* Traits of a weight type; compile-time constants once inlined. */
typedef struct {
    size_t unit_bytes;
    int bits;             /* of a quant */
    int sub_blocks;       /* of 32 columns in a unit */
    int groups_per_block; /* scales per sub-block: 1 or 2 */
    void (*unpack_groups)(const void *unit, groups *g);
    __m256i (*unpack_line)(const void *unit, int sub_block, int line, int half);
} format;

PHI_INLINE __m256i half_line(const uint8_t *line, int half) { return phi_load(line + 32 * half); }
PHI_INLINE __m128i load_8_bytes(const void *bytes) { return _mm_loadl_epi64((const __m128i *)bytes); }
PHI_INLINE __m256 from_8_u8(const uint8_t *bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_8_bytes(bytes)));
}
PHI_INLINE __m256 from_8_i8(const int8_t *bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8_bytes(bytes)));
}
PHI_INLINE __m256i nibbles_of(const uint8_t *line, int half, int high) {
    const __m256i q = half_line(line, half);
    return _mm256_and_si256(high ? _mm256_srli_epi16(q, 4) : q, _mm256_set1_epi8(15));
}

/* ---- blocks of 32 ---- */

PHI_INLINE void groups_q4_0(const void *unit, groups *g) {
    const phi_panel_q4_0 *u = unit;
    for (int h = 0; h < HALVES; h++) {
        g->scale[0][h] = phi_load_half(u->d + 8 * h);
        g->min[0][h] = _mm256_mul_ps(g->scale[0][h], _mm256_set1_ps(8.0f));
    }
}
PHI_INLINE __m256i line_q4_0(const void *unit, int sub_block, int line, int half) {
    (void)sub_block;
    return nibbles_of(((const phi_panel_q4_0 *)unit)->lines[line % 4], half, line / 4);
}

PHI_INLINE void groups_q4_1(const void *unit, groups *g) {
    const phi_panel_q4_1 *u = unit;
    for (int h = 0; h < HALVES; h++) {
        g->scale[0][h] = phi_load_half(u->d + 8 * h);
        g->min[0][h] = _mm256_sub_ps(_mm256_setzero_ps(), phi_load_half(u->m + 8 * h));
    }
}
PHI_INLINE __m256i line_q4_1(const void *unit, int sub_block, int line, int half) {
    (void)sub_block;
    return nibbles_of(((const phi_panel_q4_1 *)unit)->lines[line % 4], half, line / 4);
}

PHI_INLINE void groups_q8_0(const void *unit, groups *g) {
    const phi_panel_q8_0 *u = unit;
    for (int h = 0; h < HALVES; h++) {
        g->scale[0][h] = phi_load_half(u->d + 8 * h);
        g->min[0][h] = PHI_SIGNED_BYTES ? _mm256_setzero_ps() : _mm256_mul_ps(g->scale[0][h], _mm256_set1_ps(128.0f));
    }
}
PHI_INLINE __m256i line_q8_0(const void *unit, int sub_block, int line, int half) {
    const __m256i q = half_line(((const phi_panel_q8_0 *)unit)->lines[line], half);
    (void)sub_block;
    return PHI_SIGNED_BYTES ? q : _mm256_xor_si256(q, _mm256_set1_epi8(-128));
}

/* ---- blocks of 256 ---- */

/* The 6-bit scales and minima of Q4_K and Q5_K (see phi_unpack_scales_k4), for 16 rows and two sub-blocks at a time. */
PHI_INLINE void groups_k4(const uint8_t (*packed)[16], const uint16_t *d, const uint16_t *dmin, groups *g) {
    const __m256i low4 = _mm256_set1_epi8(15), low6 = _mm256_set1_epi8(63), bits45 = _mm256_set1_epi8(48);
    uint8_t scales[8][16], mins[8][16];
    UNROLL for (int j = 0; j < 4; j += 2) {
        const __m256i a = phi_load(packed[j]), b = phi_load(packed[j + 4]), c = phi_load(packed[j + 8]);
        phi_store(scales[j], _mm256_and_si256(a, low6));
        phi_store(mins[j], _mm256_and_si256(b, low6));
        phi_store(scales[j + 4],
                  _mm256_or_si256(_mm256_and_si256(c, low4), _mm256_and_si256(_mm256_srli_epi16(a, 2), bits45)));
        phi_store(mins[j + 4], _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(c, 4), low4),
                                               _mm256_and_si256(_mm256_srli_epi16(b, 2), bits45)));
    }
    UNROLL for (int h = 0; h < HALVES; h++) {
        const __m256 d8 = phi_load_half(d + 8 * h), dmin8 = phi_load_half(dmin + 8 * h);
        UNROLL for (int j = 0; j < 8; j++) {
            g->scale[j][h] = _mm256_mul_ps(d8, from_8_u8(scales[j] + 8 * h));
            g->min[j][h] = _mm256_mul_ps(dmin8, from_8_u8(mins[j] + 8 * h));
        }
    }
}

/* A pair of sub-blocks shares eight lines: the even one has the low nibbles, the odd one the high nibbles. */
PHI_INLINE void groups_q4_k(const void *unit, groups *g) {
    const phi_panel_q4_k *u = unit;
    groups_k4(u->scales, u->d, u->dmin, g);
}
PHI_INLINE __m256i line_q4_k(const void *unit, int sub_block, int line, int half) {
    const phi_panel_q4_k *u = unit;
    return nibbles_of(u->lines[sub_block / 2 * 8 + line], half, sub_block % 2);
}

PHI_INLINE void groups_q5_k(const void *unit, groups *g) {
    const phi_panel_q5_k *u = unit;
    groups_k4(u->scales, u->d, u->dmin, g);
}
PHI_INLINE __m256i line_q5_k(const void *unit, int sub_block, int line, int half) {
    const phi_panel_q5_k *u = unit;
    const __m256i high = half_line(u->first[line].high, half);
    const __m256i fifth =
        sub_block < 4 ? _mm256_slli_epi16(high, 4 - sub_block) : _mm256_srli_epi16(high, sub_block - 4);
    return _mm256_or_si256(nibbles_of(phi_panel_q5_k_line(u, sub_block / 2 * 8 + line), half, sub_block % 2),
                           _mm256_and_si256(fifth, _mm256_set1_epi8(16)));
}

PHI_INLINE void groups_q6_k(const void *unit, groups *g) {
    const phi_panel_q6_k *u = unit;
    for (int h = 0; h < HALVES; h++) {
        const __m256 d = phi_load_half(u->d + 8 * h);
        for (int i = 0; i < 16; i++) {
            g->scale[i][h] = _mm256_mul_ps(d, from_8_i8(u->scales[i] + 8 * h));
            g->min[i][h] = _mm256_mul_ps(g->scale[i][h], _mm256_set1_ps(32.0f));
        }
    }
}
PHI_INLINE __m256i line_q6_k(const void *unit, int sub_block, int line, int half) {
    const phi_panel_q6_k *u = unit;
    const int part = sub_block / 4, quarter = sub_block % 4;
    const __m256i high = half_line(u->halves[part].first[line].high, half);
    const uint8_t *low = quarter % 2 ? u->halves[part].second[line] : u->halves[part].first[line].low;
    const __m256i top =
        quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter) : _mm256_srli_epi16(high, 2 * quarter - 4);
    return _mm256_or_si256(nibbles_of(low, half, quarter / 2), _mm256_and_si256(top, _mm256_set1_epi8(48)));
}

/* ---- products ---- */

enum {
    PANELS = 2,       /* unpacked at a time for prefill */
    TILE_PANELS = 1,  /* of a prefill tile */
    CHUNK_BLOCKS = 8, /* sub-blocks of 32 columns unpacked at a time */
};

/* 256 columns of a panel, unpacked. */
typedef struct {
    __m256i lines[CHUNK_BLOCKS * LINES][HALVES];
    groups g;
} chunk;

/* The activations from one token on. */
typedef struct {
    const int8_t *x;                 /* [n_tokens, n_cols] */
    const float *scales;             /* [n_tokens, n_cols / 32] */
    const float *sums;               /* [n_tokens, n_cols / 32 * groups per block] */
    size_t n_cols, n_blocks, n_sums; /* row strides */
} activations;

PHI_INLINE activations activations_from(const format f, const phi_matmul *m, int token) {
    const size_t n = (size_t)m->n_cols, n_blocks = n / PHI_Q8_BLOCK;
    const phi_q8 x = phi_q8_at(m->x->q8, (size_t)(m->first_token + token) * n);
    return (activations){
        .x = x.quants,
        .scales = x.scales,
        .sums = f.groups_per_block == 1 ? x.block_sums : x.sums,
        .n_cols = n,
        .n_blocks = n_blocks,
        .n_sums = n_blocks * (size_t)f.groups_per_block,
    };
}

PHI_INLINE __m256i broadcast_4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

/* total += products of sub-block j of a packed unit, or of unpacked lines if not NULL, with sub-block `block` of the
 * activations. n_tokens is a compile-time constant once inlined. */
PHI_INLINE void add_block(const format f, const void *unit, const __m256i (*lines)[HALVES], const groups *g, int j,
                          const activations *a, size_t block, int n_tokens, __m256 (*total)[HALVES]) {
    const int group_lines = LINES / f.groups_per_block;
    const int sum_lines = phi_lines_per_sum(f.bits) < group_lines ? phi_lines_per_sum(f.bits) : group_lines;
    UNROLL for (int k = 0; k < f.groups_per_block; k++) {
        const int group = j * f.groups_per_block + k;
        __m256i dot[TILE_TOKENS][HALVES];
        UNROLL for (int first = k * group_lines; first < (k + 1) * group_lines; first += sum_lines) {
            __m256i sum[TILE_TOKENS][HALVES];
            UNROLL for (int i = first; i < first + sum_lines; i++) {
                __m256i q[HALVES];
                UNROLL for (int h = 0; h < HALVES; h++) {
                    q[h] = lines ? lines[j * LINES + i][h] : f.unpack_line(unit, j, i, h);
                }
                UNROLL for (int t = 0; t < n_tokens; t++) {
                    const __m256i x = broadcast_4(a->x + (size_t)t * a->n_cols + block * PHI_Q8_BLOCK + 4 * i);
                    UNROLL for (int h = 0; h < HALVES; h++) {
                        sum[t][h] = phi_add_products(f.bits, q[h], x, i == first ? NULL : &sum[t][h]);
                        KEEP_IN_REGISTER(sum[t][h]);
                    }
                }
            }
            UNROLL for (int t = 0; t < n_tokens; t++) {
                UNROLL for (int h = 0; h < HALVES; h++) {
                    const __m256i dwords = phi_to_int32(sum[t][h]);
                    dot[t][h] = first == k * group_lines ? dwords : _mm256_add_epi32(dot[t][h], dwords);
                    KEEP_IN_REGISTER(dot[t][h]);
                }
            }
        }
        UNROLL for (int t = 0; t < n_tokens; t++) {
            const __m256 x_scale = _mm256_set1_ps(a->scales[(size_t)t * a->n_blocks + block]);
            const __m256 x_sum =
                _mm256_set1_ps(a->sums[(size_t)t * a->n_sums + block * (size_t)f.groups_per_block + (size_t)k]);
            UNROLL for (int h = 0; h < HALVES; h++) {
                total[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t][h]), _mm256_mul_ps(g->scale[group][h], x_scale),
                                              total[t][h]);
                total[t][h] = _mm256_fnmadd_ps(g->min[group][h], x_sum, total[t][h]);
            }
        }
    }
}

/* Tokens up to which unpacking lines anew for every tile costs less than storing them. Lines of 5 and 6 bits take most
 * instructions. */
PHI_INLINE int max_small_batch(const format f) {
    return f.bits == 5 || f.bits == 6 ? TILE_TOKENS : 2 * TILE_TOKENS - 1;
}

/* All columns of one panel for n_tokens tokens, a compile-time constant once inlined, from `token` on. */
PHI_INLINE void multiply_small_tile(const format f, const uint8_t *panel, const phi_matmul *m, int token, int n_tokens,
                                    float *out) {
    const activations a = activations_from(f, m, token);
    const size_t block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    __m256 total[TILE_TOKENS][HALVES];
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int h = 0; h < HALVES; h++) total[t][h] = _mm256_setzero_ps();
    }
    for (size_t b = 0; b < a.n_blocks; b += (size_t)f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        f.unpack_groups(panel, &g);
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            const uint8_t *block_start = panel + (size_t)j * block_bytes;
            prefetch_ahead(&m->prefetch, block_start, block_bytes, j == 0 ? panel + f.unit_bytes : NULL);
            if (f.sub_blocks > 1) RELOAD(); /* lines kept for the next sub-block would be spilled */
            add_block(f, panel, NULL, &g, j, &a, b + (size_t)j, n_tokens, total);
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) {
        float *row = out + (size_t)(token + t) * m->out_stride;
        UNROLL for (int h = 0; h < HALVES; h++) _mm256_storeu_ps(row + 8 * h, total[t][h]);
    }
}

/* l2_bytes: distance of a prefetch into L2, or 0. The prefetch of the next chunk into L1 comes too late alone for lines
 * of 5 bits and more. */
PHI_INLINE void unpack_chunk(const format f, const uint8_t *panel, int n_blocks, size_t l2_bytes, chunk *c) {
    for (int b = 0; b < n_blocks; b += f.sub_blocks, panel += f.unit_bytes) {
        if (l2_bytes && f.bits > 4) prefetch_l2(panel + l2_bytes, f.unit_bytes);
        groups g;
        f.unpack_groups(panel, &g);
        for (int i = 0; i < f.sub_blocks * f.groups_per_block; i++) {
            for (int h = 0; h < HALVES; h++) {
                c->g.scale[b * f.groups_per_block + i][h] = g.scale[i][h];
                c->g.min[b * f.groups_per_block + i][h] = g.min[i][h];
            }
        }
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            UNROLL for (int i = 0; i < LINES; i++) {
                for (int h = 0; h < HALVES; h++) c->lines[(b + j) * LINES + i][h] = f.unpack_line(panel, j, i, h);
            }
        }
    }
}

/* Adds the products of a chunk, which starts at sub-block first_block, to out. next: packed bytes of the next chunk to
 * prefetch meanwhile, or NULL. */
PHI_INLINE void multiply_chunk(const format f, const chunk *c, size_t first_block, int n_blocks, const phi_matmul *m,
                               int token, int n_tokens, int n_panels, const uint8_t *next, float *out) {
    (void)n_panels; /* always 1 */
    const activations a = activations_from(f, m, token);
    const size_t block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    __m256 total[TILE_TOKENS][HALVES];
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int h = 0; h < HALVES; h++) {
            const float *sum = out + (size_t)(token + t) * m->out_stride + 8 * h;
            total[t][h] = first_block ? _mm256_loadu_ps(sum) : _mm256_setzero_ps();
        }
    }
    for (int j = 0; j < n_blocks; j++) {
        if (next) prefetch_l1(next + (size_t)j * block_bytes, block_bytes);
        add_block(f, NULL, c->lines, &c->g, j, &a, first_block + (size_t)j, n_tokens, total);
    }
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int h = 0; h < HALVES; h++) {
            _mm256_storeu_ps(out + (size_t)(token + t) * m->out_stride + 8 * h, total[t][h]);
        }
    }
}

#include "../generic/packed_products.h"

/* X(type, bits, sub-blocks per unit, groups per sub-block) */
#define PHI_PACKED_FORMATS(X) \
    X(q4_0, 4, 1, 1)          \
    X(q4_1, 4, 1, 1)          \
    X(q8_0, 8, 1, 1)          \
    X(q4_k, 4, 8, 1)          \
    X(q5_k, 5, 8, 1)          \
    X(q6_k, 6, 8, 2)

#define PHI_FORMAT(type, bits, n_sub_blocks, n_groups) \
    ((format){sizeof(phi_panel_##type), bits, n_sub_blocks, n_groups, groups_##type, line_##type})

#endif
