/* Activations in two int8 parts with one scale for 256 of them, for products of many tokens.
 * Layout: 64 columns of a token are a row of a tile (phi_tiled); tiles of the low part follow those of the high part.
 * Idea: one scale for 256 costs a model with outlier channels five times the divergence of one for 32; what rounding to
 * the high part leaves, in int8 again, brings it below that (docs/performance.md).
 * Bound: reading the floats; two passes over a block, the second one from the first-level cache. */
#include "amx.h"

#include <float.h>
#include <immintrin.h>

#include "../../half.h"

static void store_16(int8_t *bytes, __m512i dwords) {
    _mm_storeu_si128((__m128i *)(void *)bytes, _mm512_cvtsepi32_epi8(dwords));
}

void phi_quantize_tiled_amx(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token) {
    const __m512 limit = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
    for (size_t b = 0; b < n_cols / PHI_TILED_BLOCK; b++) {
        const float *block = x + b * PHI_TILED_BLOCK;
        int8_t *row = phi_tiled_row(tiled, b, token);
        __m512i largest = _mm512_setzero_si512(); /* as bits: NaN is above all numbers */
        for (size_t i = 0; i < PHI_TILED_BLOCK; i += 16) {
            largest = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(block + i))), largest);
        }
        const float scale = phi_float_from_bits(_mm512_reduce_max_epu32(largest)) / 127.0f;
        /* As phi_quantize_q8_scalar: below the smallest normal scale the block is zero. */
        const __m512 inverse = _mm512_set1_ps(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
        for (size_t i = 0; i < PHI_TILED_BLOCK; i += 16) {
            int8_t *high_part = row + i / PHI_TILE_COLS * PHI_TILE_COLS * PHI_TILE_TOKENS + i % PHI_TILE_COLS;
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(block + i), inverse);
            const __m512 clamped = _mm512_max_ps(least, _mm512_min_ps(limit, scaled));
            const __m512i high = _mm512_cvtps_epi32(clamped);
            const __m512 rest = _mm512_sub_ps(clamped, _mm512_cvtepi32_ps(high)); /* exact, at most a half */
            store_16(high_part, high);
            store_16(high_part + PHI_TILE_TOKENS * PHI_TILED_BLOCK,
                     _mm512_cvtps_epi32(_mm512_mul_ps(rest, _mm512_set1_ps((float)PHI_TILED_LOW_STEPS))));
        }
        tiled->scales[b * tiled->n_tokens + token] = scale;
    }
}
