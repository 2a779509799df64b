/* Converts activations to the tiled bf16 layout of AMX.
 * Layout: 32 columns of a token are one row of a left tile (phi_tiled), the next 32 a row of the next tile.
 * Idea: bf16 has float32's exponent range, so outlier channels cost the others no precision and no scale is needed.
 * Bound: reading the floats. */
#include "amxbf16.h"

#include "bf16.h"

void phi_quantize_tiled_amxbf16(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token) {
    for (size_t b = 0; b < n_cols / PHI_TILED_BLOCK; b++) {
        int8_t *row = phi_tiled_row(tiled, b, token);
        for (size_t i = 0; i < PHI_TILED_BLOCK; i += 32, row += PHI_TILE_TOKENS * PHI_TILE_COLS) {
            const float *source = x + b * PHI_TILED_BLOCK + i;
            _mm512_storeu_si512((void *)row, phi_to_bf16(_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16)));
        }
    }
}
