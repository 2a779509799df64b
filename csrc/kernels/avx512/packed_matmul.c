/* Products of packed rows with int8 activations, 16 rows at a time.
 * Layout: panels of 16 interleaved rows (kernels/generic/pack.h): a line is four columns of 16 rows.
 * Idea: the 32 columns of a sub-block become eight lines of unsigned bytes; eight vpdpbusd with four activations
 * broadcast from memory, one conversion, one product with the scales of the 16 rows. A few tokens take the lines from
 * registers; for many, 256 columns of two panels are unpacked to the first-level cache once, and six tokens at a time
 * pass over them. A token's sum is built in the same order either way.
 * Bound: few: reading the panel, asked for evenly where asking pays, since bursts stall; many: eleven vector
 * instructions for 512 products. */
#include "avx512.h"

#include <string.h>

#include "panel_units.h"

enum { FEW_TOKENS = 3, MANY_TOKENS = 6 };

INLINE __m512i broadcast_4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/* What the tokens from `token` on give to a product. */
typedef struct {
    const int8_t *x;     /* [n_tokens, n_cols] */
    const float *scales; /* [n_tokens, n_cols / 32] */
    const float *sums;   /* [n_tokens, n_cols / 32 * groups per block] */
    size_t n_cols, n_blocks, n_sums;
} tokens;

INLINE tokens tokens_from(const format f, const phi_matmul *m, int token) {
    const size_t n = (size_t)m->n_cols, first = (size_t)(m->first_token + token) * n, n_blocks = n / PHI_Q8_BLOCK;
    return (tokens){
        .x = m->x->q8 + first,
        .scales = m->x->scales + first / PHI_Q8_BLOCK,
        .sums = f.groups_per_block == 1 ? m->x->block_sums + first / PHI_Q8_BLOCK : m->x->sums + first / PHI_SUM_BLOCK,
        .n_cols = n,
        .n_blocks = n_blocks,
        .n_sums = n_blocks * (size_t)f.groups_per_block,
    };
}

INLINE __m512 accumulate(__m512 total, __m512i dot, __m512 scale, __m512 x_scale, __m512 min, __m512 x_sum) {
    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, x_scale), total);
    return _mm512_fnmadd_ps(min, x_sum, total);
}

/* ---- few tokens: straight from the panel ---- */

/* n_tokens is a constant where this is inlined. */
INLINE void multiply_few(const format f, const uint8_t *panel, const phi_matmul *m, int token, int n_tokens,
                         float *out) {
    const tokens a = tokens_from(f, m, token);
    __m512 total[FEW_TOKENS];
    for (int t = 0; t < n_tokens; t++) total[t] = _mm512_setzero_ps();
    for (size_t b = 0; b < a.n_blocks; b += (size_t)f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        f.unpack_groups(panel, &g);
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            const size_t block = b + (size_t)j, part = f.unit_bytes / (size_t)f.sub_blocks;
            __m512i q[LINES];
            if (m->prefetch_bytes) prefetch(panel + m->prefetch_bytes + (size_t)j * part, part);
            f.unpack_lines(panel, j, q);
            UNROLL for (int t = 0; t < n_tokens; t++) {
                const int8_t *x = a.x + (size_t)t * a.n_cols + block * PHI_Q8_BLOCK;
                const __m512 x_scale = _mm512_set1_ps(a.scales[(size_t)t * a.n_blocks + block]);
                const float *sums = a.sums + (size_t)t * a.n_sums + block * (size_t)f.groups_per_block;
                UNROLL for (int k = 0; k < f.groups_per_block; k++) {
                    const int group = j * f.groups_per_block + k, n_lines = LINES / f.groups_per_block;
                    __m512i dot = _mm512_setzero_si512();
                    UNROLL for (int i = k * n_lines; i < (k + 1) * n_lines; i++) {
                        dot = _mm512_dpbusd_epi32(dot, q[i], broadcast_4(x + 4 * i));
                    }
                    total[t] =
                        accumulate(total[t], dot, g.scale[group], x_scale, g.min[group], _mm512_set1_ps(sums[k]));
                }
            }
        }
    }
    for (int t = 0; t < n_tokens; t++) _mm512_storeu_ps(out + (size_t)(token + t) * m->out_stride, total[t]);
}

/* ---- many tokens: from unpacked lines ---- */

enum { PANELS = 2, CHUNK_BLOCKS = 8 /* sub-blocks of 32 columns unpacked at a time */ };

typedef struct {
    __m512i lines[CHUNK_BLOCKS * LINES];
    __m512 scale[2 * CHUNK_BLOCKS], min[2 * CHUNK_BLOCKS];
} chunk;

INLINE void unpack_chunk(const format f, const uint8_t *panel, int n_blocks, chunk *c) {
    for (int b = 0; b < n_blocks; b += f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        f.unpack_groups(panel, &g);
        for (int i = 0; i < f.sub_blocks * f.groups_per_block; i++) {
            c->scale[b * f.groups_per_block + i] = g.scale[i];
            c->min[b * f.groups_per_block + i] = g.min[i];
        }
        UNROLL for (int j = 0; j < f.sub_blocks; j++) f.unpack_lines(panel, j, c->lines + (b + j) * LINES);
    }
}

/* Adds a chunk's columns, from sub-block first_block on, to out, while the chunk after it comes from memory: `next`, in
 * each panel, NULL when it was fetched before. n_tokens and n_panels are constants where this is inlined. */
INLINE void multiply_chunk(const format f, const chunk *c, size_t first_block, int n_blocks, const phi_matmul *m,
                           int token, int n_tokens, int n_panels, const uint8_t *next, float *out) {
    const tokens a = tokens_from(f, m, token);
    __m512 total[MANY_TOKENS][PANELS];
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int p = 0; p < n_panels; p++) {
            const float *sum = out + (size_t)(token + t) * m->out_stride + p * PHI_PANEL_ROWS;
            total[t][p] = first_block ? _mm512_loadu_ps(sum) : _mm512_setzero_ps();
        }
    }
    const size_t panel_bytes = PHI_PANEL_ROWS * m->row_bytes, block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    for (int j = 0; j < n_blocks; j++) {
        const size_t block = first_block + (size_t)j;
        for (int p = 0; next && p < n_panels; p++)
            prefetch(next + (size_t)p * panel_bytes + (size_t)j * block_bytes, block_bytes);
        UNROLL for (int k = 0; k < f.groups_per_block; k++) {
            const int group = j * f.groups_per_block + k, n_lines = LINES / f.groups_per_block;
            __m512i dot[MANY_TOKENS][PANELS];
            UNROLL for (int t = 0; t < n_tokens; t++) {
                UNROLL for (int p = 0; p < n_panels; p++) dot[t][p] = _mm512_setzero_si512();
            }
            UNROLL for (int i = k * n_lines; i < (k + 1) * n_lines; i++) {
                UNROLL for (int t = 0; t < n_tokens; t++) {
                    const __m512i x = broadcast_4(a.x + (size_t)t * a.n_cols + block * PHI_Q8_BLOCK + 4 * i);
                    UNROLL for (int p = 0; p < n_panels; p++) {
                        dot[t][p] = _mm512_dpbusd_epi32(dot[t][p], c[p].lines[j * LINES + i], x);
                    }
                }
            }
            UNROLL for (int t = 0; t < n_tokens; t++) {
                const __m512 x_scale = _mm512_set1_ps(a.scales[(size_t)t * a.n_blocks + block]);
                const __m512 x_sum =
                    _mm512_set1_ps(a.sums[(size_t)t * a.n_sums + block * (size_t)f.groups_per_block + (size_t)k]);
                UNROLL for (int p = 0; p < n_panels; p++) {
                    total[t][p] =
                        accumulate(total[t][p], dot[t][p], c[p].scale[group], x_scale, c[p].min[group], x_sum);
                }
            }
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) {
        UNROLL for (int p = 0; p < n_panels; p++) {
            _mm512_storeu_ps(out + (size_t)(token + t) * m->out_stride + p * PHI_PANEL_ROWS, total[t][p]);
        }
    }
}

INLINE void multiply_many(const format f, const uint8_t *panel, const phi_matmul *m, int n_panels, float *out) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_Q8_BLOCK, panel_bytes = PHI_PANEL_ROWS * m->row_bytes;
    for (size_t b = 0; b < n_blocks; b += CHUNK_BLOCKS) {
        const int n = n_blocks - b < CHUNK_BLOCKS ? (int)(n_blocks - b) : CHUNK_BLOCKS;
        const uint8_t *part = panel + b / (size_t)f.sub_blocks * f.unit_bytes;
        const bool last = b + CHUNK_BLOCKS >= n_blocks;
        const uint8_t *next =
            last ? panel + (size_t)n_panels * panel_bytes : part + (size_t)(CHUNK_BLOCKS / f.sub_blocks) * f.unit_bytes;
        chunk c[PANELS];
        for (int p = 0; p < n_panels; p++) unpack_chunk(f, part + (size_t)p * panel_bytes, n, &c[p]);
        for (int t = 0, left; (left = m->n_tokens - t) > 0; next = NULL) {
            if (left >= MANY_TOKENS && left != 8) { /* 8 is better cut in halves */
                multiply_chunk(f, c, b, n, m, t, MANY_TOKENS, n_panels, next, out);
                t += MANY_TOKENS;
            } else if (left >= 4) {
                multiply_chunk(f, c, b, n, m, t, 4, n_panels, next, out);
                t += 4;
            } else {
                multiply_chunk(f, c, b, n, m, t, 1, n_panels, next, out);
                t += 1;
            }
        }
    }
}

INLINE void matmul(const format f, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows;) {
        const uint8_t *panel = m->rows + (size_t)r * m->row_bytes;
        float *out = m->out + r;
        if (m->n_tokens > FEW_TOKENS) {
            const int n_panels = r + PANELS * PHI_PANEL_ROWS <= m->n_rows ? PANELS : 1;
            if (n_panels == PANELS)
                multiply_many(f, panel, m, PANELS, out);
            else
                multiply_many(f, panel, m, 1, out);
            r += n_panels * PHI_PANEL_ROWS;
            continue;
        }
        switch (m->n_tokens) {
        case 1:
            multiply_few(f, panel, m, 0, 1, out);
            break;
        case 2:
            multiply_few(f, panel, m, 0, 2, out);
            break;
        default:
            multiply_few(f, panel, m, 0, 3, out);
            break;
        }
        r += PHI_PANEL_ROWS;
    }
}

#define PHI_DEFINE(type) \
    void phi_matmul_packed_##type##_avx512(const phi_matmul *m) { matmul(PHI_FORMAT_##type, m); }
PHI_DEFINE(q4_0)
PHI_DEFINE(q4_1)
PHI_DEFINE(q8_0)
PHI_DEFINE(q4_k)
PHI_DEFINE(q5_k)
PHI_DEFINE(q6_k)
