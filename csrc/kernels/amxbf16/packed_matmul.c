/* Products of packed rows with the bf16 activations of many tokens, in AMX tiles.
 * Layout: 64 bytes of a panel are four columns of 16 rows (kernels/generic/pack.h). They become two rows of a right
 * tile, each two columns of 16 rows in bf16, a row's pair in a dword; the 32 columns of a sub-block are a tile.
 * Idea: weights are dequantised to float and rounded to bf16 once for all tokens, 256 columns of four panels at a time.
 * Nothing is left to be scaled: tiles sum in float and go between columns straight to the output and back, where tokens
 * fill them. To keep the sums of all columns in tiles would take whole rows of weights, 192 KiB for two panels of 3072
 * columns. The sums of a (row, token) pair are built in one order, whatever else is in the call.
 * Bound: 32 products of 16 cycles a block of 32 rows, 32 tokens, 256 columns, 1650 GMAC/s at 3.2 GHz, with 32 tiles
 * loaded for them and 4 of sums loaded and stored; unpacking, some 2000 instructions for 256 columns of a panel, is not
 * hidden. */
#include "amxbf16.h"

#include <string.h>

#include "../amx/tiles.h"
#include "../avx512/avx512.h"
#include "../avx512/panel_units.h"
#include "bf16.h"

enum {
    ROWS = PHI_PANEL_ROWS,
    STEPS = PHI_TILED_BLOCK / PHI_Q8_BLOCK, /* products of a tile: one a sub-block */
    TILE_BYTES = PHI_TILE_TOKENS * PHI_TILE_COLS,
    PANELS = 4, /* unpacked at a time: 32 KiB, so that two pairs take the activations from the first-level cache */
};

/* 256 columns of a panel in right tiles of [16 pairs of columns, 16 rows, 2]. */
typedef struct {
    __m512i tiles[STEPS][16];
} block;

typedef void (*unpack_fn)(const uint8_t *unit, block *w);

/* Two columns of 16 rows. */
INLINE __m512i tile_row(__m512 even, __m512 odd) {
    const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i other_half = _mm512_add_epi32(row, _mm512_set1_epi32(16));
    const __m512i side_by_side = _mm512_or_si512(row, _mm512_slli_epi32(other_half, 16));
    return _mm512_permutexvar_epi16(side_by_side, phi_to_bf16(even, odd));
}

INLINE __m512 dequantise(__m512i q, __m512 scale, __m512 min) {
    return _mm512_fmsub_ps(scale, _mm512_cvtepi32_ps(q), min);
}

/* Four columns of 16 rows. */
INLINE void dequantise_line(__m512i line, __m512 scale, __m512 min, __m512i *rows) {
    const __m512i byte = _mm512_set1_epi32(255);
    const __m512 column_0 = dequantise(_mm512_and_si512(line, byte), scale, min);
    const __m512 column_1 = dequantise(_mm512_and_si512(_mm512_srli_epi32(line, 8), byte), scale, min);
    const __m512 column_2 = dequantise(_mm512_and_si512(_mm512_srli_epi32(line, 16), byte), scale, min);
    const __m512 column_3 = dequantise(_mm512_srli_epi32(line, 24), scale, min);
    rows[0] = tile_row(column_0, column_1);
    rows[1] = tile_row(column_2, column_3);
}

INLINE void unpack(const format f, const uint8_t *unit, block *w) {
    const size_t part = f.unit_bytes / (size_t)f.sub_blocks;
    const int n_lines = LINES / f.groups_per_block;
    for (int first = 0; first < STEPS; first += f.sub_blocks, unit += f.unit_bytes) {
        groups g;
        f.unpack_groups(unit, &g);
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            __m512i q[LINES];
            /* The next 256 columns, a part at a time, as bursts stall; behind a panel's last ones follows the next
             * panel. */
            prefetch(unit + (size_t)(STEPS + j) * part, part);
            f.unpack_lines(unit, j, q);
            UNROLL for (int i = 0; i < LINES; i++) {
                const int group = j * f.groups_per_block + i / n_lines;
                const __m512 scale = g.scale[group];
                const __m512 min = f.centred ? _mm512_mul_ps(scale, _mm512_set1_ps(128.0f)) : g.min[group];
                dequantise_line(q[i], scale, min, &w->tiles[first + j][2 * i]);
            }
        }
    }
}

/* Sums of 16 tokens: tile i of their rows from 16 * i floats on. */
typedef struct {
    float *at;
    size_t stride_bytes; /* from a token to the next */
} sums;

static sums sums_in_output(const phi_matmul *m, int token, int row) {
    return (sums){m->out + (size_t)token * m->out_stride + row, m->out_stride * sizeof *m->out};
}

/* Left tiles of 256 columns: of 16 tokens and the 16 after them, and others to ask for, or NULL. */
typedef struct {
    const int8_t *x, *after, *wanted;
} left_tiles;

/* Adds 256 columns to the sums of 16 n_tiles tokens and 16 n_panels rows, or begins them. n_tiles and n_panels are
 * constants where this is inlined. */
INLINE void multiply_block(const left_tiles *l, const block *w, const sums *s, int n_tiles, int n_panels, bool begin) {
    if (begin) {
        phi_tile_zero(0);
        phi_tile_zero(1);
        phi_tile_zero(2);
        phi_tile_zero(3);
    } else {
        phi_tile_load(0, s[0].at, s[0].stride_bytes);
        if (n_panels > 1) phi_tile_load(1, s[0].at + ROWS, s[0].stride_bytes);
        if (n_tiles > 1) phi_tile_load(2, s[1].at, s[1].stride_bytes);
        if (n_tiles > 1 && n_panels > 1) phi_tile_load(3, s[1].at + ROWS, s[1].stride_bytes);
    }
    UNROLL for (int i = 0; i < STEPS; i++) {
        if (l->wanted) phi_prefetch_tile(l->wanted + i * TILE_BYTES);
        phi_tile_load(4, l->x + i * TILE_BYTES, PHI_TILE_COLS);
        phi_tile_load(6, w[0].tiles[i], PHI_TILE_COLS);
        phi_tile_multiply_bf16(0, 4, 6);
        if (n_panels > 1) {
            phi_tile_load(7, w[1].tiles[i], PHI_TILE_COLS);
            phi_tile_multiply_bf16(1, 4, 7);
        }
        if (n_tiles > 1) {
            phi_tile_load(5, l->after + i * TILE_BYTES, PHI_TILE_COLS);
            phi_tile_multiply_bf16(2, 5, 6);
            if (n_panels > 1) phi_tile_multiply_bf16(3, 5, 7);
        }
    }
    phi_tile_store(0, s[0].at, s[0].stride_bytes);
    if (n_panels > 1) phi_tile_store(1, s[0].at + ROWS, s[0].stride_bytes);
    if (n_tiles > 1) phi_tile_store(2, s[1].at, s[1].stride_bytes);
    if (n_tiles > 1 && n_panels > 1) phi_tile_store(3, s[1].at + ROWS, s[1].stride_bytes);
}

/* Adds 256 columns of n_panels panels, from a row on, to the sums of all tokens; rest: those of the tokens that do not
 * fill their tile. */
static void multiply_tokens(const phi_matmul *m, const block *w, size_t b, int row, int n_panels, sums rest,
                            bool last) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_TILED_BLOCK;
    const int n_filling = m->n_tokens / PHI_TILE_TOKENS * PHI_TILE_TOKENS;
    for (int t = 0; t < m->n_tokens; t += 2 * PHI_TILE_TOKENS) {
        const size_t token = (size_t)(m->first_token + t);
        const int8_t *x = phi_tiled_row(&m->x->tiled, b, token);
        const int8_t *next = last ? phi_tiled_row(&m->x->tiled, (b + 1) % n_blocks, token) : NULL;
        left_tiles l = {x, x + STEPS * TILE_BYTES, NULL};
        const bool two = m->n_tokens - t > PHI_TILE_TOKENS;
        for (int i = 0; i < n_panels; i += 2) {
            const sums in_rest = {rest.at + i * ROWS, rest.stride_bytes};
            sums s[2] = {in_rest, in_rest};
            for (int k = 0; k < 2 && t + k * PHI_TILE_TOKENS < n_filling; k++)
                s[k] = sums_in_output(m, t + k * PHI_TILE_TOKENS, row + i * ROWS);
            l.wanted = next && (i == 0 || two) ? next + i / 2 * STEPS * TILE_BYTES : NULL;
            if (two && n_panels - i > 1)
                multiply_block(&l, &w[i], s, 2, 2, b == 0);
            else if (two)
                multiply_block(&l, &w[i], s, 2, 1, b == 0);
            else if (n_panels - i > 1)
                multiply_block(&l, &w[i], s, 1, 2, b == 0);
            else
                multiply_block(&l, &w[i], s, 1, 1, b == 0);
        }
    }
}

/* 256 columns of all rows before the next, as the amx tier does. */
static void multiply_rows(unpack_fn unpack_block, const phi_matmul *m, int first, int end) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_TILED_BLOCK, panel_bytes = ROWS * m->row_bytes;
    const size_t block_bytes = panel_bytes / n_blocks;
    float rest[PHI_TILE_TOKENS][PHI_TILED_TASK_ROWS];
    block w[PANELS];
    for (size_t b = 0; b < n_blocks; b++) {
        for (int row = first; row < end; row += PANELS * ROWS) {
            const int left = (end - row) / ROWS, n_panels = left < PANELS ? left : PANELS;
            const uint8_t *panels = m->rows + (size_t)row * m->row_bytes + b * block_bytes;
            for (int i = 0; i < n_panels; i++) unpack_block(panels + (size_t)i * panel_bytes, &w[i]);
            phi_tiles_fence(w);
            multiply_tokens(m, w, b, row, n_panels, (sums){rest[0] + row - first, sizeof rest[0]},
                            row + PANELS * ROWS >= end);
        }
    }
    const int n_filling = m->n_tokens / PHI_TILE_TOKENS * PHI_TILE_TOKENS;
    for (int t = n_filling; t < m->n_tokens; t++)
        memcpy(sums_in_output(m, t, first).at, rest[t - n_filling], (size_t)(end - first) * sizeof rest[0][0]);
}

static void matmul(unpack_fn unpack_block, void (*few)(const phi_matmul *), const phi_matmul *m) {
    if (m->n_tokens <= PHI_AMXBF16_FEW_TOKENS || !m->x->tiled.tiles || m->first_token % PHI_TILE_TOKENS != 0) {
        few(m);
        return;
    }
    /* Each time anew: other libraries in the process have tiles of their own. */
    phi_tiles_configure();
    for (int row = 0; row < m->n_rows; row += PHI_TILED_TASK_ROWS) {
        const int end = row + PHI_TILED_TASK_ROWS;
        multiply_rows(unpack_block, m, row, end < m->n_rows ? end : m->n_rows);
    }
    phi_tiles_release();
}

#define PHI_DEFINE(type)                                                                             \
    static void unpack_##type(const uint8_t *unit, block *w) { unpack(PHI_FORMAT_##type, unit, w); } \
    void phi_matmul_packed_##type##_amxbf16(const phi_matmul *m) {                                   \
        matmul(unpack_##type, phi_matmul_packed_##type##_avx512, m);                                 \
    }
PHI_DEFINE(q4_0)
PHI_DEFINE(q4_1)
PHI_DEFINE(q8_0)
PHI_DEFINE(q4_k)
PHI_DEFINE(q5_k)
PHI_DEFINE(q6_k)
