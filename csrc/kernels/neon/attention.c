/* Attention over pages of the KV cache in half precision or int8: the steps that generic/attention_tile.h calls.
 * Layout: phi_kv_slice: keys [2 groups][head_dim][16 positions], values [position][head_dim].
 * Idea: a tile keeps the sums of 4 rows x 4 vectors in registers, over converted keys (16 positions at a time) and
 * values (16 dimensions). A single row reads the pages directly, 32 keys at once.
 * Bound: one row: reading the pages, 4 bytes (int8: 2.1) per position and dimension; more rows: the FMAs. */
#include "../generic/attention_tile.h"

#include <math.h>

#include "neon.h"
#include "simd.h"

enum { ROWS = 4, BLOCK = PHI_ATTENTION_BLOCK, PAGE_VECTORS = PHI_PAGE_TOKENS / 4, GROUP_VECTORS = PHI_KV_GROUP / 4 };

/* Eight int8 to floats. */
PHI_INLINE void floats_from_int8(int8x8_t q, float32x4_t f[2]) {
    const int16x8_t words = vmovl_s8(q);
    f[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
    f[1] = vcvtq_f32_s32(vmovl_high_s16(words));
}

/* Scales of a page's keys, for the block of PHI_KV_BLOCK dimensions that holds d. Unused with F16. */
PHI_INLINE void load_key_scales(phi_kv_type type, const phi_kv_slice *page, size_t d, float32x4_t *scales) {
    for (size_t i = 0; i < PAGE_VECTORS; i++) {
        scales[i] = type == PHI_KV_F16 ? vdupq_n_f32(0.0f)
                                       : phi_load_half(page->key_scales + d / PHI_KV_BLOCK * PHI_PAGE_TOKENS + 4 * i);
    }
}

/* Dimension d of a page's keys. */
PHI_INLINE void load_keys(phi_kv_type type, const phi_kv_slice *page, size_t head_dim, size_t d,
                          const float32x4_t *scales, float32x4_t *keys) {
    UNROLL for (size_t i = 0; i < PAGE_VECTORS; i += 2) {
        const size_t at = (i / GROUP_VECTORS * head_dim + d) * PHI_KV_GROUP + i % GROUP_VECTORS * 4;
        if (type == PHI_KV_F16) {
            keys[i] = phi_load_half(page->keys + 2 * at);
            keys[i + 1] = phi_load_half(page->keys + 2 * at + 8);
        } else {
            floats_from_int8(vld1_s8((const int8_t *)page->keys + at), keys + i);
            keys[i] = vmulq_f32(keys[i], scales[i]);
            keys[i + 1] = vmulq_f32(keys[i + 1], scales[i + 1]);
        }
    }
}

/* What attention_values.h needs. */

typedef float32x4x2_t eight_floats;

PHI_INLINE eight_floats eight_zeros(void) { return (eight_floats){{vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}}; }
PHI_INLINE void store_eight(float *x, eight_floats v) {
    vst1q_f32(x, v.val[0]);
    vst1q_f32(x + 4, v.val[1]);
}
PHI_INLINE eight_floats eight_from_half(const uint8_t *x) {
    return (eight_floats){{phi_load_half(x), phi_load_half(x + 8)}};
}
PHI_INLINE eight_floats eight_from_int8(const uint8_t *x, const uint16_t *scale) {
    const float scale_f32 = phi_half(scale);
    float32x4_t v[2];
    floats_from_int8(vld1_s8((const int8_t *)x), v);
    return (eight_floats){{vmulq_n_f32(v[0], scale_f32), vmulq_n_f32(v[1], scale_f32)}};
}

#include "../generic/attention_values.h"

PHI_INLINE void convert_keys(const phi_attention *a, phi_kv_type type, int page, float *keys) {
    const size_t head_dim = (size_t)a->head_dim;
    const phi_kv_slice p = phi_kv_slice_at(a, type, page);
    for (size_t b = 0; b < head_dim; b += PHI_KV_BLOCK) {
        float32x4_t scales[PAGE_VECTORS], k[PAGE_VECTORS];
        load_key_scales(type, &p, b, scales);
        for (size_t d = b; d < head_dim && d < b + PHI_KV_BLOCK; d++) {
            load_keys(type, &p, head_dim, d, scales, k);
            UNROLL for (size_t i = 0; i < PAGE_VECTORS; i++) vst1q_f32(keys + d * PHI_PAGE_TOKENS + 4 * i, k[i]);
        }
    }
}

/* Stores a row's scores for four positions from `position` on, -infinity at masked ones. */
PHI_INLINE void store_scores(const phi_query_tile *t, int row, int position, float32x4_t s, float *scores) {
    if (position < t->all_first || position + 3 > t->all_last) {
        static const int32_t lanes[4] = {0, 1, 2, 3};
        const int32x4_t at = vaddq_s32(vld1q_s32(lanes), vdupq_n_s32(position));
        const uint32x4_t masked =
            vorrq_u32(vcgtq_s32(vdupq_n_s32(t->row_first[row]), at), vcgtq_s32(at, vdupq_n_s32(t->row_last[row])));
        s = vbslq_f32(masked, vdupq_n_f32(-INFINITY), s);
    }
    vst1q_f32(scores, s);
}

static void compute_scores(const phi_attention *a, const phi_query_tile *t, int page, const float *keys,
                           float *scores) {
    for (int first = 0; first < PHI_PAGE_TOKENS; first += PHI_KV_GROUP) {
        float32x4_t s[ROWS][GROUP_VECTORS];
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int i = 0; i < GROUP_VECTORS; i++) s[r][i] = vdupq_n_f32(0.0f);
        }
        for (size_t d = 0; d < (size_t)a->head_dim; d++) {
            const float32x4_t q = vld1q_f32(t->q + d * ROWS);
            UNROLL for (int i = 0; i < GROUP_VECTORS; i++) {
                const float32x4_t k = vld1q_f32(keys + d * PHI_PAGE_TOKENS + first + 4 * i);
                UNROLL for (int r = 0; r < ROWS; r++) s[r][i] = phi_add_by_lane(s[r][i], k, q, r);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int i = 0; i < GROUP_VECTORS; i++) {
                store_scores(t, r, page + first + 4 * i, s[r][i], scores + r * BLOCK + first + 4 * i);
            }
        }
    }
}

PHI_INLINE void compute_scores_one(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int page,
                                   float *scores) {
    const size_t head_dim = (size_t)a->head_dim;
    const phi_kv_slice p = phi_kv_slice_at(a, type, page);
    float32x4_t s[PAGE_VECTORS];
    UNROLL for (int i = 0; i < PAGE_VECTORS; i++) s[i] = vdupq_n_f32(0.0f);
    for (size_t b = 0; b < head_dim; b += PHI_KV_BLOCK) {
        float32x4_t scales[PAGE_VECTORS], keys[PAGE_VECTORS];
        load_key_scales(type, &p, b, scales);
        for (size_t d = b; d < head_dim && d < b + PHI_KV_BLOCK; d++) {
            load_keys(type, &p, head_dim, d, scales, keys);
            UNROLL for (int i = 0; i < PAGE_VECTORS; i++) s[i] = vfmaq_n_f32(s[i], keys[i], t->q[d]);
        }
    }
    UNROLL for (int i = 0; i < PAGE_VECTORS; i++) store_scores(t, 0, page + 4 * i, s[i], scores + 4 * i);
}

/* e^x; 0 where the result would be subnormal. NaN stays NaN. */
PHI_INLINE float32x4_t exp_or_zero(float32x4_t x) {
    const uint32x4_t low = vcltq_f32(x, vdupq_n_f32(-87.3f));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(phi_exp(x)), low));
}

/* Mirrors avx2/attention.c: the intrinsics differ in every line. */
static void update_softmax(phi_query_tile *t, int row, float *scores, int n) {
    float32x4_t lane_max = vdupq_n_f32(t->row_max[row]);
    for (int i = 0; i < n; i += 4) lane_max = vmaxnmq_f32(lane_max, vld1q_f32(scores + i));
    const float row_max = vmaxnmvq_f32(lane_max);
    const float32x4_t row_max_v = vdupq_n_f32(row_max),
                      rescale = exp_or_zero(vsubq_f32(vdupq_n_f32(t->row_max[row]), row_max_v));
    float32x4_t row_sum = vmulq_f32(vld1q_f32(t->row_sum[row]), rescale);
    for (int i = 0; i < n; i += 4) {
        const float32x4_t weight = exp_or_zero(vsubq_f32(vld1q_f32(scores + i), row_max_v));
        vst1q_f32(scores + i, weight);
        row_sum = vaddq_f32(row_sum, weight);
    }
    vst1q_f32(t->row_sum[row], row_sum);
    t->row_max[row] = row_max;
    t->rescale[row] = vgetq_lane_f32(rescale, 0);
}

static void accumulate_pv(const phi_query_tile *t, const float *weights, const float *values, int n, size_t first_dim) {
    for (size_t d = 0; d < PHI_VALUE_DIMS; d += 16) {
        float32x4_t sum[ROWS][4];
        UNROLL for (int r = 0; r < ROWS; r++) {
            const float *acc = t->acc + (size_t)r * t->acc_stride + first_dim + d;
            UNROLL for (int i = 0; i < 4; i++) sum[r][i] = vmulq_n_f32(vld1q_f32(acc + 4 * i), t->rescale[r]);
        }
        const float *v = values + d;
        for (int p = 0; p < n; p++, v += PHI_VALUE_DIMS) {
            UNROLL for (int i = 0; i < 4; i++) {
                const float32x4_t value = vld1q_f32(v + 4 * i);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    sum[r][i] = vfmaq_n_f32(sum[r][i], value, weights[r * BLOCK + p]);
                }
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            float *acc = t->acc + (size_t)r * t->acc_stride + first_dim + d;
            UNROLL for (int i = 0; i < 4; i++) vst1q_f32(acc + 4 * i, sum[r][i]);
        }
    }
}

/* 8 * n_pairs dimensions from first_dim on, of which the last pair of vectors has only n_dims <= 8. n_pairs is a
 * compile-time constant once inlined. */
PHI_INLINE void accumulate_pv_dims(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int first,
                                   int end, const float *weights, size_t first_dim, int n_pairs, size_t n_dims) {
    const size_t head_dim = (size_t)a->head_dim;
    float *acc = t->acc + first_dim;
    float32x4_t sum[8][2];
    UNROLL for (int i = 0; i < n_pairs; i++) {
        sum[i][0] = vmulq_n_f32(vld1q_f32(acc + 8 * i), t->rescale[0]);
        sum[i][1] = vmulq_n_f32(vld1q_f32(acc + 8 * i + 4), t->rescale[0]);
    }
    for (int p = first; p < end; p++, weights++) {
        const phi_kv_slice page = phi_kv_slice_at(a, type, p);
        const size_t slot = (size_t)(p % PHI_PAGE_TOKENS);
        UNROLL for (int i = 0; i < n_pairs; i++) {
            const size_t n = i == n_pairs - 1 ? n_dims : 8;
            const eight_floats v = load_values(type, &page, head_dim, slot, first_dim + 8 * (size_t)i, n);
            sum[i][0] = vfmaq_n_f32(sum[i][0], v.val[0], *weights);
            sum[i][1] = vfmaq_n_f32(sum[i][1], v.val[1], *weights);
        }
    }
    UNROLL for (int i = 0; i < n_pairs; i++) {
        vst1q_f32(acc + 8 * i, sum[i][0]);
        vst1q_f32(acc + 8 * i + 4, sum[i][1]);
    }
}

PHI_INLINE void accumulate_pv_one(const phi_attention *a, phi_kv_type type, const phi_query_tile *t, int first, int end,
                                  const float *weights) {
    const size_t head_dim = (size_t)a->head_dim;
    size_t d = 0;
    for (; d + 64 <= head_dim; d += 64) accumulate_pv_dims(a, type, t, first, end, weights, d, 8, 8);
    for (; d + 32 <= head_dim; d += 32) accumulate_pv_dims(a, type, t, first, end, weights, d, 4, 8);
    for (; d + 8 <= head_dim; d += 8) accumulate_pv_dims(a, type, t, first, end, weights, d, 1, 8);
    if (d < head_dim) accumulate_pv_dims(a, type, t, first, end, weights, d, 1, head_dim - d);
}

PHI_DEFINE_ATTENTION(PHI_KV_F16, f16, neon)
PHI_DEFINE_ATTENTION(PHI_KV_Q8, q8, neon)
