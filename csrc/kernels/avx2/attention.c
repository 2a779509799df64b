/* Attention over pages of the KV cache in half precision or int8: the steps that generic/attention_tile.h calls.
 * Layout: phi_kv_slice: keys [2 groups][head_dim][16 positions], values [position][head_dim].
 * Idea: a tile keeps the sums of 4 rows x 2 vectors in registers, over converted keys (16 positions at a time) and
 * values (16 dimensions). A single row reads the pages directly and prefetches what it reads next.
 * Bound: one row: reading the pages, 4 bytes (int8: 2.1) per position and dimension; more rows: the FMAs. */
#include "../generic/attention_tile.h"
#include "../x86/prefetch.h"

#include <math.h>

#include "avx2.h"
#include "simd.h"

enum { ROWS = 4, BLOCK = PHI_ATTENTION_BLOCK };

/* Scales of the eight keys in slots first .. first + 7, for the block of PHI_KV_BLOCK dimensions that holds d. Unused
 * with F16. */
PHI_INLINE __m256 key_scales(phi_kv_type type, const phi_kv_slice *page, size_t d, size_t first) {
    if (type == PHI_KV_F16) return _mm256_setzero_ps();
    return phi_load_half(page->key_scales + d / PHI_KV_BLOCK * PHI_PAGE_TOKENS + first);
}

PHI_INLINE __m256 floats_from_int8(__m128i q) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)); }

/* Dimension d of the eight keys in slots first .. first + 7. */
PHI_INLINE __m256 load_keys(phi_kv_type type, const phi_kv_slice *page, size_t head_dim, size_t d, size_t first,
                            __m256 scales) {
    const size_t at = (first / PHI_KV_GROUP * head_dim + d) * PHI_KV_GROUP + first % PHI_KV_GROUP;
    if (type == PHI_KV_F16) return phi_load_half((const uint16_t *)(const void *)page->keys + at);
    return _mm256_mul_ps(floats_from_int8(_mm_loadl_epi64((const __m128i *)(const void *)(page->keys + at))), scales);
}

/* What attention_values.h and attention_one_row.h need. */

enum { STEP = 8 };

typedef __m256 vector;
typedef __m256 eight_floats;

PHI_INLINE vector load_floats(const float *x) { return _mm256_loadu_ps(x); }
PHI_INLINE void store_floats(float *x, vector v) { _mm256_storeu_ps(x, v); }
PHI_INLINE vector repeat_float(const float *x) { return _mm256_broadcast_ss(x); }
PHI_INLINE vector multiply(vector a, vector b) { return _mm256_mul_ps(a, b); }
PHI_INLINE vector multiply_add(vector a, vector b, vector sum) { return _mm256_fmadd_ps(a, b, sum); }
PHI_INLINE eight_floats eight_zeros(void) { return _mm256_setzero_ps(); }
PHI_INLINE void store_eight(float *x, eight_floats v) { _mm256_storeu_ps(x, v); }
PHI_INLINE eight_floats eight_from_half(const uint8_t *x) { return phi_load_half((const uint16_t *)(const void *)x); }
PHI_INLINE eight_floats eight_from_int8(const uint8_t *x, const uint16_t *scale) {
    const __m256 scales = _mm256_cvtph_ps(_mm_set1_epi16((short)*scale));
    return _mm256_mul_ps(floats_from_int8(_mm_loadl_epi64((const __m128i *)(const void *)x)), scales);
}

#include "../generic/attention_values.h"

#include "../x86/attention_one_row.h"

PHI_INLINE void convert_keys(const phi_attention *a, phi_kv_type type, int page, float *keys) {
    const size_t head_dim = (size_t)a->head_dim;
    const phi_kv_slice p = phi_kv_slice_at(a, type, page);
    for (size_t b = 0; b < head_dim; b += PHI_KV_BLOCK) {
        for (size_t first = 0; first < PHI_PAGE_TOKENS; first += 8) {
            const __m256 scales = key_scales(type, &p, b, first);
            for (size_t d = b; d < head_dim && d < b + PHI_KV_BLOCK; d++)
                _mm256_storeu_ps(keys + d * PHI_PAGE_TOKENS + first, load_keys(type, &p, head_dim, d, first, scales));
        }
    }
    for (size_t i = 0; i < head_dim * PHI_PAGE_TOKENS * phi_kv_element_bytes(type); i += CACHE_LINE_BYTES)
        prefetch_l2_line(p.values + i);
}

/* s = q * k over the even (parity 0) or odd (parity 1) dimensions, for 16 positions. */
PHI_INLINE void multiply_qk(const phi_query_tile *t, const float *keys, size_t head_dim, size_t parity,
                            __m256 s[ROWS][2]) {
    UNROLL for (int r = 0; r < ROWS; r++) s[r][0] = s[r][1] = _mm256_setzero_ps();
    for (size_t d = parity; d < head_dim; d += 2) { /* head_dim is even */
        const __m256 k0 = _mm256_loadu_ps(keys + d * PHI_PAGE_TOKENS);
        const __m256 k1 = _mm256_loadu_ps(keys + d * PHI_PAGE_TOKENS + 8);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const __m256 q = _mm256_broadcast_ss(t->q + d * ROWS + r);
            s[r][0] = _mm256_fmadd_ps(q, k0, s[r][0]);
            s[r][1] = _mm256_fmadd_ps(q, k1, s[r][1]);
        }
    }
}

/* Stores a row's scores for eight positions from `position` on, -infinity at masked ones. */
PHI_INLINE void store_scores(const phi_query_tile *t, int row, int position, __m256 s, float *scores) {
    if (position < t->all_first || position + 7 > t->all_last) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i at = _mm256_add_epi32(lane, _mm256_set1_epi32(position));
        const __m256i masked = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(t->row_first[row]), at),
                                               _mm256_cmpgt_epi32(at, _mm256_set1_epi32(t->row_last[row])));
        s = _mm256_blendv_ps(s, _mm256_set1_ps(-INFINITY), _mm256_castsi256_ps(masked));
    }
    _mm256_storeu_ps(scores, s);
}

static void compute_scores(const phi_attention *a, const phi_query_tile *t, int page, const float *keys,
                           float *scores) {
    for (int i = 0; i < PHI_PAGE_TOKENS; i += PHI_KV_GROUP) {
        __m256 even[ROWS][2], odd[ROWS][2]; /* the same bits as compute_scores_one, which needs four independent sums */
        multiply_qk(t, keys + i, (size_t)a->head_dim, 0, even);
        multiply_qk(t, keys + i, (size_t)a->head_dim, 1, odd);
        UNROLL for (int r = 0; r < ROWS; r++) {
            store_scores(t, r, page + i, _mm256_add_ps(even[r][0], odd[r][0]), scores + r * BLOCK + i);
            store_scores(t, r, page + i + 8, _mm256_add_ps(even[r][1], odd[r][1]), scores + r * BLOCK + i + 8);
        }
    }
}

PHI_INLINE void compute_scores_one(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int page,
                                   float *scores) {
    const size_t head_dim = (size_t)a->head_dim, line = PHI_KV_GROUP * phi_kv_element_bytes(type);
    const phi_kv_slice p = phi_kv_slice_at(a, type, page);
    for (size_t i = 0; i < PHI_PAGE_TOKENS; i += PHI_KV_GROUP) {
        __m256 s[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (size_t b = 0; b < head_dim; b += PHI_KV_BLOCK) {
            const __m256 low = key_scales(type, &p, b, i), high = key_scales(type, &p, b, i + 8);
            for (size_t d = b; d < head_dim && d < b + PHI_KV_BLOCK; d += 2) {
                prefetch_l2_line(p.values + (i / PHI_KV_GROUP * head_dim + d) * line);
                const __m256 q0 = _mm256_broadcast_ss(t->q + d), q1 = _mm256_broadcast_ss(t->q + d + 1);
                s[0] = _mm256_fmadd_ps(q0, load_keys(type, &p, head_dim, d, i, low), s[0]);
                s[1] = _mm256_fmadd_ps(q0, load_keys(type, &p, head_dim, d, i + 8, high), s[1]);
                s[2] = _mm256_fmadd_ps(q1, load_keys(type, &p, head_dim, d + 1, i, low), s[2]);
                s[3] = _mm256_fmadd_ps(q1, load_keys(type, &p, head_dim, d + 1, i + 8, high), s[3]);
            }
        }
        store_scores(t, 0, page + (int)i, _mm256_add_ps(s[0], s[2]), scores + i);
        store_scores(t, 0, page + (int)i + 8, _mm256_add_ps(s[1], s[3]), scores + i + 8);
    }
}

/* e^x; 0 where the result would be subnormal. */
PHI_INLINE __m256 exp_or_zero(__m256 x) {
    return _mm256_and_ps(phi_exp(x), _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_NLT_UQ));
}

static void update_softmax(phi_query_tile *t, int row, float *scores, int n) {
    __m256 lane_max = _mm256_set1_ps(t->row_max[row]);
    for (int i = 0; i < n; i += 8) lane_max = _mm256_max_ps(_mm256_loadu_ps(scores + i), lane_max);
    const float row_max = phi_hmax(lane_max);
    const __m256 row_max_v = _mm256_set1_ps(row_max),
                 rescale = exp_or_zero(_mm256_sub_ps(_mm256_set1_ps(t->row_max[row]), row_max_v));
    __m256 row_sum = _mm256_mul_ps(_mm256_loadu_ps(t->row_sum[row]), rescale);
    for (int i = 0; i < n; i += 8) {
        const __m256 weight = exp_or_zero(_mm256_sub_ps(_mm256_loadu_ps(scores + i), row_max_v));
        _mm256_storeu_ps(scores + i, weight);
        row_sum = _mm256_add_ps(row_sum, weight);
    }
    _mm256_storeu_ps(t->row_sum[row], row_sum);
    t->row_max[row] = row_max;
    t->rescale[row] = _mm256_cvtss_f32(rescale);
}

static void accumulate_pv(const phi_query_tile *t, const float *weights, const float *values, int n, size_t first_dim) {
    for (size_t d = 0; d < PHI_VALUE_DIMS; d += 16) {
        __m256 sum[ROWS][2];
        UNROLL for (int r = 0; r < ROWS; r++) {
            const float *acc = t->acc + (size_t)r * t->acc_stride + first_dim + d;
            const __m256 rescale = _mm256_set1_ps(t->rescale[r]);
            sum[r][0] = _mm256_mul_ps(_mm256_loadu_ps(acc), rescale);
            sum[r][1] = _mm256_mul_ps(_mm256_loadu_ps(acc + 8), rescale);
        }
        const float *v = values + d;
        for (int p = 0; p < n; p++, v += PHI_VALUE_DIMS) {
            const __m256 v0 = _mm256_loadu_ps(v), v1 = _mm256_loadu_ps(v + 8);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m256 weight = _mm256_broadcast_ss(weights + r * BLOCK + p);
                sum[r][0] = _mm256_fmadd_ps(weight, v0, sum[r][0]);
                sum[r][1] = _mm256_fmadd_ps(weight, v1, sum[r][1]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            float *acc = t->acc + (size_t)r * t->acc_stride + first_dim + d;
            _mm256_storeu_ps(acc, sum[r][0]);
            _mm256_storeu_ps(acc + 8, sum[r][1]);
        }
    }
}

PHI_INLINE void accumulate_pv_one(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int first, int end,
                                  const float *weights) {
    const size_t head_dim = (size_t)a->head_dim;
    size_t d = 0;
    if (head_dim % 96 == 0)
        for (; d < head_dim; d += 96) accumulate_pv_dims(a, type, t, first, end, weights, d, 12, 8);
    for (; d + 64 <= head_dim; d += 64) accumulate_pv_dims(a, type, t, first, end, weights, d, 8, 8);
    for (; d + 8 <= head_dim; d += 8) accumulate_pv_dims(a, type, t, first, end, weights, d, 1, 8);
    if (d < head_dim) accumulate_pv_dims(a, type, t, first, end, weights, d, 1, head_dim - d);
}

PHI_DEFINE_ATTENTION(PHI_KV_F16, f16, avx2)
PHI_DEFINE_ATTENTION(PHI_KV_Q8, q8, avx2)
