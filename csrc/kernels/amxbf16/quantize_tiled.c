/* Activations in bf16, for products of many tokens.
 * Layout: 32 columns of a token are a row of a left tile (phi_tiled), the next 32 a row of the next tile.
 * Idea: bf16 has the exponents of float, so that outlier channels cost their neighbours nothing and no scale is kept.
 * Bound: reading the floats. */
#include "amxbf16.h"

#include "bf16.h"

void phi_quantize_tiled_amxbf16(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token) {
    for (size_t b = 0; b < n_cols / PHI_TILED_BLOCK; b++) {
        int8_t *row = phi_tiled_row(tiled, b, token);
        for (size_t i = 0; i < PHI_TILED_BLOCK; i += 32, row += PHI_TILE_TOKENS * PHI_TILE_COLS) {
            const float *from = x + b * PHI_TILED_BLOCK + i;
            _mm512_storeu_si512((void *)row, phi_to_bf16(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)));
        }
    }
}
