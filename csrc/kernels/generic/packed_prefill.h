/* Prefill over packed rows, shared by the AVX2, AVX-512 and NEON tiers.
 * Layout: panels of 16 interleaved rows (pack.h). A chunk is CHUNK_BLOCKS * 32 columns of a panel.
 * Idea: a chunk of each of up to PANELS panels is unpacked to L1 once, then multiplied by tiles of tokens. The first
 * tile prefetches the next chunk.
 * Before it includes this file a tier defines CHUNK_BLOCKS, PANELS, TILE_PANELS and PREFILL_TILE_TOKENS; format, with
 * unit_bytes and sub_blocks; chunk; unpack_chunk; multiply_chunk, which adds the products of n_panels chunks and
 * n_tokens tokens to the output; and prefill_tile_tokens, the tokens of the next tile given those left:
 * PREFILL_TILE_TOKENS, 4 or 1. */
#ifndef PHI_GENERIC_PACKED_PREFILL_H
#define PHI_GENERIC_PACKED_PREFILL_H

#include "pack.h"
#include "unroll.h"

/* multiply_chunk for any n_tokens that prefill_tile_tokens returns. n_panels is a compile-time constant once inlined.
 */
PHI_INLINE void multiply_chunk_tile(const format f, const chunk *c, size_t first_block, int n_blocks,
                                    const phi_matmul *m, int token, int n_tokens, int n_panels, const uint8_t *next,
                                    float *out) {
    if (n_tokens == PREFILL_TILE_TOKENS)
        multiply_chunk(f, c, first_block, n_blocks, m, token, PREFILL_TILE_TOKENS, n_panels, next, out);
    else if (n_tokens == 4)
        multiply_chunk(f, c, first_block, n_blocks, m, token, 4, n_panels, next, out);
    else
        multiply_chunk(f, c, first_block, n_blocks, m, token, 1, n_panels, next, out);
}

/* All columns of n_panels panels, chunk by chunk, for all tokens. */
PHI_INLINE void multiply_prefill(const format f, const uint8_t *panels, const phi_matmul *m, int n_panels, float *out) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_Q8_BLOCK, panel_bytes = PHI_PANEL_ROWS * m->row_bytes;
    for (size_t b = 0; b < n_blocks; b += CHUNK_BLOCKS) {
        const int n = n_blocks - b < CHUNK_BLOCKS ? (int)(n_blocks - b) : CHUNK_BLOCKS;
        const uint8_t *columns = panels + b / (size_t)f.sub_blocks * f.unit_bytes;
        const bool is_last = b + CHUNK_BLOCKS >= n_blocks;
        const uint8_t *next = is_last ? panels + (size_t)n_panels * panel_bytes
                                      : columns + (size_t)(CHUNK_BLOCKS / f.sub_blocks) * f.unit_bytes;
        chunk c[PANELS];
        for (int p = 0; p < n_panels; p++) unpack_chunk(f, columns + (size_t)p * panel_bytes, n, &c[p]);
        for (int t = 0; t < m->n_tokens;) {
            const int n_tokens = prefill_tile_tokens(f, m->n_tokens - t);
            for (int p = 0; p < n_panels; p += TILE_PANELS) {
                const uint8_t *to_prefetch = t == 0 ? next + (size_t)p * panel_bytes : NULL;
                float *rows = out + p * PHI_PANEL_ROWS;
                if (n_panels - p >= TILE_PANELS)
                    multiply_chunk_tile(f, c + p, b, n, m, t, n_tokens, TILE_PANELS, to_prefetch, rows);
                else
                    multiply_chunk_tile(f, c + p, b, n, m, t, n_tokens, 1, to_prefetch, rows);
            }
            t += n_tokens;
        }
    }
}

/* PANELS, or the number of panels left from row r on. */
PHI_INLINE int panels_from(const phi_matmul *m, int r) {
    const int n_left = (m->n_rows - r) / PHI_PANEL_ROWS;
    return n_left < PANELS ? n_left : PANELS;
}

#endif
