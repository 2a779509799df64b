/* Products of packed rows with the tiled int8 activations of many tokens, in AMX tiles.
 * Layout: 64 bytes of a panel are four columns of 16 rows (kernels/generic/pack.h), which is one row of a right tile.
 * Idea: 256 columns of a row are requantised to int8 with one scale, bound / 127; the bound on |scale * q - min| needs
 * no scan, for it is reached at the ends of q. Minima and the scales of sub-blocks are gone then, and K = 256 stays in
 * int32: four products a tile. A weight is off by at most 1/2 + (half its quants + 1) / 512 of that scale: its own
 * rounding, and that of its factors to 1/256. Panels are unpacked once for all tokens; two panels by the high and low
 * parts of 16 tokens fill four tiles of sums, which are scaled and added to the output while the products of the next
 * block run. The sums of a (row, token) pair are built in one order, whatever else is in the call.
 * Bound: 16 products of 16 cycles a block of 32 rows, 16 tokens, 256 columns, 1650 GMAC/s at 3.2 GHz, with 64
 * conversions and FMAs beside them; unpacking, some 800 instructions for 256 columns of a panel, is not hidden. */
#include "amx.h"

#include "../avx512/avx512.h"
#include "../avx512/panel_units.h"
#include "tiles.h"

enum {
    ROWS = PHI_PANEL_ROWS,
    SUB_BLOCKS = PHI_TILED_BLOCK / PHI_Q8_BLOCK,
    STEPS = PHI_TILED_BLOCK / PHI_TILE_COLS, /* products of a tile */
    TILE_BYTES = PHI_TILE_TOKENS * PHI_TILE_COLS,
    PANELS = 4, /* unpacked at a time: 16 KiB, so that two pairs take the activations from the first-level cache */
};

/* 256 columns of a panel: w = scale * line's byte. */
typedef struct {
    __m512i lines[SUB_BLOCKS * LINES]; /* STEPS right tiles */
    __m512 scale;
} block;

typedef void (*requantise_fn)(const uint8_t *unit, block *w);

/* Integers of 16 bits, doubled to fill a row's dword. */
INLINE __m512i in_both_halves(__m512i dwords) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, dwords, _mm512_slli_epi32(dwords, 16));
}

/* (q * factor + offset) / 256 for unsigned bytes q; the result fits a signed byte, so what overflows before is lost
 * without harm. */
INLINE __m512i scale_bytes(__m512i q, __m512i factor, __m512i offset) {
    const __m512i even = _mm512_and_si512(q, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(q, 8);
    const __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(even, factor), offset);
    const __m512i high = _mm512_add_epi16(_mm512_mullo_epi16(odd, factor), offset);
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(low, 8), high);
}

/* Quants go from 0 to 2 * half_quant - 1. */
INLINE void requantise(const format f, int half_quant, const uint8_t *unit, block *w) {
    __m512 scale[MAX_GROUPS], min[MAX_GROUPS];
    const int n_groups = SUB_BLOCKS * f.groups_per_block, unit_groups = f.sub_blocks * f.groups_per_block;
    for (int first = 0; first < n_groups; first += unit_groups) {
        groups g;
        f.unpack_groups(unit + (size_t)(first / unit_groups) * f.unit_bytes, &g);
        for (int i = 0; i < unit_groups; i++) {
            scale[first + i] = _mm512_mul_ps(g.scale[i], _mm512_set1_ps((float)(1 << f.shift)));
            min[first + i] = f.centred ? _mm512_mul_ps(scale[first + i], _mm512_set1_ps((float)half_quant)) : g.min[i];
        }
    }
    const __m512 zero = _mm512_setzero_ps(), largest = _mm512_set1_ps(2.0f * (float)half_quant - 1.0f);
    __m512 bound = zero, poison = zero;
    for (int i = 0; i < n_groups; i++) {
        const __m512 top = _mm512_fmsub_ps(scale[i], largest, min[i]);
        bound = _mm512_max_ps(bound, _mm512_max_ps(_mm512_abs_ps(top), _mm512_abs_ps(min[i])));
        poison = _mm512_fmadd_ps(top, zero, poison);
    }
    /* Integers cannot hold what a row with a scale that is not finite makes: its scale becomes NaN. */
    w->scale = _mm512_fmadd_ps(bound, _mm512_set1_ps(1.0f / 127.0f), poison);
    const __mmask16 some = _mm512_cmp_ps_mask(bound, zero, _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(127.0f * 256.0f), bound);
    const size_t part = f.unit_bytes / (size_t)f.sub_blocks;
    const __m128i shift = _mm_cvtsi32_si128(f.shift);
    UNROLL for (int j = 0; j < SUB_BLOCKS; j++) {
        __m512i q[LINES];
        /* The next 256 columns, a part at a time, as bursts stall; behind a panel's last ones follows the next panel.
         */
        prefetch(unit + (size_t)(SUB_BLOCKS + j) * part, part);
        f.unpack_lines(unit + (size_t)(j / f.sub_blocks) * f.unit_bytes, j % f.sub_blocks, q);
        UNROLL for (int k = 0; k < f.groups_per_block; k++) {
            const int group = j * f.groups_per_block + k, n_lines = LINES / f.groups_per_block;
            const __m512i factor = _mm512_cvtps_epi32(_mm512_mul_ps(scale[group], inverse));
            /* The offset is exact for the middle quant, so that the factor's rounding counts for half the others. */
            const __m512 middle = _mm512_fmsub_ps(scale[group], _mm512_set1_ps((float)half_quant), min[group]);
            const __m512i middle_value = _mm512_cvtps_epi32(_mm512_mul_ps(middle, inverse));
            const __m512i below = _mm512_mullo_epi32(factor, _mm512_set1_epi32(half_quant));
            const __m512i offset = _mm512_sub_epi32(_mm512_add_epi32(middle_value, _mm512_set1_epi32(128)), below);
            const __m512i a = in_both_halves(factor), b = in_both_halves(offset);
            UNROLL for (int i = k * n_lines; i < (k + 1) * n_lines; i++) {
                /* The bits that a shift leaves free are 0: none crosses to the byte below. */
                w->lines[j * LINES + i] = scale_bytes(_mm512_srl_epi16(q[i], shift), a, b);
            }
        }
    }
}

/* Sums of two panels and 16 tokens, on their way to the output. */
typedef struct {
    const __m512i *sums; /* [2 parts, 2 panels, 16 tokens] vectors of 16 rows */
    __m512 scale[2];     /* by panel */
    int n_panels, n_tokens;
    const float *x_scales; /* [n_tokens] */
    float *out;            /* [n_tokens, out_stride] */
    size_t out_stride;
    __mmask16 keep; /* none for the first 256 columns: the output holds nothing yet */
} pending;

/* The sums of this block and of the one before, in turns. */
typedef struct {
    __m512i sums[2][4 * PHI_TILE_TOKENS];
    pending before;
    int turn;
} staged;

INLINE void finish_token(const pending *p, int token) {
    if (token >= p->n_tokens) return;
    const __m512 x_scale = _mm512_set1_ps(p->x_scales[token]);
    float *out = p->out + (size_t)token * p->out_stride;
    for (int i = 0; i < p->n_panels; i++) {
        const __m512 scale = _mm512_mul_ps(p->scale[i], x_scale);
        const __m512 total = _mm512_maskz_loadu_ps(p->keep, out + i * ROWS);
        const __m512 high = _mm512_cvtepi32_ps(p->sums[i * PHI_TILE_TOKENS + token]);
        const __m512 low = _mm512_cvtepi32_ps(p->sums[(2 + i) * PHI_TILE_TOKENS + token]);
        const __m512 sum = _mm512_fmadd_ps(low, _mm512_set1_ps(1.0f / (float)PHI_TILED_LOW_STEPS), high);
        _mm512_storeu_ps(out + i * ROWS, _mm512_fmadd_ps(sum, scale, total));
    }
}

/* sums = both parts of 16 tokens times n_panels of w, and beside it the end of the block before. n_panels is a constant
 * where this is inlined. wanted: STEPS tiles to ask for, or NULL. */
INLINE void multiply_block(const int8_t *high, const int8_t *low, const block *w, int n_panels, __m512i *sums,
                           const pending *before, const int8_t *wanted) {
    phi_tile_zero(0);
    phi_tile_zero(1);
    phi_tile_zero(2);
    phi_tile_zero(3);
    UNROLL for (int i = 0; i < STEPS; i++) {
        if (wanted) phi_prefetch_tile(wanted + i * TILE_BYTES);
        phi_tile_load(4, high + i * TILE_BYTES, PHI_TILE_COLS);
        phi_tile_load(6, w[0].lines + i * ROWS, PHI_TILE_COLS);
        phi_tile_multiply(0, 4, 6);
        finish_token(before, 4 * i);
        if (n_panels > 1) {
            phi_tile_load(7, w[1].lines + i * ROWS, PHI_TILE_COLS);
            phi_tile_multiply(1, 4, 7);
        }
        finish_token(before, 4 * i + 1);
        phi_tile_load(5, low + i * TILE_BYTES, PHI_TILE_COLS);
        phi_tile_multiply(2, 5, 6);
        finish_token(before, 4 * i + 2);
        if (n_panels > 1) phi_tile_multiply(3, 5, 7);
        finish_token(before, 4 * i + 3);
    }
    phi_tile_store(0, sums, 64);
    phi_tile_store(2, sums + 2 * PHI_TILE_TOKENS, 64);
    if (n_panels > 1) {
        phi_tile_store(1, sums + PHI_TILE_TOKENS, 64);
        phi_tile_store(3, sums + 3 * PHI_TILE_TOKENS, 64);
    }
}

/* Products of w, 256 columns of n_panels panels from a row on, with all tokens. last: the next 256 columns follow. */
static void multiply_tokens(const phi_matmul *m, const block *w, size_t unit, int row, int n_panels, staged *s,
                            bool last) {
    const phi_tiled *x = &m->x->tiled;
    for (int t = 0; t < m->n_tokens; t += PHI_TILE_TOKENS) {
        const size_t token = (size_t)(m->first_token + t);
        const int8_t *high = phi_tiled_row(x, unit, token), *low = high + STEPS * TILE_BYTES;
        const int8_t *next = last ? phi_tiled_row(x, (unit + 1) % ((size_t)m->n_cols / PHI_TILED_BLOCK), token) : NULL;
        for (int i = 0; i < n_panels; i += 2, s->turn ^= 1) {
            const bool pair = i + 1 < n_panels;
            const int8_t *wanted = next ? next + i / 2 * STEPS * TILE_BYTES : NULL;
            if (pair)
                multiply_block(high, low, &w[i], 2, s->sums[s->turn], &s->before, wanted);
            else
                multiply_block(high, low, &w[i], 1, s->sums[s->turn], &s->before, wanted);
            s->before = (pending){
                .sums = s->sums[s->turn],
                .scale = {w[i].scale, w[pair ? i + 1 : i].scale},
                .n_panels = pair ? 2 : 1,
                .n_tokens = m->n_tokens - t < PHI_TILE_TOKENS ? m->n_tokens - t : PHI_TILE_TOKENS,
                .x_scales = x->scales + unit * x->n_tokens + token,
                .out = m->out + (size_t)t * m->out_stride + row + i * ROWS,
                .out_stride = m->out_stride,
                .keep = unit ? 0xffff : 0,
            };
        }
    }
}

/* 256 columns of all rows before the next: what these need of the tokens, 256 KiB of 512, comes from the second-level
 * cache for all rows but the first ones. */
static void multiply_rows(requantise_fn requantise_unit, const phi_matmul *m, int first, int end) {
    const size_t n_units = (size_t)m->n_cols / PHI_TILED_BLOCK, panel_bytes = ROWS * m->row_bytes;
    const size_t unit_bytes = panel_bytes / n_units;
    block w[PANELS];
    staged s;
    s.before = (pending){.n_tokens = 0};
    s.turn = 0;
    for (size_t unit = 0; unit < n_units; unit++) {
        for (int row = first; row < end; row += PANELS * ROWS) {
            const int left = (end - row) / ROWS, n_panels = left < PANELS ? left : PANELS;
            const uint8_t *panels = m->rows + (size_t)row * m->row_bytes + unit * unit_bytes;
            for (int i = 0; i < n_panels; i++) requantise_unit(panels + (size_t)i * panel_bytes, &w[i]);
            phi_tiles_fence(w);
            multiply_tokens(m, w, unit, row, n_panels, &s, row + PANELS * ROWS >= end);
        }
    }
    for (int t = 0; t < PHI_TILE_TOKENS; t++) finish_token(&s.before, t);
}

static void matmul(requantise_fn requantise_unit, void (*few)(const phi_matmul *), const phi_matmul *m) {
    if (m->n_tokens <= PHI_AMX_FEW_TOKENS || !m->x->tiled.tiles || m->first_token % PHI_TILE_TOKENS != 0) {
        few(m);
        return;
    }
    /* Each time anew: other libraries in the process have tiles of their own. */
    phi_tiles_configure();
    for (int row = 0; row < m->n_rows; row += PHI_TILED_TASK_ROWS) {
        const int end = row + PHI_TILED_TASK_ROWS;
        multiply_rows(requantise_unit, m, row, end < m->n_rows ? end : m->n_rows);
    }
    phi_tiles_release();
}

#define PHI_DEFINE(type, half_quant)                                     \
    static void requantise_##type(const uint8_t *unit, block *w) {       \
        requantise(PHI_FORMAT_##type, half_quant, unit, w);              \
    }                                                                    \
    void phi_matmul_packed_##type##_amx(const phi_matmul *m) {           \
        matmul(requantise_##type, phi_matmul_packed_##type##_avx512, m); \
    }
PHI_DEFINE(q4_k, 8)
PHI_DEFINE(q5_k, 16)
PHI_DEFINE(q6_k, 32)
