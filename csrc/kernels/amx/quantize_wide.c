/* Activations in int8 with one scale for 256 of them, for products of many tokens.
 * Layout: a token's 64 columns are a row of a tile; its next ones are in the next tile, 1 KiB on (phi_wide_of).
 * Bound: reading the floats; two passes over a block, the second one from the first-level cache. */
#include "amx.h"

#include <float.h>
#include <immintrin.h>

void phi_quantize_wide_amx(const float *x, size_t n, int8_t *tiles, float *scales) {
    const __m512 limit = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
    for (size_t b = 0; b < n / PHI_WIDE_BLOCK; b++) {
        const float *block = x + b * PHI_WIDE_BLOCK;
        __m512 largest = _mm512_setzero_ps();
        for (size_t i = 0; i < PHI_WIDE_BLOCK; i += 16) {
            largest = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(block + i)), largest);
        }
        const float scale = _mm512_reduce_max_ps(largest) / 127.0f;
        /* As phi_quantize_q8_scalar: below the smallest normal scale the block is zero. */
        const __m512 inverse = _mm512_set1_ps(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
        for (size_t i = 0; i < PHI_WIDE_BLOCK; i += 16) {
            const size_t column = b * PHI_WIDE_BLOCK + i;
            int8_t *q = tiles + column / PHI_TILE_COLS * PHI_TILE_COLS * PHI_TILE_TOKENS + column % PHI_TILE_COLS;
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(block + i), inverse);
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_max_ps(least, _mm512_min_ps(limit, scaled)));
            _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtsepi32_epi8(rounded));
        }
        scales[b] = scale;
    }
}
