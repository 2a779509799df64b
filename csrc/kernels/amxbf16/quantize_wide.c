/* Activations in bf16, for products of many tokens.
 * Layout: 32 columns of a token are a row of a left tile (phi_wide_of), the next 32 a row of the next tile.
 * Idea: bf16 has the exponents of float, so that outlier channels cost their neighbours nothing and no scale is kept.
 * Bound: reading the floats. */
#include "amxbf16.h"

#include "bf16.h"

void phi_quantize_wide_amxbf16(const float *x, size_t n_cols, int8_t *wide, float *scales) {
    (void)scales;
    for (size_t i = 0; i < n_cols; i += 32, wide += PHI_TILE_TOKENS * PHI_TILE_COLS)
        _mm512_storeu_si512((void *)wide, phi_to_bf16(_mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i + 16)));
}
