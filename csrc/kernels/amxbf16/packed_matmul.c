/* Prefill products: packed weights by tiled bf16 activations, in AMX tiles.
 * Layout: 64 bytes of a panel are four columns of 16 rows (kernels/generic/pack.h). They become two rows of a right
 * tile: each holds two columns of 16 rows in bf16, one row's pair per dword. The 32 columns of a sub-block are one
 * tile. Idea: weights are dequantised to float32 and rounded to bf16 once for all tokens, 256 columns of four panels at
 * a time. Tiles accumulate in float32, so nothing is left to scale. Between blocks of columns the accumulators are
 * stored in the output itself, or in a buffer for tokens that do not fill a tile. Keeping them in tiles over all
 * columns would need whole rows of weights in cache: 192 KiB for two panels of 3072 columns. A (row, token) pair is
 * summed in the same order in every call. Bound: 32 tile products of 16 cycles per 32 rows x 32 tokens x 256 columns,
 * 1650 GMAC/s at 3.2 GHz, with 32 loads of operand tiles and 4 loads and stores of accumulators. Unpacking, about 2000
 * instructions per 256 columns of a panel, is not overlapped. */
#include "amxbf16.h"

#include <string.h>

#include "../amx/tiles.h"
#include "../avx512/avx512.h"
#include "../avx512/panel_units.h"
#include "bf16.h"

enum {
    ROWS = PHI_PANEL_ROWS,
    STEPS = PHI_TILED_BLOCK / PHI_Q8_BLOCK, /* tile products per block: one per sub-block */
    TILE_BYTES = PHI_TILE_TOKENS * PHI_TILE_COLS,
    PANELS = 4, /* unpacked at a time: 32 KiB, so that both pairs of panels find the activations in L1 */
};

/* 256 columns of a panel as right tiles of [16 pairs of columns, 16 rows, 2]. */
typedef struct {
    __m512i tiles[STEPS][16];
} block;

typedef void (*unpack_fn)(const uint8_t *unit, block *w);

/* Two columns of 16 rows in bf16, interleaved. */
INLINE __m512i tile_row(__m512 even, __m512 odd) {
    const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i odd_row = _mm512_add_epi32(row, _mm512_set1_epi32(16));
    const __m512i interleave = _mm512_or_si512(row, _mm512_slli_epi32(odd_row, 16));
    return _mm512_permutexvar_epi16(interleave, phi_to_bf16(even, odd));
}

INLINE __m512 dequantise(__m512i q, __m512 scale, __m512 min) {
    return _mm512_fmsub_ps(scale, _mm512_cvtepi32_ps(q), min);
}

/* A line, four columns of 16 rows, to two rows of a right tile. */
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
    const size_t sub_block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    const int n_lines = LINES / f.groups_per_block;
    for (int first = 0; first < STEPS; first += f.sub_blocks, unit += f.unit_bytes) {
        unit_scales s;
        f.unpack_scales(unit, &s);
        UNROLL for (int j = 0; j < f.sub_blocks; j++) {
            __m512i q[LINES];
            /* Prefetches the next 256 columns, one sub-block at a time: bursts stall. The last columns of a panel are
             * followed by the next panel. */
            prefetch_l1(unit + (size_t)(STEPS + j) * sub_block_bytes, sub_block_bytes);
            f.unpack_lines(unit, j, q);
            UNROLL for (int i = 0; i < LINES; i++) {
                const int group = j * f.groups_per_block + i / n_lines;
                const __m512 scale = f.scale_of(&s, group);
                const __m512 min = f.centred ? _mm512_mul_ps(scale, _mm512_set1_ps(128.0f)) : f.min_of(&s, group);
                dequantise_line(q[i], scale, min, &w->tiles[first + j][2 * i]);
            }
        }
    }
}

/* Where the accumulators of 16 tokens are stored between blocks: panel i at `rows` + 16 * i floats. */
typedef struct {
    float *rows;
    size_t stride_bytes; /* from a token to the next */
} accumulators;

static accumulators accumulators_in_output(const phi_matmul *m, int token, int row) {
    return (accumulators){m->out + (size_t)token * m->out_stride + row, m->out_stride * sizeof *m->out};
}

/* Left tiles of 256 columns: of 16 tokens, of the 16 tokens after them, and tiles to prefetch or NULL. */
typedef struct {
    const int8_t *first, *second, *to_prefetch;
} left_tiles;

/* Adds the products of 256 columns to the accumulators of 16 * n_tiles tokens and 16 * n_panels rows; is_first: starts
 * them from 0. n_tiles and n_panels are constants after inlining.
 * Tiles 0 to 3 accumulate, 4 and 5 hold activations, 6 and 7 weights. */
INLINE void multiply_block(const left_tiles *x, const block *w, const accumulators *sums, int n_tiles, int n_panels,
                           bool is_first) {
    if (is_first) {
        phi_tile_zero(0);
        phi_tile_zero(1);
        phi_tile_zero(2);
        phi_tile_zero(3);
    } else {
        phi_tile_load(0, sums[0].rows, sums[0].stride_bytes);
        if (n_panels > 1) phi_tile_load(1, sums[0].rows + ROWS, sums[0].stride_bytes);
        if (n_tiles > 1) phi_tile_load(2, sums[1].rows, sums[1].stride_bytes);
        if (n_tiles > 1 && n_panels > 1) phi_tile_load(3, sums[1].rows + ROWS, sums[1].stride_bytes);
    }
    UNROLL for (int i = 0; i < STEPS; i++) {
        if (x->to_prefetch) phi_prefetch_tile(x->to_prefetch + i * TILE_BYTES);
        phi_tile_load(4, x->first + i * TILE_BYTES, PHI_TILE_COLS);
        phi_tile_load(6, w[0].tiles[i], PHI_TILE_COLS);
        phi_tile_multiply_bf16(0, 4, 6);
        if (n_panels > 1) {
            phi_tile_load(7, w[1].tiles[i], PHI_TILE_COLS);
            phi_tile_multiply_bf16(1, 4, 7);
        }
        if (n_tiles > 1) {
            phi_tile_load(5, x->second + i * TILE_BYTES, PHI_TILE_COLS);
            phi_tile_multiply_bf16(2, 5, 6);
            if (n_panels > 1) phi_tile_multiply_bf16(3, 5, 7);
        }
    }
    phi_tile_store(0, sums[0].rows, sums[0].stride_bytes);
    if (n_panels > 1) phi_tile_store(1, sums[0].rows + ROWS, sums[0].stride_bytes);
    if (n_tiles > 1) phi_tile_store(2, sums[1].rows, sums[1].stride_bytes);
    if (n_tiles > 1 && n_panels > 1) phi_tile_store(3, sums[1].rows + ROWS, sums[1].stride_bytes);
}

/* Adds block b (256 columns) of n_panels panels, starting at `row`, to the accumulators of all tokens. remainder: the
 * accumulators of the tokens that do not fill a tile. is_last: these are the last rows, so the activations of the next
 * block are prefetched. */
static void multiply_tokens(const phi_matmul *m, const block *w, size_t b, int row, int n_panels,
                            accumulators remainder, bool is_last) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_TILED_BLOCK;
    const int n_in_full_tiles = m->n_tokens / PHI_TILE_TOKENS * PHI_TILE_TOKENS;
    for (int t = 0; t < m->n_tokens; t += 2 * PHI_TILE_TOKENS) {
        const size_t token = (size_t)(m->first_token + t);
        const int8_t *first = phi_tiled_row(&m->x->tiled, b, token);
        const int8_t *next = is_last ? phi_tiled_row(&m->x->tiled, (b + 1) % n_blocks, token) : NULL;
        left_tiles x = {first, first + STEPS * TILE_BYTES, NULL};
        const bool has_second = m->n_tokens - t > PHI_TILE_TOKENS;
        for (int i = 0; i < n_panels; i += 2) {
            const accumulators in_remainder = {remainder.rows + i * ROWS, remainder.stride_bytes};
            accumulators sums[2] = {in_remainder, in_remainder};
            for (int k = 0; k < 2 && t + k * PHI_TILE_TOKENS < n_in_full_tiles; k++)
                sums[k] = accumulators_in_output(m, t + k * PHI_TILE_TOKENS, row + i * ROWS);
            x.to_prefetch = next && (i == 0 || has_second) ? next + i / 2 * STEPS * TILE_BYTES : NULL;
            if (has_second && n_panels - i > 1)
                multiply_block(&x, &w[i], sums, 2, 2, b == 0);
            else if (has_second)
                multiply_block(&x, &w[i], sums, 2, 1, b == 0);
            else if (n_panels - i > 1)
                multiply_block(&x, &w[i], sums, 1, 2, b == 0);
            else
                multiply_block(&x, &w[i], sums, 1, 1, b == 0);
        }
    }
}

/* Multiplies 256 columns of all rows before the next 256, as the amx tier does, and for the same reason. */
static void multiply_rows(unpack_fn unpack_block, const phi_matmul *m, int first, int end) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_TILED_BLOCK, panel_bytes = ROWS * m->row_bytes;
    const size_t block_bytes = panel_bytes / n_blocks;
    float remainder[PHI_TILE_TOKENS][PHI_TILED_TASK_ROWS];
    block w[PANELS];
    for (size_t b = 0; b < n_blocks; b++) {
        for (int row = first; row < end; row += PANELS * ROWS) {
            const int n_left = (end - row) / ROWS, n_panels = n_left < PANELS ? n_left : PANELS;
            const uint8_t *panels = m->rows + (size_t)row * m->row_bytes + b * block_bytes;
            for (int i = 0; i < n_panels; i++) unpack_block(panels + (size_t)i * panel_bytes, &w[i]);
            phi_tiles_fence(w);
            multiply_tokens(m, w, b, row, n_panels, (accumulators){remainder[0] + row - first, sizeof remainder[0]},
                            row + PANELS * ROWS >= end);
        }
    }
    const int n_in_full_tiles = m->n_tokens / PHI_TILE_TOKENS * PHI_TILE_TOKENS;
    for (int t = n_in_full_tiles; t < m->n_tokens; t++)
        memcpy(accumulators_in_output(m, t, first).rows, remainder[t - n_in_full_tiles],
               (size_t)(end - first) * sizeof remainder[0][0]);
}

/* small_batch: the AVX-512 kernel, for batches of up to PHI_AMXBF16_MAX_EXACT_BATCH tokens and activations without
 * tiles. */
static void matmul(unpack_fn unpack_block, void (*small_batch)(const phi_matmul *), const phi_matmul *m) {
    if (m->n_tokens <= PHI_AMXBF16_MAX_EXACT_BATCH || !m->x->tiled.tiles || m->first_token % PHI_TILE_TOKENS != 0) {
        small_batch(m);
        return;
    }
    /* Configured in every call: other libraries in the process may configure tiles too. */
    phi_tiles_configure();
    for (int row = 0; row < m->n_rows; row += PHI_TILED_TASK_ROWS) {
        const int end = row + PHI_TILED_TASK_ROWS;
        multiply_rows(unpack_block, m, row, end < m->n_rows ? end : m->n_rows);
    }
    phi_tiles_release();
}

#define PHI_DEFINE(UPPER, type)                                                                      \
    static void unpack_##type(const uint8_t *unit, block *w) { unpack(PHI_FORMAT_##type, unit, w); } \
    void phi_matmul_packed_##type##_amxbf16(const phi_matmul *m) {                                   \
        matmul(unpack_##type, phi_matmul_packed_##type##_avx512, m);                                 \
    }
PHI_PACKED_TYPES(PHI_DEFINE)
