/* Products of packed rows with int8 activations, 16 rows at a time.
 * Layout: panels of 16 interleaved rows (generic/pack.h): a line is four columns of 16 rows.
 * Idea: the 32 columns of a sub-block are unpacked to eight lines of unsigned bytes. Eight vpdpbusd multiply them by
 * four activations each, broadcast from memory. The sums are converted to float once and multiplied by the scales.
 * Decode and small batches keep the lines in registers, for up to eight tokens per pass. Prefill unpacks 256 columns
 * of four panels into L1 once and multiplies two panels at a time by tiles of six tokens. The order of a token's sum
 * is the same in both.
 * Bound: decode: reading the panel, with prefetches spread out, since bursts stall; prefill: the multipliers, eleven
 * instructions for 512 products. */
#include "avx512.h"

#include <string.h>

#include "panel_units.h"

enum {
    MAX_SMALL_BATCH = 16,        /* tokens whose lines stay in registers; more take the prefill path */
    SMALL_BATCH_TILE_TOKENS = 8, /* tokens per pass over a panel, at most */
    PREFILL_TILE_TOKENS = 6,     /* tokens of a prefill tile, at most */
};

PHI_INLINE __m512i broadcast_4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/* A token's activations in one sub-block. */
typedef struct {
    const int8_t *x;        /* [32] */
    const int32_t *offsets; /* [groups]: -128 * sum of x, for centred types */
    float scale, sum;
} x_block;

/* Sub-block `block` of a token; token 0 is m->first_token. */
PHI_INLINE x_block x_block_of(const format f, const phi_matmul *m, int token, size_t block) {
    const size_t at = (size_t)(m->first_token + token) * (size_t)m->n_cols / PHI_Q8_BLOCK + block;
    const phi_q8 *q8 = &m->x->q8;
    return (x_block){
        .x = q8->quants + at * PHI_Q8_BLOCK,
        .offsets = f.groups_per_block == 1 ? q8->block_offsets + at : q8->offsets + at * 2,
        .scale = q8->scales[at],
        .sum = q8->block_sums[at],
    };
}

/* Initial value of a group's integer dot product. */
PHI_INLINE __m512i begin_dot(const format f, const x_block *x, int group) {
    return f.centred ? _mm512_set1_epi32(x->offsets[group]) : _mm512_setzero_si512();
}

/* Adds a sub-block's scaled dot products to total. dot, scale: [groups]; min: [1], unless the type is centred. */
PHI_INLINE __m512 add_dots(const format f, const x_block *x, const __m512i *dot, const __m512 *scale, const __m512 *min,
                           __m512 total) {
    __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[0]), scale[0]);
    if (f.groups_per_block == 2) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[1]), scale[1], sum);
    total = _mm512_fmadd_ps(sum, _mm512_set1_ps(x->scale), total);
    return f.centred ? total : _mm512_fnmadd_ps(min[0], _mm512_set1_ps(x->sum), total);
}

/* ---- decode and small batch: lines in registers ---- */

/* All columns of one panel for n_tokens tokens from `token` on; n_tokens is a compile-time constant once inlined. */
PHI_INLINE void multiply_small_batch_tile(const format f, const uint8_t *panel, const phi_matmul *m, int token,
                                          int n_tokens, float *out) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_Q8_BLOCK, block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    __m512 total[SMALL_BATCH_TILE_TOKENS];
    for (int t = 0; t < n_tokens; t++) total[t] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b += (size_t)f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        f.unpack_groups(panel, &g);
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            __m512i q[LINES];
            const uint8_t *block_start = panel + (size_t)j * block_bytes;
            prefetch_ahead(&m->prefetch, block_start, block_bytes, j == 0 ? panel + f.unit_bytes : NULL);
            f.unpack_lines(panel, j, q);
            UNROLL for (int t = 0; t < n_tokens; t++) {
                const x_block x = x_block_of(f, m, token + t, b + (size_t)j);
                const int first = j * f.groups_per_block, n_lines = LINES / f.groups_per_block;
                __m512i dot[2];
                UNROLL for (int k = 0; k < f.groups_per_block; k++) {
                    dot[k] = begin_dot(f, &x, k);
                    UNROLL for (int i = k * n_lines; i < (k + 1) * n_lines; i++) {
                        dot[k] = _mm512_dpbusd_epi32(dot[k], q[i], broadcast_4(x.x + 4 * i));
                    }
                }
                total[t] = add_dots(f, &x, dot, g.scale + first, g.min + first, total[t]);
            }
        }
    }
    for (int t = 0; t < n_tokens; t++) _mm512_storeu_ps(out + (size_t)(token + t) * m->out_stride, total[t]);
}

/* The fewest passes over the panel, with the tokens spread evenly over them. */
PHI_INLINE void multiply_small_batch(const format f, const uint8_t *panel, const phi_matmul *m, float *out) {
    const int n_passes = (m->n_tokens + SMALL_BATCH_TILE_TOKENS - 1) / SMALL_BATCH_TILE_TOKENS;
    for (int pass = 0, t = 0; pass < n_passes; pass++) {
        const int n_tokens = (m->n_tokens - t) / (n_passes - pass);
        switch (n_tokens) {
        case 1:
            multiply_small_batch_tile(f, panel, m, t, 1, out);
            break;
        case 2:
            multiply_small_batch_tile(f, panel, m, t, 2, out);
            break;
        case 3:
            multiply_small_batch_tile(f, panel, m, t, 3, out);
            break;
        case 4:
            multiply_small_batch_tile(f, panel, m, t, 4, out);
            break;
        case 5:
            multiply_small_batch_tile(f, panel, m, t, 5, out);
            break;
        case 6:
            multiply_small_batch_tile(f, panel, m, t, 6, out);
            break;
        case 7:
            multiply_small_batch_tile(f, panel, m, t, 7, out);
            break;
        default:
            multiply_small_batch_tile(f, panel, m, t, SMALL_BATCH_TILE_TOKENS, out);
        }
        t += n_tokens;
    }
}

/* ---- prefill: lines unpacked to L1 ---- */

enum {
    PANELS = 4,       /* unpacked at a time; they share activations in L1 */
    TILE_PANELS = 2,  /* of a prefill tile */
    CHUNK_BLOCKS = 8, /* sub-blocks of 32 columns unpacked at a time */
};

/* 256 columns of a panel, unpacked. */
typedef struct {
    __m512i lines[CHUNK_BLOCKS * LINES];
    __m512 scale[2 * CHUNK_BLOCKS], min[CHUNK_BLOCKS];
} chunk;

PHI_INLINE void unpack_chunk(const format f, const uint8_t *panel, int n_blocks, chunk *c) {
    for (int b = 0; b < n_blocks; b += f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        f.unpack_groups(panel, &g);
        for (int i = 0; i < f.sub_blocks * f.groups_per_block; i++) {
            c->scale[b * f.groups_per_block + i] = g.scale[i];
            if (!f.centred) c->min[b + i] = g.min[i];
        }
        UNROLL for (int j = 0; j < f.sub_blocks; j++) f.unpack_lines(panel, j, c->lines + (b + j) * LINES);
    }
}

/* Adds the products of the chunks c [n_panels], which start at sub-block first_block, to out. next: packed bytes of the
 * next chunk in the first panel, to prefetch meanwhile, or NULL. n_tokens and n_panels are compile-time constants once
 * inlined. */
PHI_INLINE void multiply_chunk(const format f, const chunk *c, size_t first_block, int n_blocks, const phi_matmul *m,
                               int token, int n_tokens, int n_panels, const uint8_t *next, float *out) {
    const size_t panel_bytes = PHI_PANEL_ROWS * m->row_bytes, block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    const int n_lines = LINES / f.groups_per_block;
    __m512 total[PREFILL_TILE_TOKENS][TILE_PANELS];
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int p = 0; p < n_panels; p++) {
            const float *sum = out + (size_t)(token + t) * m->out_stride + p * PHI_PANEL_ROWS;
            total[t][p] = first_block ? _mm512_loadu_ps(sum) : _mm512_setzero_ps();
        }
    }
    for (int j = 0; j < n_blocks; j++) {
        const int first = j * f.groups_per_block;
        for (int p = 0; next && p < n_panels; p++)
            prefetch_l1(next + (size_t)p * panel_bytes + (size_t)j * block_bytes, block_bytes);
        x_block x[PREFILL_TILE_TOKENS];
        UNROLL for (int t = 0; t < n_tokens; t++) x[t] = x_block_of(f, m, token + t, first_block + (size_t)j);
        __m512i dot[PREFILL_TILE_TOKENS][TILE_PANELS][2];
        UNROLL for (int k = 0; k < f.groups_per_block; k++) {
            UNROLL for (int t = 0; t < n_tokens; t++) {
                UNROLL for (int p = 0; p < n_panels; p++) dot[t][p][k] = begin_dot(f, &x[t], k);
            }
            UNROLL for (int i = k * n_lines; i < (k + 1) * n_lines; i++) {
                UNROLL for (int t = 0; t < n_tokens; t++) {
                    const __m512i four = broadcast_4(x[t].x + 4 * i);
                    UNROLL for (int p = 0; p < n_panels; p++) {
                        dot[t][p][k] = _mm512_dpbusd_epi32(dot[t][p][k], c[p].lines[j * LINES + i], four);
                    }
                }
            }
        }
        UNROLL for (int t = 0; t < n_tokens; t++) {
            UNROLL for (int p = 0; p < n_panels; p++) {
                total[t][p] = add_dots(f, &x[t], dot[t][p], c[p].scale + first, c[p].min + j, total[t][p]);
            }
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int p = 0; p < n_panels; p++) {
            _mm512_storeu_ps(out + (size_t)(token + t) * m->out_stride + p * PHI_PANEL_ROWS, total[t][p]);
        }
    }
}

/* Tokens of the next tile, given those left. */
PHI_INLINE int prefill_tile_tokens(const format f, int left) {
    const bool has_room = f.groups_per_block == 1; /* in registers: a second group doubles the sums */
    if (has_room && left >= PREFILL_TILE_TOKENS && left != 8) return PREFILL_TILE_TOKENS; /* 8 tokens: two tiles of 4 */
    return left >= 4 ? 4 : 1;
}

#include "../generic/packed_prefill.h"

PHI_INLINE void matmul(const format f, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows;) {
        const uint8_t *panel = m->rows + (size_t)r * m->row_bytes;
        float *out = m->out + r;
        if (m->n_tokens > MAX_SMALL_BATCH || m->n_tokens > m->max_small_batch) {
            const int n_panels = panels_from(m, r);
            multiply_prefill(f, panel, m, n_panels, out);
            r += n_panels * PHI_PANEL_ROWS;
            continue;
        }
        multiply_small_batch(f, panel, m, out);
        r += PHI_PANEL_ROWS;
    }
}

#define PHI_DEFINE(UPPER, type) \
    void phi_matmul_packed_##type##_avx512(const phi_matmul *m) { matmul(PHI_FORMAT_##type, m); }
PHI_PACKED_TYPES(PHI_DEFINE)
