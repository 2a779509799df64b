/* Element-wise kernels on vectors of eight floats: quantisation, norms, activation functions, residual addition, RoPE,
 * and storing keys and values in the KV cache. */
#include <float.h>
#include <math.h>

#include "../../half.h"
#include "../generic/rotate.h"
#include "../generic/store_kv.h"
#include "avx2.h"
#include "simd.h"

static uint32_t hmax_u32(__m256i v) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1)));
}

void phi_quantize_q8_avx2(const float *x, size_t n, phi_q8 q8) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m256 limit = _mm256_set1_ps(127.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (size_t b = 0; b < n / PHI_Q8_BLOCK; b++) {
        const float *block = x + b * PHI_Q8_BLOCK;
        __m256 v[4];
        __m256i largest = _mm256_setzero_si256(); /* compared as bits, so that NaN is the largest */
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(block + 8 * i);
            largest = _mm256_max_epu32(_mm256_castps_si256(_mm256_and_ps(v[i], magnitude)), largest);
        }
        const float scale = phi_float_from_bits(hmax_u32(largest)) / 127.0f;
        /* As in the scalar kernel, a block whose scale is subnormal becomes zero. */
        const __m256 inverse = _mm256_set1_ps(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
        __m256i q[4];
        for (int i = 0; i < 4; i++) {
            /* NaN (infinity * 0) becomes the limit, as in the scalar kernel, so that sums do not overflow. */
            const __m256 clamped = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit),
                                                 _mm256_min_ps(_mm256_mul_ps(v[i], inverse), limit));
            q[i] = _mm256_cvtps_epi32(clamped);
        }
        const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)(void *)(q8.quants + b * PHI_Q8_BLOCK), bytes);
        const __m256i first = _mm256_add_epi32(q[0], q[1]), second = _mm256_add_epi32(q[2], q[3]);
        /* Exact: sums of small integers. */
        const float sum0 = phi_hsum(_mm256_cvtepi32_ps(first)), sum1 = phi_hsum(_mm256_cvtepi32_ps(second));
        q8.scales[b] = scale;
        q8.sums[2 * b] = scale * sum0;
        q8.sums[2 * b + 1] = scale * sum1;
        q8.block_sums[b] = scale * (sum0 + sum1);
        q8.offsets[2 * b] = -128 * (int32_t)sum0;
        q8.offsets[2 * b + 1] = -128 * (int32_t)sum1;
        q8.block_offsets[b] = -128 * (int32_t)(sum0 + sum1);
    }
}

void phi_rms_norm_avx2(const float *x, const float *weight, size_t n, float eps, float *y) {
    const size_t n8 = n / 8 * 8;
    __m256d squares[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (size_t i = 0; i < n8; i += 8) {
        const __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(x + i)), b = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4));
        squares[0] = _mm256_fmadd_pd(a, a, squares[0]);
        squares[1] = _mm256_fmadd_pd(b, b, squares[1]);
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(squares[0], squares[1]));
    double total = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    for (size_t i = n8; i < n; i++) total += (double)x[i] * (double)x[i];

    const float inverse = (float)(1.0 / sqrt(total / (double)n + (double)eps));
    for (size_t i = 0; i < n8; i += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(inverse));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(scaled, _mm256_loadu_ps(weight + i)));
    }
    for (size_t i = n8; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

void phi_layer_norm_avx2(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y) {
    const size_t n4 = n / 4 * 4, n8 = n / 8 * 8;
    double lanes[4];
    __m256d sums = _mm256_setzero_pd(), squares = _mm256_setzero_pd();
    for (size_t i = 0; i < n4; i += 4) sums = _mm256_add_pd(sums, _mm256_cvtps_pd(_mm_loadu_ps(x + i)));
    _mm256_storeu_pd(lanes, sums);
    double total = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    for (size_t i = n4; i < n; i++) total += (double)x[i];
    const double mean = total / (double)n;

    for (size_t i = 0; i < n4; i += 4) {
        const __m256d centred = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + i)), _mm256_set1_pd(mean));
        squares = _mm256_fmadd_pd(centred, centred, squares);
    }
    _mm256_storeu_pd(lanes, squares);
    total = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    for (size_t i = n4; i < n; i++) total += ((double)x[i] - mean) * ((double)x[i] - mean);

    const float inverse = (float)(1.0 / sqrt(total / (double)n + (double)eps));
    const __m256 means = _mm256_set1_ps((float)mean);
    for (size_t i = 0; i < n8; i += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), means), _mm256_set1_ps(inverse));
        const __m256 weighted = _mm256_mul_ps(scaled, _mm256_loadu_ps(weight + i));
        _mm256_storeu_ps(y + i, _mm256_add_ps(weighted, _mm256_loadu_ps(bias + i)));
    }
    for (size_t i = n8; i < n; i++) y[i] = (x[i] - (float)mean) * inverse * weight[i] + bias[i];
}

PHI_INLINE __m256 silu_mul(__m256 gate, __m256 up) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 e = phi_exp(_mm256_sub_ps(_mm256_setzero_ps(), gate));
    return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(one, e)), up);
}

void phi_silu_mul_avx2(const float *gate, const float *up, size_t n, float *y) {
    const size_t n8 = n / 8 * 8;
    for (size_t i = 0; i < n8; i += 8)
        _mm256_storeu_ps(y + i, silu_mul(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
    if (n8 < n) { /* same operations, so that an element's bits do not depend on its index */
        float g[8] = {0}, u[8] = {0};
        memcpy(g, gate + n8, (n - n8) * sizeof *g);
        memcpy(u, up + n8, (n - n8) * sizeof *u);
        _mm256_storeu_ps(g, silu_mul(_mm256_loadu_ps(g), _mm256_loadu_ps(u)));
        memcpy(y + n8, g, (n - n8) * sizeof *g);
    }
}

/* Uses (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)). */
PHI_INLINE __m256 gelu(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), cube = _mm256_mul_ps(_mm256_mul_ps(x, x), x);
    const __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(0.044715f), cube, x);
    const __m256 e = phi_exp(_mm256_mul_ps(_mm256_set1_ps(-2.0f * 0.7978845608f), u));
    /* phi_exp saturates, so that -infinity / (1 + e) would be -infinity instead of 0. */
    const __m256 bounded = _mm256_max_ps(_mm256_set1_ps(-1e6f), x);
    return _mm256_div_ps(bounded, _mm256_add_ps(one, e));
}

void phi_gelu_avx2(const float *x, size_t n, float *y) {
    const size_t n8 = n / 8 * 8;
    for (size_t i = 0; i < n8; i += 8) _mm256_storeu_ps(y + i, gelu(_mm256_loadu_ps(x + i)));
    if (n8 < n) { /* same operations, so that an element's bits do not depend on its index */
        float tail[8] = {0};
        memcpy(tail, x + n8, (n - n8) * sizeof *tail);
        _mm256_storeu_ps(tail, gelu(_mm256_loadu_ps(tail)));
        memcpy(y + n8, tail, (n - n8) * sizeof *tail);
    }
}

void phi_add_avx2(const float *x, size_t n, float *y) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_loadu_ps(y + i), _mm256_loadu_ps(x + i)));
    for (; i < n; i++) y[i] += x[i];
}

/* Multiplications and additions are not fused, as in the scalar kernel: RoPE gives the same bits on all tiers. */
void phi_rope_neox_avx2(float *x, int rope_dims, const float *cos, const float *sin) {
    const size_t half = (size_t)rope_dims / 2;
    size_t i = 0;
    for (; i + 8 <= half; i += 8) {
        const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + half + i);
        const __m256 c = _mm256_loadu_ps(cos + i), s = _mm256_loadu_ps(sin + i);
        _mm256_storeu_ps(x + i, _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s)));
        _mm256_storeu_ps(x + half + i, _mm256_add_ps(_mm256_mul_ps(b, c), _mm256_mul_ps(a, s)));
    }
    for (; i < half; i++) phi_rotate(x + i, x + half + i, cos[i], sin[i]);
}

PHI_INLINE __m256 repeat_each(const float *p) {
    const __m256i order = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), order);
}

void phi_rope_interleaved_avx2(float *x, int rope_dims, const float *cos, const float *sin) {
    const size_t n = (size_t)rope_dims;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i), swapped = _mm256_permute_ps(v, 0xb1);
        const __m256 product = _mm256_mul_ps(v, repeat_each(cos + i / 2));
        _mm256_storeu_ps(x + i, _mm256_addsub_ps(product, _mm256_mul_ps(swapped, repeat_each(sin + i / 2))));
    }
    for (; i < n; i += 2) phi_rotate(x + i, x + i + 1, cos[i / 2], sin[i / 2]);
}

PHI_INLINE void to_half(const float *x, uint16_t *halves) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)halves, h);
}

void phi_store_kv_f16_avx2(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    phi_store_kv_f16(to_half, 8, k, v, head_dim, slot, slice);
}

/* Quantises n <= 32 dimensions to q [32]; returns their scale, as quantize_kv of the scalar tier. */
static uint16_t quantize_kv(const float *x, size_t n, int8_t *q) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), limit = _mm256_set1_ps(127.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    float padded[PHI_KV_BLOCK] = {0};
    memcpy(padded, x, n * sizeof *padded);
    __m256 v[4], largest = _mm256_setzero_ps(), has_nan = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(padded + 8 * i);
        largest = _mm256_max_ps(_mm256_and_ps(v[i], magnitude), largest);
        has_nan = _mm256_or_ps(has_nan, _mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q));
    }
    const float raw_scale = _mm256_movemask_ps(has_nan) ? NAN : phi_hmax(largest) / 127.0f;
    const uint16_t half = (uint16_t)_cvtss_sh(raw_scale, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const float scale = phi_half(half);
    if (!(scale > 0.0f && scale < INFINITY)) {
        memset(q, 0, PHI_KV_BLOCK);
        return half;
    }
    const __m256 inverse = _mm256_set1_ps(1.0f / scale);
    __m256i w[4];
    for (int i = 0; i < 4; i++) {
        const __m256 clamped = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit),
                                             _mm256_min_ps(limit, _mm256_mul_ps(v[i], inverse)));
        w[i] = _mm256_cvtps_epi32(clamped);
    }
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(w[0], w[1]), _mm256_packs_epi32(w[2], w[3]));
    phi_store(q, _mm256_permutevar8x32_epi32(words, order));
    return half;
}

void phi_store_kv_q8_avx2(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    phi_store_kv_q8(quantize_kv, k, v, head_dim, slot, slice);
}
