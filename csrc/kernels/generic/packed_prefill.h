/* Prefill over packed rows, shared by the AVX2 and NEON tiers.
 * Layout: panels of 16 interleaved rows (pack.h). A chunk is CHUNK_BLOCKS * 32 columns of a panel.
 * Idea: a chunk of each of up to PANELS panels is unpacked to L1 once, then multiplied by tiles of tokens, which are of
 * even size because a small tile costs more per token. The first tile prefetches the next chunk.
 * Before it includes this file a tier defines CHUNK_BLOCKS, PANELS, TILE_PANELS and TILE_TOKENS, which is 4; format,
 * with unit_bytes and sub_blocks; chunk; unpack_chunk, which may prefetch at the distance that it is given; and
 * multiply_chunk, which adds the products of n_panels chunks and n_tokens tokens to the output. */
#ifndef PHI_GENERIC_PACKED_PREFILL_H
#define PHI_GENERIC_PACKED_PREFILL_H

#include "pack.h"
#include "unroll.h"

/* Tokens of the next tile, given those left: as few tiles as possible, as even as possible. Two tokens or more never
 * leave a single one. */
PHI_INLINE int next_tile_tokens(int left) {
    const int n_tiles = (left + TILE_TOKENS - 1) / TILE_TOKENS;
    return (left + n_tiles - 1) / n_tiles;
}

/* multiply_chunk for 2 to TILE_TOKENS tokens. n_panels is a compile-time constant once inlined. */
PHI_INLINE void multiply_chunk_tile(const format f, const chunk *c, size_t first_block, int n_blocks,
                                    const phi_matmul *m, int token, int n_tokens, int n_panels, const uint8_t *next,
                                    float *out) {
    if (n_tokens == 2)
        multiply_chunk(f, c, first_block, n_blocks, m, token, 2, n_panels, next, out);
    else if (n_tokens == 3)
        multiply_chunk(f, c, first_block, n_blocks, m, token, 3, n_panels, next, out);
    else
        multiply_chunk(f, c, first_block, n_blocks, m, token, TILE_TOKENS, n_panels, next, out);
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
        for (int p = 0; p < n_panels; p++)
            unpack_chunk(f, columns + (size_t)p * panel_bytes, n, m->prefetch.l2_bytes, &c[p]);
        for (int t = 0; t < m->n_tokens;) {
            const int n_tokens = next_tile_tokens(m->n_tokens - t);
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
