/* Attention over pages of the KV cache in half precision or int8: the steps that generic/attention_tile.h calls.
 * Layout: phi_kv_slice: keys [2 groups][head_dim][16 positions], values [position][head_dim].
 * Idea: a tile keeps the sums of 8 rows x 2 vectors in registers, over converted keys (the 32 positions of a page) and
 * values (32 dimensions). A single row reads the pages directly and prefetches what it reads next.
 * Bound: one row: reading the pages, 4 bytes (int8: 2.1) per position and dimension; more rows: the FMAs. */
#include "../generic/attention_tile.h"
#include "../x86/prefetch.h"

#include <math.h>

#include "avx512.h"
#include "simd.h"

enum { ROWS = PHI_QUERY_TILE_ROWS, BLOCK = PHI_ATTENTION_BLOCK };

PHI_INLINE __m512 load_halves(const uint16_t *h) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)h));
}

/* Scales of the 16 keys of a group, for the block of PHI_KV_BLOCK dimensions that holds d. Unused with F16. */
PHI_INLINE __m512 key_scales(phi_kv_type type, const phi_kv_slice *page, size_t d, size_t group) {
    if (type == PHI_KV_F16) return _mm512_setzero_ps();
    return load_halves(page->key_scales + d / PHI_KV_BLOCK * PHI_PAGE_TOKENS + group * PHI_KV_GROUP);
}

/* Dimension d of the 16 keys of a group. */
PHI_INLINE __m512 load_keys(phi_kv_type type, const phi_kv_slice *page, size_t head_dim, size_t d, size_t group,
                            __m512 scales) {
    const size_t at = (group * head_dim + d) * PHI_KV_GROUP;
    if (type == PHI_KV_F16) return load_halves((const uint16_t *)(const void *)page->keys + at);
    const __m128i q = _mm_loadu_si128((const __m128i *)(const void *)(page->keys + at));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), scales);
}

/* The first n of dimensions d .. d + 15 of the value in a slot, then zeros. */
PHI_INLINE __m512 load_values(phi_kv_type type, const phi_kv_slice *page, size_t head_dim, size_t slot, size_t d,
                              size_t n) {
    const size_t at = slot * head_dim + d;
    const __mmask16 lanes = phi_lanes(n);
    if (type == PHI_KV_F16) {
        const uint16_t *values = (const uint16_t *)(const void *)page->values;
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, values + at));
    }
    const size_t n_blocks = (head_dim + PHI_KV_BLOCK - 1) / PHI_KV_BLOCK;
    const short scale = (short)page->value_scales[slot * n_blocks + d / PHI_KV_BLOCK];
    const __m128i q = _mm_maskz_loadu_epi8(lanes, page->values + at);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), _mm512_cvtph_ps(_mm256_set1_epi16(scale)));
}

PHI_INLINE void convert_keys(const phi_attention *a, phi_kv_type type, int page, float *keys) {
    const size_t head_dim = (size_t)a->head_dim;
    const phi_kv_slice p = phi_kv_slice_at(a, type, page);
    for (size_t b = 0; b < head_dim; b += PHI_KV_BLOCK) {
        const __m512 low = key_scales(type, &p, b, 0), high = key_scales(type, &p, b, 1);
        for (size_t d = b; d < head_dim && d < b + PHI_KV_BLOCK; d++) {
            prefetch_l2_line(p.values + d * PHI_PAGE_TOKENS * phi_kv_element_bytes(type));
            _mm512_storeu_ps(keys + d * PHI_PAGE_TOKENS, load_keys(type, &p, head_dim, d, 0, low));
            _mm512_storeu_ps(keys + d * PHI_PAGE_TOKENS + 16, load_keys(type, &p, head_dim, d, 1, high));
        }
    }
}

PHI_INLINE void convert_values(const phi_attention *a, phi_kv_type type, int first, int end, size_t first_dim,
                               float *values) {
    const size_t head_dim = (size_t)a->head_dim, left = head_dim - first_dim;
    const size_t n_high = left > 16 ? left - 16 : 0;
    for (int p = first; p < end; p++, values += PHI_VALUE_DIMS) {
        const phi_kv_slice page = phi_kv_slice_at(a, type, p);
        const size_t slot = (size_t)(p % PHI_PAGE_TOKENS);
        _mm512_storeu_ps(values, load_values(type, &page, head_dim, slot, first_dim, left));
        _mm512_storeu_ps(values + 16, load_values(type, &page, head_dim, slot, first_dim + 16, n_high));
    }
}

/* s = q * k over the even (parity 0) or odd (parity 1) dimensions, for the 32 positions of a page. */
PHI_INLINE void multiply_qk(const phi_query_tile *t, const float *keys, size_t head_dim, int n_rows, size_t parity,
                            __m512 s[ROWS][2]) {
    UNROLL for (int r = 0; r < n_rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
    for (size_t d = parity; d < head_dim; d += 2) { /* head_dim is even */
        const __m512 k0 = _mm512_loadu_ps(keys + d * PHI_PAGE_TOKENS);
        const __m512 k1 = _mm512_loadu_ps(keys + d * PHI_PAGE_TOKENS + 16);
        UNROLL for (int r = 0; r < n_rows; r++) {
            const __m512 q = _mm512_set1_ps(t->q[d * (size_t)n_rows + (size_t)r]);
            s[r][0] = _mm512_fmadd_ps(q, k0, s[r][0]);
            s[r][1] = _mm512_fmadd_ps(q, k1, s[r][1]);
        }
    }
}

/* Stores a row's scores for a page, -infinity at masked positions. */
PHI_INLINE void store_scores(const phi_query_tile *t, int row, int page, __m512 low, __m512 high, float *scores) {
    if (page < t->all_first || page + PHI_PAGE_TOKENS - 1 > t->all_last) {
        /* Visible lanes first .. last of 32. All are masked if the page is outside the row's range. */
        const int first = phi_max(t->row_first[row] - page, 0), last = phi_min(t->row_last[row] - page, 31);
        const uint32_t visible = first > last ? 0 : 0xffffffffu >> (31 - last) & 0xffffffffu << first;
        const __m512 masked = _mm512_set1_ps(-INFINITY);
        low = _mm512_mask_mov_ps(masked, (__mmask16)(visible & 0xffff), low);
        high = _mm512_mask_mov_ps(masked, (__mmask16)(visible >> 16), high);
    }
    _mm512_storeu_ps(scores, low);
    _mm512_storeu_ps(scores + 16, high);
}

/* n_rows is a compile-time constant once inlined. */
PHI_INLINE void compute_scores_rows(const phi_attention *a, const phi_query_tile *t, int page, const float *keys,
                                    int n_rows, float *scores) {
    __m512 even[ROWS][2], odd[ROWS][2]; /* the same bits as compute_scores_one, which needs four independent sums */
    multiply_qk(t, keys, (size_t)a->head_dim, n_rows, 0, even);
    multiply_qk(t, keys, (size_t)a->head_dim, n_rows, 1, odd);
    UNROLL for (int r = 0; r < n_rows; r++) store_scores(t, r, page, _mm512_add_ps(even[r][0], odd[r][0]),
                                                         _mm512_add_ps(even[r][1], odd[r][1]), scores + r * BLOCK);
}

static void compute_scores(const phi_attention *a, const phi_query_tile *t, int page, const float *keys,
                           float *scores) {
    if (t->n_rows == ROWS)
        compute_scores_rows(a, t, page, keys, ROWS, scores);
    else
        compute_scores_rows(a, t, page, keys, 4, scores);
}

PHI_INLINE void compute_scores_one(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int page,
                                   float *scores) {
    const size_t head_dim = (size_t)a->head_dim, line = PHI_PAGE_TOKENS * phi_kv_element_bytes(type);
    const phi_kv_slice p = phi_kv_slice_at(a, type, page);
    __m512 even[2], odd[2];
    even[0] = even[1] = odd[0] = odd[1] = _mm512_setzero_ps();
    for (size_t b = 0; b < head_dim; b += PHI_KV_BLOCK) {
        const __m512 low = key_scales(type, &p, b, 0), high = key_scales(type, &p, b, 1);
        for (size_t d = b; d < head_dim && d < b + PHI_KV_BLOCK; d += 2) {
            prefetch_l2_line(p.values + d * line);
            if (type == PHI_KV_F16) prefetch_l2_line(p.values + (d + 1) * line);
            const __m512 q0 = _mm512_set1_ps(t->q[d]), q1 = _mm512_set1_ps(t->q[d + 1]);
            even[0] = _mm512_fmadd_ps(q0, load_keys(type, &p, head_dim, d, 0, low), even[0]);
            even[1] = _mm512_fmadd_ps(q0, load_keys(type, &p, head_dim, d, 1, high), even[1]);
            odd[0] = _mm512_fmadd_ps(q1, load_keys(type, &p, head_dim, d + 1, 0, low), odd[0]);
            odd[1] = _mm512_fmadd_ps(q1, load_keys(type, &p, head_dim, d + 1, 1, high), odd[1]);
        }
    }
    store_scores(t, 0, page, _mm512_add_ps(even[0], odd[0]), _mm512_add_ps(even[1], odd[1]), scores);
}

/* Mirrors avx2/attention.c: the intrinsics differ in every line. */
static void update_softmax(phi_query_tile *t, int row, float *scores, int n) {
    __m512 lane_max = _mm512_set1_ps(t->row_max[row]);
    for (int i = 0; i < n; i += 16) lane_max = _mm512_max_ps(_mm512_loadu_ps(scores + i), lane_max);
    const float row_max = _mm512_reduce_max_ps(lane_max);
    const __m512 row_max_v = _mm512_set1_ps(row_max),
                 rescale = phi_exp(_mm512_sub_ps(_mm512_set1_ps(t->row_max[row]), row_max_v));
    __m512 row_sum = _mm512_mul_ps(_mm512_loadu_ps(t->row_sum[row]), rescale);
    for (int i = 0; i < n; i += 16) {
        const __m512 weight = phi_exp(_mm512_sub_ps(_mm512_loadu_ps(scores + i), row_max_v));
        _mm512_storeu_ps(scores + i, weight);
        row_sum = _mm512_add_ps(row_sum, weight);
    }
    _mm512_storeu_ps(t->row_sum[row], row_sum);
    t->row_max[row] = row_max;
    t->rescale[row] = _mm512_cvtss_f32(rescale);
}

PHI_INLINE void accumulate_pv_rows(const phi_query_tile *t, const float *weights, const float *values, int n,
                                   size_t first_dim, int n_rows) {
    __m512 sum[ROWS][2];
    UNROLL for (int r = 0; r < n_rows; r++) {
        const float *acc = t->acc + (size_t)r * t->acc_stride + first_dim;
        const __m512 rescale = _mm512_set1_ps(t->rescale[r]);
        sum[r][0] = _mm512_mul_ps(_mm512_loadu_ps(acc), rescale);
        sum[r][1] = _mm512_mul_ps(_mm512_loadu_ps(acc + 16), rescale);
    }
    for (int p = 0; p < n; p++, values += PHI_VALUE_DIMS) {
        const __m512 v0 = _mm512_loadu_ps(values), v1 = _mm512_loadu_ps(values + 16);
        UNROLL for (int r = 0; r < n_rows; r++) {
            const __m512 weight = _mm512_set1_ps(weights[r * BLOCK + p]);
            sum[r][0] = _mm512_fmadd_ps(weight, v0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(weight, v1, sum[r][1]);
        }
    }
    UNROLL for (int r = 0; r < n_rows; r++) {
        float *acc = t->acc + (size_t)r * t->acc_stride + first_dim;
        _mm512_storeu_ps(acc, sum[r][0]);
        _mm512_storeu_ps(acc + 16, sum[r][1]);
    }
}

static void accumulate_pv(const phi_query_tile *t, const float *weights, const float *values, int n, size_t first_dim) {
    if (t->n_rows == ROWS)
        accumulate_pv_rows(t, weights, values, n, first_dim, ROWS);
    else
        accumulate_pv_rows(t, weights, values, n, first_dim, 4);
}

/* What attention_one_row.h needs. */

enum { STEP = 16 };

typedef __m512 vector;

PHI_INLINE vector load_floats(const float *x) { return _mm512_loadu_ps(x); }
PHI_INLINE void store_floats(float *x, vector v) { _mm512_storeu_ps(x, v); }
PHI_INLINE vector repeat_float(const float *x) { return _mm512_set1_ps(*x); }
PHI_INLINE vector multiply(vector a, vector b) { return _mm512_mul_ps(a, b); }
PHI_INLINE vector multiply_add(vector a, vector b, vector sum) { return _mm512_fmadd_ps(a, b, sum); }

#include "../x86/attention_one_row.h"

PHI_INLINE void accumulate_pv_one(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int first, int end,
                                  const float *weights) {
    const size_t head_dim = (size_t)a->head_dim;
    size_t d = 0;
    if (head_dim % 96 == 0)
        for (; d < head_dim; d += 96) accumulate_pv_dims(a, type, t, first, end, weights, d, 6, 16);
    for (; d + 64 <= head_dim; d += 64) accumulate_pv_dims(a, type, t, first, end, weights, d, 4, 16);
    for (; d < head_dim; d += 16) accumulate_pv_dims(a, type, t, first, end, weights, d, 1, head_dim - d);
}

PHI_DEFINE_ATTENTION(PHI_KV_F16, f16, avx512)
PHI_DEFINE_ATTENTION(PHI_KV_Q8, q8, avx512)
