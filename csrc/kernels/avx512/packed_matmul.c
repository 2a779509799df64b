/* Products of packed rows with int8 activations, 16 rows at a time.
 * Layout: panels of 16 interleaved rows (kernels/generic/pack.h): a line is four columns of 16 rows.
 * Idea: the 32 columns of a sub-block become eight lines of unsigned bytes; eight vpdpbusd with four activations
 * broadcast from memory, one conversion, one product with the scales of the 16 rows. Few tokens, up to eight in a pass,
 * take the lines from registers; for many, 256 columns of four panels are unpacked to the first-level cache once, and
 * six tokens at a time pass over two by two. A token's sum is built in the same order either way. Bound: few: reading
 * the panel, asked for evenly where asking pays, since bursts stall; many: the multipliers, eleven instructions for 512
 * products. */
#include "avx512.h"

#include <string.h>

#include "panel_units.h"

enum {
    FEW_TOKENS = 16, /* take the lines from registers, FEW_AT_A_TIME in a pass */
    FEW_AT_A_TIME = 8,
    MANY_AT_A_TIME = 6,
};

INLINE __m512i broadcast_4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/* A sub-block of a token: what it gives to products with 16 rows. */
typedef struct {
    const int8_t *x;        /* [32] */
    const int32_t *offsets; /* [groups], for centred types */
    float scale, sum;
} x_block;

/* Sub-block `block` of a token; the token is counted from the product's first. */
INLINE x_block x_block_of(const format f, const phi_matmul *m, int token, size_t block) {
    const size_t at = (size_t)(m->first_token + token) * (size_t)m->n_cols / PHI_Q8_BLOCK + block;
    const phi_q8 *q8 = &m->x->q8;
    return (x_block){
        .x = q8->quants + at * PHI_Q8_BLOCK,
        .offsets = f.groups_per_block == 1 ? q8->block_offsets + at : q8->offsets + at * 2,
        .scale = q8->scales[at],
        .sum = q8->block_sums[at],
    };
}

/* What an integer product with a group of a sub-block begins with. */
INLINE __m512i begin_dot(const format f, const x_block *x, int group) {
    return f.centred ? _mm512_set1_epi32(x->offsets[group]) : _mm512_setzero_si512();
}

/* total += the sub-block's products; dot, scale [groups], min for types that are not centred. */
INLINE __m512 add_dots(const format f, const x_block *x, const __m512i *dot, const __m512 *scale, const __m512 *min,
                       __m512 total) {
    __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[0]), scale[0]);
    if (f.groups_per_block == 2) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[1]), scale[1], sum);
    total = _mm512_fmadd_ps(sum, _mm512_set1_ps(x->scale), total);
    return f.centred ? total : _mm512_fnmadd_ps(min[0], _mm512_set1_ps(x->sum), total);
}

/* ---- few tokens: straight from the panel ---- */

/* n_tokens is a constant where this is inlined. */
INLINE void multiply_few(const format f, const uint8_t *panel, const phi_matmul *m, int token, int n_tokens,
                         float *out) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_Q8_BLOCK, part = f.unit_bytes / (size_t)f.sub_blocks;
    __m512 total[FEW_AT_A_TIME];
    for (int t = 0; t < n_tokens; t++) total[t] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b += (size_t)f.sub_blocks, panel += f.unit_bytes) {
        groups g;
        if (n_tokens == 1) prefetch_next_page(panel + f.unit_bytes);
        f.unpack_groups(panel, &g);
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            __m512i q[LINES];
            const uint8_t *here = panel + (size_t)j * part;
            if (m->prefetch.l1_bytes) prefetch_l1(here + m->prefetch.l1_bytes, part);
            const size_t l2_bytes = n_tokens == 1 ? m->prefetch.decode_l2_bytes : m->prefetch.l2_bytes;
            if (l2_bytes) prefetch_l2(here + l2_bytes, part);
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

/* In as few passes as there can be, of about as many tokens each. */
INLINE void multiply_panel(const format f, const uint8_t *panel, const phi_matmul *m, float *out) {
    const int n_passes = (m->n_tokens + FEW_AT_A_TIME - 1) / FEW_AT_A_TIME;
    for (int pass = 0, t = 0; pass < n_passes; pass++) {
        const int n_tokens = (m->n_tokens - t) / (n_passes - pass);
        switch (n_tokens) {
        case 1:
            multiply_few(f, panel, m, t, 1, out);
            break;
        case 2:
            multiply_few(f, panel, m, t, 2, out);
            break;
        case 3:
            multiply_few(f, panel, m, t, 3, out);
            break;
        case 4:
            multiply_few(f, panel, m, t, 4, out);
            break;
        case 5:
            multiply_few(f, panel, m, t, 5, out);
            break;
        case 6:
            multiply_few(f, panel, m, t, 6, out);
            break;
        case 7:
            multiply_few(f, panel, m, t, 7, out);
            break;
        default:
            multiply_few(f, panel, m, t, FEW_AT_A_TIME, out);
        }
        t += n_tokens;
    }
}

/* ---- many tokens: from unpacked lines ---- */

enum {
    PANELS = 4,      /* unpacked at a time, so that all take the activations from the first-level cache */
    PAIR = 2,        /* multiplied at a time */
    CHUNK_BLOCKS = 8 /* sub-blocks of 32 columns unpacked at a time */
};

typedef struct {
    __m512i lines[CHUNK_BLOCKS * LINES];
    __m512 scale[2 * CHUNK_BLOCKS], min[CHUNK_BLOCKS];
} chunk;

INLINE void unpack_chunk(const format f, const uint8_t *panel, int n_blocks, chunk *c) {
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

/* Adds a chunk's columns, from sub-block first_block on, to out, while the chunk after it comes from memory: `next`, in
 * each panel, NULL when it was fetched before. n_tokens and n_panels are constants where this is inlined. */
INLINE void multiply_chunk(const format f, const chunk *c, size_t first_block, int n_blocks, const phi_matmul *m,
                           int token, int n_tokens, int n_panels, const uint8_t *next, float *out) {
    const size_t panel_bytes = PHI_PANEL_ROWS * m->row_bytes, block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    const int n_lines = LINES / f.groups_per_block;
    __m512 total[MANY_AT_A_TIME][PAIR];
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
        x_block x[MANY_AT_A_TIME];
        UNROLL for (int t = 0; t < n_tokens; t++) x[t] = x_block_of(f, m, token + t, first_block + (size_t)j);
        __m512i dot[MANY_AT_A_TIME][PAIR][2];
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

/* n_panels is a constant where this is inlined. */
INLINE void multiply_tokens(const format f, const chunk *c, size_t first_block, int n_blocks, const phi_matmul *m,
                            int token, int n_tokens, int n_panels, const uint8_t *next, float *out) {
    switch (n_tokens) {
    case MANY_AT_A_TIME:
        multiply_chunk(f, c, first_block, n_blocks, m, token, MANY_AT_A_TIME, n_panels, next, out);
        break;
    case 4:
        multiply_chunk(f, c, first_block, n_blocks, m, token, 4, n_panels, next, out);
        break;
    default:
        multiply_chunk(f, c, first_block, n_blocks, m, token, 1, n_panels, next, out);
    }
}

INLINE int tokens_at_a_time(const format f, int left) {
    const bool has_room = f.groups_per_block == 1; /* the second group's sums take registers */
    if (has_room && left >= MANY_AT_A_TIME && left != 8) return MANY_AT_A_TIME; /* 8 is better cut in halves */
    return left >= 4 ? 4 : 1;
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
        for (int t = 0; t < m->n_tokens;) {
            const int n_tokens = tokens_at_a_time(f, m->n_tokens - t);
            for (int p = 0; p < n_panels; p += PAIR) {
                const uint8_t *fetch = t == 0 ? next + (size_t)p * panel_bytes : NULL;
                float *rows = out + p * PHI_PANEL_ROWS;
                if (n_panels - p >= PAIR)
                    multiply_tokens(f, c + p, b, n, m, t, n_tokens, PAIR, fetch, rows);
                else
                    multiply_tokens(f, c + p, b, n, m, t, n_tokens, 1, fetch, rows);
            }
            t += n_tokens;
        }
    }
}

INLINE int min_int(int a, int b) { return a < b ? a : b; }

INLINE void matmul(const format f, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows;) {
        const uint8_t *panel = m->rows + (size_t)r * m->row_bytes;
        float *out = m->out + r;
        if (m->n_tokens > FEW_TOKENS) {
            const int n_panels = min_int((m->n_rows - r) / PHI_PANEL_ROWS, PANELS);
            multiply_many(f, panel, m, n_panels, out);
            r += n_panels * PHI_PANEL_ROWS;
            continue;
        }
        multiply_panel(f, panel, m, out);
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
