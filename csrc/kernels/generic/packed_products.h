/* Products of packed rows for any number of tokens, shared by the AVX2 and NEON tiers, which multiply small batches of
 * up to four tokens in one pass over a panel. A tier defines multiply_small_batch and what packed_prefill.h needs,
 * except for prefill_tile_tokens. */
#ifndef PHI_GENERIC_PACKED_PRODUCTS_H
#define PHI_GENERIC_PACKED_PRODUCTS_H

#include "unroll.h"

/* Tokens of the next prefill tile, given those left. */
PHI_INLINE int prefill_tile_tokens(const format f, int left) {
    (void)f;
    return left >= PREFILL_TILE_TOKENS ? PREFILL_TILE_TOKENS : 1;
}

#include "packed_prefill.h"

PHI_INLINE void multiply_packed(const format f, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows;) {
        const uint8_t *panel = m->rows + (size_t)r * m->row_bytes;
        float *out = m->out + r;
        int n_panels = 1;
        switch (m->n_tokens <= m->max_small_batch ? m->n_tokens : 0) {
        case 1:
            multiply_small_batch(f, panel, m, 1, out);
            break;
        case 2:
            multiply_small_batch(f, panel, m, 2, out);
            break;
        case 3:
            multiply_small_batch(f, panel, m, 3, out);
            break;
        case 4:
            multiply_small_batch(f, panel, m, 4, out);
            break;
        default:
            n_panels = panels_from(m, r);
            multiply_prefill(f, panel, m, n_panels, out);
        }
        r += n_panels * PHI_PANEL_ROWS;
    }
}

#endif
