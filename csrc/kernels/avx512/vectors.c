/* Element-wise kernels on vectors of 16 floats: quantisation, norms, activation functions, residual addition, and
 * storing keys and values in the KV cache. Tails are masked, so that an element's bits do not depend on its index. RoPE
 * is inherited from AVX2: with the few floats of a head, masked stores make it twice as slow here. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../../half.h"
#include "../generic/store_kv.h"
#include "avx512.h"
#include "simd.h"

/* Rounds 16 floats to nearest and clamps to -127 .. 127; NaN (infinity * 0) becomes 127. */
PHI_INLINE __m128i to_int8(__m512 x) {
    const __m512 limit = _mm512_set1_ps(127.0f);
    const __m512 clamped = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(x, limit));
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(clamped));
}

void phi_quantize_q8_avx512(const float *x, size_t n, phi_q8 q8) {
    const __m256i ones = _mm256_set1_epi8(1);
    for (size_t b = 0; b < n / PHI_Q8_BLOCK; b++) {
        const __m512 low = _mm512_loadu_ps(x + b * PHI_Q8_BLOCK), high = _mm512_loadu_ps(x + b * PHI_Q8_BLOCK + 16);
        /* Compared as bits, so that NaN is the largest. */
        const __m512i magnitudes[] = {_mm512_castps_si512(_mm512_abs_ps(low)),
                                      _mm512_castps_si512(_mm512_abs_ps(high))};
        const uint32_t largest = _mm512_reduce_max_epu32(_mm512_max_epu32(magnitudes[0], magnitudes[1]));
        const float scale = phi_float_from_bits(largest) / 127.0f;
        /* As in the scalar kernel, a block whose scale is subnormal becomes zero. */
        const __m512 inverse = _mm512_set1_ps(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
        const __m256i quants =
            _mm256_set_m128i(to_int8(_mm512_mul_ps(high, inverse)), to_int8(_mm512_mul_ps(low, inverse)));
        _mm256_storeu_si256((__m256i *)(void *)(q8.quants + b * PHI_Q8_BLOCK), quants);
        /* Sums of 4, 8, then 16 quants: each 128-bit lane holds one sub-block. */
        const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, quants);
        const __m256i eights = _mm256_hadd_epi32(fours, fours), sums = _mm256_hadd_epi32(eights, eights);
        const int32_t first = _mm256_cvtsi256_si32(sums), second = _mm256_extract_epi32(sums, 4);
        q8.scales[b] = scale;
        q8.sums[2 * b] = scale * (float)first;
        q8.sums[2 * b + 1] = scale * (float)second;
        q8.block_sums[b] = scale * (float)(first + second);
        q8.offsets[2 * b] = -128 * first;
        q8.offsets[2 * b + 1] = -128 * second;
        q8.block_offsets[b] = -128 * (first + second);
    }
}

void phi_rms_norm_avx512(const float *x, const float *weight, size_t n, float eps, float *y) {
    __m512d squares[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (size_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(phi_lanes(n - i), x + i);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
        squares[0] = _mm512_fmadd_pd(low, low, squares[0]);
        squares[1] = _mm512_fmadd_pd(high, high, squares[1]);
    }
    const double total = _mm512_reduce_add_pd(_mm512_add_pd(squares[0], squares[1]));
    const __m512 inverse = _mm512_set1_ps((float)(1.0 / sqrt(total / (double)n + (double)eps)));
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = phi_lanes(n - i);
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), inverse);
        _mm512_mask_storeu_ps(y + i, lanes, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(lanes, weight + i)));
    }
}

void phi_layer_norm_avx512(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y) {
    __m512d sums = _mm512_setzero_pd(), squares = _mm512_setzero_pd();
    for (size_t i = 0; i < n; i += 8)
        sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)phi_lanes(n - i), x + i)));
    const double mean = _mm512_reduce_add_pd(sums) / (double)n;
    for (size_t i = 0; i < n; i += 8) {
        const __mmask8 lanes = (__mmask8)phi_lanes(n - i);
        const __m512d values = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(lanes, x + i));
        const __m512d centred = _mm512_maskz_sub_pd(lanes, values, _mm512_set1_pd(mean));
        squares = _mm512_fmadd_pd(centred, centred, squares);
    }
    const double variance = _mm512_reduce_add_pd(squares) / (double)n;
    const __m512 inverse = _mm512_set1_ps((float)(1.0 / sqrt(variance + (double)eps)));
    const __m512 means = _mm512_set1_ps((float)mean);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = phi_lanes(n - i);
        const __m512 scaled = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, x + i), means), inverse);
        const __m512 weighted = _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(lanes, weight + i));
        _mm512_mask_storeu_ps(y + i, lanes, _mm512_add_ps(weighted, _mm512_maskz_loadu_ps(lanes, bias + i)));
    }
}

void phi_silu_mul_avx512(const float *gate, const float *up, size_t n, float *y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = phi_lanes(n - i);
        const __m512 g = _mm512_maskz_loadu_ps(lanes, gate + i), u = _mm512_maskz_loadu_ps(lanes, up + i);
        const __m512 e = phi_exp(_mm512_sub_ps(_mm512_setzero_ps(), g));
        _mm512_mask_storeu_ps(y + i, lanes, _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, e)), u));
    }
}

/* Uses (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)). */
void phi_gelu_avx512(const float *x, size_t n, float *y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = phi_lanes(n - i);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i), cube = _mm512_mul_ps(_mm512_mul_ps(v, v), v);
        const __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, v);
        const __m512 e = phi_exp(_mm512_mul_ps(_mm512_set1_ps(-2.0f * 0.7978845608f), u));
        _mm512_mask_storeu_ps(y + i, lanes, _mm512_div_ps(v, _mm512_add_ps(one, e)));
    }
}

void phi_add_avx512(const float *x, size_t n, float *y) {
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = phi_lanes(n - i);
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, y + i), _mm512_maskz_loadu_ps(lanes, x + i));
        _mm512_mask_storeu_ps(y + i, lanes, sum);
    }
}

void phi_store_kv_f16_avx512(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    const phi_kv_slice page = phi_kv_slice_of(PHI_KV_F16, head_dim, slice);
    const size_t n = (size_t)head_dim, s = (size_t)slot;
    uint16_t *keys = (uint16_t *)(void *)page.keys + s / PHI_KV_GROUP * n * PHI_KV_GROUP + s % PHI_KV_GROUP;
    uint16_t *values = (uint16_t *)(void *)page.values + s * n;
    for (size_t d = 0; d < n; d += 16) {
        const __mmask16 lanes = phi_lanes(n - d);
        uint16_t halves[16];
        _mm256_storeu_si256((__m256i *)(void *)halves, phi_to_half(_mm512_maskz_loadu_ps(lanes, k + d)));
        for (size_t i = 0; i < 16 && d + i < n; i++) keys[(d + i) * PHI_KV_GROUP] = halves[i];
        _mm256_mask_storeu_epi16(values + d, lanes, phi_to_half(_mm512_maskz_loadu_ps(lanes, v + d)));
    }
}

/* Quantises n <= 32 dimensions to q [32]; returns their scale, as quantize_kv of the scalar tier. */
static uint16_t quantize_kv(const float *x, size_t n, int8_t *q) {
    const __m512 low = _mm512_maskz_loadu_ps(phi_lanes(n), x);
    const __m512 high = n > 16 ? _mm512_maskz_loadu_ps(phi_lanes(n - 16), x + 16) : _mm512_setzero_ps();
    const bool is_number = !_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    const __m512 scales = _mm512_set1_ps(is_number ? largest / 127.0f : NAN);
    const __m256i halves = phi_to_half(scales);
    const float scale = _mm512_cvtss_f32(_mm512_cvtph_ps(halves));
    const bool is_usable = scale > 0.0f && scale < INFINITY;
    const __m512 inverse = _mm512_set1_ps(is_usable ? 1.0f / scale : 0.0f);
    const __mmask16 lanes = is_usable ? 0xffff : 0;
    for (int i = 0; i < 2; i++) {
        const __m512 x_scaled = _mm512_maskz_mul_ps(lanes, i ? high : low, inverse);
        _mm_storeu_si128((__m128i *)(void *)(q + 16 * i), to_int8(x_scaled));
    }
    return (uint16_t)_mm256_extract_epi16(halves, 0);
}

void phi_store_kv_q8_avx512(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    phi_store_kv_q8(quantize_kv, k, v, head_dim, slot, slice);
}
