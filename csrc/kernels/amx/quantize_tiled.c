/* Quantises activations to the tiled int8 layout of AMX: a high and a low int8 part, one scale per 256 activations.
 * Layout: 64 columns of a token are one row of a tile (phi_tiled); four tiles of high parts, then four of low parts.
 * Idea: the low part holds the rounding error of the high part in 1/PHI_TILED_LOW_STEPS steps. On a model with outlier
 * channels, int8 with one scale per 256 has five times the KL divergence of one scale per 32; with the low part the
 * divergence is below that of one scale per 32 (docs/performance.md).
 * Bound: reading the floats. A block is read twice, the second time from L1. */
#include "amx.h"

#include <float.h>
#include <immintrin.h>

#include "../../half.h"

static void store_16_int8(int8_t *bytes, __m512i dwords) {
    _mm_storeu_si128((__m128i *)(void *)bytes, _mm512_cvtsepi32_epi8(dwords));
}

void phi_quantize_tiled_amx(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token) {
    const __m512 upper = _mm512_set1_ps(127.0f), lower = _mm512_set1_ps(-127.0f);
    for (size_t b = 0; b < n_cols / PHI_TILED_BLOCK; b++) {
        const float *block = x + b * PHI_TILED_BLOCK;
        int8_t *row = phi_tiled_row(tiled, b, token);
        __m512i max_bits = _mm512_setzero_si512(); /* magnitudes compared as integers: NaN is above every number */
        for (size_t i = 0; i < PHI_TILED_BLOCK; i += 16) {
            max_bits = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(block + i))), max_bits);
        }
        const float scale = phi_float_from_bits(_mm512_reduce_max_epu32(max_bits)) / 127.0f;
        /* As in phi_quantize_q8_scalar: a block whose scale is below the smallest normal float becomes 0. */
        const __m512 inverse = _mm512_set1_ps(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
        for (size_t i = 0; i < PHI_TILED_BLOCK; i += 16) {
            int8_t *high_part = row + i / PHI_TILE_COLS * PHI_TILE_COLS * PHI_TILE_TOKENS + i % PHI_TILE_COLS;
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(block + i), inverse);
            const __m512 clamped = _mm512_max_ps(lower, _mm512_min_ps(upper, scaled));
            const __m512i high = _mm512_cvtps_epi32(clamped);
            const __m512 error = _mm512_sub_ps(clamped, _mm512_cvtepi32_ps(high)); /* exact, at most 1/2 */
            store_16_int8(high_part, high);
            store_16_int8(high_part + PHI_TILE_TOKENS * PHI_TILED_BLOCK,
                          _mm512_cvtps_epi32(_mm512_mul_ps(error, _mm512_set1_ps((float)PHI_TILED_LOW_STEPS))));
        }
        tiled->scales[b * tiled->n_tokens + token] = scale;
    }
}
