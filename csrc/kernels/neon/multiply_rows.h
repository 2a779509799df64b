/* All rows by all tokens, for k_products.h and legacy_products.h, which define MAX_TOKENS, format and multiply_row. */
#ifndef PHI_NEON_MULTIPLY_ROWS_H
#define PHI_NEON_MULTIPLY_ROWS_H

#include "../../kernels.h"
#include "../generic/unroll.h"

PHI_INLINE void multiply_rows(const format f, const phi_matmul *m) {
    for (int r = 0; r < m->n_rows; r++) {
        const uint8_t *row = m->rows + (size_t)r * m->row_bytes;
        int t = 0;
        for (; t + MAX_TOKENS <= m->n_tokens; t += MAX_TOKENS) multiply_row(f, m, row, t, MAX_TOKENS, m->out + r);
        for (; t < m->n_tokens; t++) multiply_row(f, m, row, t, 1, m->out + r);
    }
}

#endif
