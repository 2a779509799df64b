/* Products of packed rows with int8 activations, 16 rows at a time.
 * Layout: panels of 16 interleaved rows (generic/pack.h): a line is four columns of 16 rows.
 * Idea: the 32 columns of a sub-block are unpacked to eight lines of unsigned bytes, which stay in registers while up
 * to PASS_TOKENS tokens are multiplied: eight vpdpbusd a token, by four activations each, broadcast from memory. The
 * sums are converted to float once and multiplied by the scales. A token costs the same in every batch, so a larger
 * batch is never slower per token. Prefill takes two panels at a time, which share the broadcasts. The order of a
 * token's sum is the same everywhere.
 * Bound: decode: reading the panel, with prefetches spread out, since bursts stall; prefill: the multipliers, eleven
 * instructions for 512 products. */
#include "avx512.h"

#include <string.h>

#include "panel_units.h"

enum {
    REGISTER_TOKENS = 4, /* largest batch whose sums stay in registers */
    PASS_TOKENS = 64,    /* tokens per pass over the weights, at most: their sums stay in L1 */
    MAX_PANELS = 2,      /* multiplied at a time */
};

PHI_INLINE __m512i broadcast_4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Adds the products of line i of each panel with four activations to dots [n_panels][group]. */
PHI_INLINE void add_line(__m512i (*dots)[2], const __m512i (*lines)[LINES], int group, int i, const int8_t *x,
                         int n_tokens, int n_panels) {
#if defined(__GNUC__) && !defined(__clang__)
    /* gcc loads each broadcast to a register. The instruction can broadcast from memory, which leaves the core more
     * registers to rename. One and two tokens are bound by memory and gain nothing; two panels share the register. */
    if (n_panels == 1 && n_tokens > 2) {
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(dots[0][group]) : "v"(lines[0][i]), "m"(*(const int8_t (*)[4])x));
        return;
    }
#else
    (void)n_tokens;
#endif
    const __m512i four = broadcast_4(x);
    UNROLL for (int p = 0; p < n_panels; p++) dots[p][group] = _mm512_dpbusd_epi32(dots[p][group], lines[p][i], four);
}

/* A sub-block of up to MAX_PANELS panels, unpacked. */
typedef struct {
    __m512i lines[MAX_PANELS][LINES];
    __m512 scale[MAX_PANELS][2], min[MAX_PANELS]; /* scale: [groups]; min: unset for centred types */
} sub_block;

/* Sub-block j of n_panels units, panel_bytes apart. */
PHI_INLINE sub_block unpack_sub_block(const format f, const uint8_t *units, size_t panel_bytes, const unit_scales *s,
                                      int j, int n_panels) {
    sub_block w;
    UNROLL for (int p = 0; p < n_panels; p++) {
        const uint8_t *unit = units + (size_t)p * panel_bytes;
        f.unpack_lines(unit, j, w.lines[p]);
        UNROLL for (int k = 0; k < f.groups_per_block; k++) {
            w.scale[p][k] = f.scale_of(&s[p], j * f.groups_per_block + k);
        }
        if (!f.centred) w.min[p] = f.min_of(&s[p], j);
    }
    return w;
}

/* Initial value of a group's integer dot product: -128 * sum of the activations for centred types. */
PHI_INLINE __m512i begin_dot(const format f, const phi_q8 *x, size_t block, int group) {
    if (!f.centred) return _mm512_setzero_si512();
    return _mm512_set1_epi32(f.groups_per_block == 1 ? x->block_offsets[block] : x->offsets[2 * block + (size_t)group]);
}

/* Adds the products of a sub-block with block `block` of a token's activations to totals [n_panels]. n_tokens: that
 * are multiplied by the sub-block. */
PHI_INLINE void add_token(const format f, const sub_block *w, const phi_q8 *x, size_t block, int n_tokens, int n_panels,
                          __m512 *totals) {
    const int8_t *quants = x->quants + block * PHI_Q8_BLOCK;
    const int n_lines = LINES / f.groups_per_block;
    __m512i dot[MAX_PANELS][2];
    UNROLL for (int k = 0; k < f.groups_per_block; k++) {
        UNROLL for (int p = 0; p < n_panels; p++) dot[p][k] = begin_dot(f, x, block, k);
        UNROLL for (int i = k * n_lines; i < (k + 1) * n_lines; i++) {
            add_line(dot, w->lines, k, i, quants + 4 * i, n_tokens, n_panels);
        }
    }
    const __m512 scale = _mm512_set1_ps(x->scales[block]);
    UNROLL for (int p = 0; p < n_panels; p++) {
        __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[p][0]), w->scale[p][0]);
        if (f.groups_per_block == 2) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[p][1]), w->scale[p][1], sum);
        totals[p] = _mm512_fmadd_ps(sum, scale, totals[p]);
        if (!f.centred) totals[p] = _mm512_fnmadd_ps(w->min[p], _mm512_set1_ps(x->block_sums[block]), totals[p]);
    }
}

/* The same for n_tokens tokens, n_blocks blocks apart. Only if in_registers is n_tokens a compile-time constant. */
PHI_INLINE void add_tokens(const format f, const sub_block *w, const phi_q8 *x, size_t block, size_t n_blocks,
                           int n_tokens, bool in_registers, int n_panels, __m512 (*totals)[MAX_PANELS]) {
    if (in_registers) {
        UNROLL for (int t = 0; t < n_tokens; t++) {
            add_token(f, w, x, block + (size_t)t * n_blocks, n_tokens, n_panels, totals[t]);
        }
    } else {
        for (int t = 0; t < n_tokens; t++)
            add_token(f, w, x, block + (size_t)t * n_blocks, n_tokens, n_panels, totals[t]);
    }
}

/* All columns of n_panels panels for n_tokens tokens from `token` on; in_registers as for add_tokens. */
PHI_INLINE void multiply_panels(const format f, const uint8_t *units, const phi_matmul *m, int token, int n_tokens,
                                bool in_registers, int n_panels, float *out) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_Q8_BLOCK, block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    const size_t panel_bytes = PHI_PANEL_ROWS * m->row_bytes, first_block = (size_t)(m->first_token + token) * n_blocks;
    const phi_prefetch prefetch = m->prefetch;
    const phi_q8 x = m->x->q8;
    __m512 totals[PASS_TOKENS][MAX_PANELS];
    for (int t = 0; t < (in_registers ? REGISTER_TOKENS : n_tokens); t++) {
        for (int p = 0; p < n_panels; p++) totals[t][p] = _mm512_setzero_ps();
    }
    for (size_t b = 0; b < n_blocks; b += (size_t)f.sub_blocks, units += f.unit_bytes) {
        unit_scales s[MAX_PANELS];
        UNROLL for (int p = 0; p < n_panels; p++) f.unpack_scales(units + (size_t)p * panel_bytes, &s[p]);
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            UNROLL for (int p = 0; p < n_panels; p++) {
                const uint8_t *unit = units + (size_t)p * panel_bytes;
                prefetch_ahead(&prefetch, unit + (size_t)j * block_bytes, block_bytes, j ? NULL : unit + f.unit_bytes);
            }
            /* Lines kept for later sub-blocks spill. A single token keeps them: reading them again is slower. */
            if (n_panels > 1 || n_tokens > 1) RELOAD();
            const sub_block w = unpack_sub_block(f, units, panel_bytes, s, j, n_panels);
            add_tokens(f, &w, &x, first_block + b + (size_t)j, n_blocks, n_tokens, in_registers, n_panels, totals);
        }
    }
    for (int t = 0; t < n_tokens; t++) {
        float *row = out + (size_t)(token + t) * m->out_stride;
        UNROLL for (int p = 0; p < n_panels; p++) _mm512_storeu_ps(row + p * PHI_PANEL_ROWS, totals[t][p]);
    }
}

/* One panel for n_tokens tokens. */
PHI_INLINE void multiply_panel(const format f, const uint8_t *units, const phi_matmul *m, int token, int n_tokens,
                               float *out) {
    switch (n_tokens) {
    case 1:
        multiply_panels(f, units, m, token, 1, true, 1, out);
        break;
    case 2:
        multiply_panels(f, units, m, token, 2, true, 1, out);
        break;
    case 3:
        multiply_panels(f, units, m, token, 3, true, 1, out);
        break;
    case REGISTER_TOKENS:
        multiply_panels(f, units, m, token, REGISTER_TOKENS, true, 1, out);
        break;
    default:
        multiply_panels(f, units, m, token, n_tokens, false, 1, out);
    }
}

/* All rows for n_tokens tokens from `token` on. Two panels are two streams from memory, which a small batch reads more
 * slowly than one. */
PHI_INLINE void multiply_pass(const format f, const phi_matmul *m, int token, int n_tokens) {
    const int n_pairs_rows =
        n_tokens <= REGISTER_TOKENS || n_tokens <= m->max_small_batch ? 0 : m->n_rows - PHI_PANEL_ROWS;
    int r = 0;
    for (; r < n_pairs_rows; r += MAX_PANELS * PHI_PANEL_ROWS) {
        multiply_panels(f, m->rows + (size_t)r * m->row_bytes, m, token, n_tokens, false, MAX_PANELS, m->out + r);
    }
    for (; r < m->n_rows; r += PHI_PANEL_ROWS) {
        multiply_panel(f, m->rows + (size_t)r * m->row_bytes, m, token, n_tokens, m->out + r);
    }
}

/* As few passes as possible, with the tokens spread evenly over them. */
PHI_INLINE void matmul(const format f, const phi_matmul *m) {
    const int n_passes = (m->n_tokens + PASS_TOKENS - 1) / PASS_TOKENS;
    for (int pass = 0, t = 0; pass < n_passes; pass++) {
        const int n_tokens = (m->n_tokens - t) / (n_passes - pass);
        multiply_pass(f, m, t, n_tokens);
        t += n_tokens;
    }
}

#define PHI_DEFINE(UPPER, type) \
    void phi_matmul_packed_##type##_avx512(const phi_matmul *m) { matmul(PHI_FORMAT_##type, m); }
PHI_PACKED_TYPES(PHI_DEFINE)
