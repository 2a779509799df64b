/* Products of packed rows for any number of tokens, shared by the AVX2 and NEON tiers, which multiply small batches
 * tile by tile, each in one pass over a panel. A tier defines what packed_prefill.h needs; multiply_small_tile, for up
 * to TILE_TOKENS tokens; and max_small_batch, the largest batch for which that is fast. */
#ifndef PHI_GENERIC_PACKED_PRODUCTS_H
#define PHI_GENERIC_PACKED_PRODUCTS_H

#include "packed_prefill.h"
#include "unroll.h"

/* All columns of one panel. Later tiles read it from a cache. */
PHI_INLINE void multiply_small_batch(const format f, const uint8_t *panel, const phi_matmul *m, float *out) {
    for (int t = 0, n_tokens; t < m->n_tokens; t += n_tokens) {
        n_tokens = next_tile_tokens(m->n_tokens - t);
        if (n_tokens == 2)
            multiply_small_tile(f, panel, m, t, 2, out);
        else if (n_tokens == 3)
            multiply_small_tile(f, panel, m, t, 3, out);
        else
            multiply_small_tile(f, panel, m, t, TILE_TOKENS, out);
    }
}

PHI_INLINE void multiply_packed(const format f, const phi_matmul *m) {
    const bool is_small = m->n_tokens <= m->max_small_batch && m->n_tokens <= max_small_batch(f);
    int n_panels;
    for (int r = 0; r < m->n_rows; r += n_panels * PHI_PANEL_ROWS) {
        const uint8_t *panels = m->rows + (size_t)r * m->row_bytes;
        float *out = m->out + r;
        n_panels = is_small ? 1 : panels_from(m, r);
        if (m->n_tokens == 1)
            multiply_small_tile(f, panels, m, 0, 1, out);
        else if (is_small)
            multiply_small_batch(f, panels, m, out);
        else
            multiply_prefill(f, panels, m, n_panels, out);
    }
}

#endif
