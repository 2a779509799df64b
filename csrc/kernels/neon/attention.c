/* Attention over pages in half precision or int8; generic/attention_tile.h has the way through them, here are its
 * steps. Layout: phi_kv_slice: keys [16 positions side by side][head_dim][16], values [position][head_dim]. Idea: four
 * rows by four vectors in registers, from converted keys (16 positions at a time) and values (16 dimensions); one row
 * reads the pages themselves, 32 keys side by side. Bound: one row: reading the pages, 4 bytes a position and dimension
 * (int8: 2.1); many: the multiplications. */
#include "../generic/attention_tile.h"

#include <math.h>

#include "neon.h"
#include "simd.h"

enum { ROWS = 4, BLOCK = PHI_ATTENTION_BLOCK, PAGE_VECTORS = PHI_PAGE_TOKENS / 4, GROUP_VECTORS = PHI_KV_GROUP / 4 };

PHI_INLINE phi_kv_slice head_of(const phi_attention *a, phi_kv_type type, int position) {
    return phi_kv_slice_of(type, a->head_dim, (uint8_t *)phi_page_of(a, position));
}

/* Eight bytes as floats. */
PHI_INLINE void floats_of(int8x8_t q, float32x4_t f[2]) {
    const int16x8_t wide = vmovl_s8(q);
    f[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    f[1] = vcvtq_f32_s32(vmovl_high_s16(wide));
}

/* Scales of the page's keys, for PHI_KV_BLOCK dimensions from d on; half precision has none. */
PHI_INLINE void load_key_scales(phi_kv_type type, const phi_kv_slice *page, size_t d, float32x4_t *scales) {
    for (size_t i = 0; i < PAGE_VECTORS; i++) {
        scales[i] = type == PHI_KV_F16 ? vdupq_n_f32(0.0f)
                                       : phi_load_half(page->key_scales + d / PHI_KV_BLOCK * PHI_PAGE_TOKENS + 4 * i);
    }
}

/* Dimension d of the page's keys. */
PHI_INLINE void load_keys(phi_kv_type type, const phi_kv_slice *page, size_t head_dim, size_t d,
                          const float32x4_t *scales, float32x4_t *keys) {
    UNROLL for (size_t i = 0; i < PAGE_VECTORS; i += 2) {
        const size_t at = (i / GROUP_VECTORS * head_dim + d) * PHI_KV_GROUP + i % GROUP_VECTORS * 4;
        if (type == PHI_KV_F16) {
            keys[i] = phi_load_half(page->keys + 2 * at);
            keys[i + 1] = phi_load_half(page->keys + 2 * at + 8);
        } else {
            floats_of(vld1_s8((const int8_t *)page->keys + at), keys + i);
            keys[i] = vmulq_f32(keys[i], scales[i]);
            keys[i + 1] = vmulq_f32(keys[i + 1], scales[i + 1]);
        }
    }
}

/* n, at most 8, dimensions from d on of the value in a slot, then zeros. */
PHI_INLINE void load_values(phi_kv_type type, const phi_kv_slice *page, size_t head_dim, size_t slot, size_t d,
                            size_t n, float32x4_t v[2]) {
    const size_t at = slot * head_dim + d, element = type == PHI_KV_F16 ? 2 : 1;
    const uint8_t *values = page->values + at * element;
    uint8_t some[16] = {0};
    if (n < 8) {
        memcpy(some, values, n * element);
        values = some;
    }
    if (type == PHI_KV_F16) {
        v[0] = phi_load_half(values);
        v[1] = phi_load_half(values + 8);
        return;
    }
    const size_t n_blocks = (head_dim + PHI_KV_BLOCK - 1) / PHI_KV_BLOCK;
    const float scale = phi_half(page->value_scales + slot * n_blocks + d / PHI_KV_BLOCK);
    floats_of(vld1_s8((const int8_t *)values), v);
    v[0] = vmulq_n_f32(v[0], scale);
    v[1] = vmulq_n_f32(v[1], scale);
}

PHI_INLINE void convert_keys(const phi_attention *a, phi_kv_type type, int page, float *keys) {
    const size_t head_dim = (size_t)a->head_dim;
    const phi_kv_slice p = head_of(a, type, page);
    for (size_t b = 0; b < head_dim; b += PHI_KV_BLOCK) {
        float32x4_t scales[PAGE_VECTORS], k[PAGE_VECTORS];
        load_key_scales(type, &p, b, scales);
        for (size_t d = b; d < head_dim && d < b + PHI_KV_BLOCK; d++) {
            load_keys(type, &p, head_dim, d, scales, k);
            UNROLL for (size_t i = 0; i < PAGE_VECTORS; i++) vst1q_f32(keys + d * PHI_PAGE_TOKENS + 4 * i, k[i]);
        }
    }
}

PHI_INLINE void convert_values(const phi_attention *a, phi_kv_type type, int first, int end, size_t first_dim,
                               float *values) {
    const size_t head_dim = (size_t)a->head_dim, left = head_dim - first_dim;
    for (int p = first; p < end; p++, values += PHI_VALUE_DIMS) {
        const phi_kv_slice page = head_of(a, type, p);
        const size_t slot = (size_t)(p % PHI_PAGE_TOKENS);
        for (size_t d = 0; d < PHI_VALUE_DIMS; d += 8) {
            const size_t n = left <= d ? 0 : left - d < 8 ? left - d : 8;
            float32x4_t v[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
            if (n) load_values(type, &page, head_dim, slot, first_dim + d, n, v);
            vst1q_f32(values + d, v[0]);
            vst1q_f32(values + d + 4, v[1]);
        }
    }
}

/* Scores of a row at four positions from `position` on, hidden where it does not see. */
PHI_INLINE void store_scores(const phi_tile *t, int row, int position, float32x4_t s, float *scores) {
    if (position < t->all_first || position + 3 > t->all_last) {
        static const int32_t lanes[4] = {0, 1, 2, 3};
        const int32x4_t at = vaddq_s32(vld1q_s32(lanes), vdupq_n_s32(position));
        const uint32x4_t hidden =
            vorrq_u32(vcgtq_s32(vdupq_n_s32(t->first[row]), at), vcgtq_s32(at, vdupq_n_s32(t->last[row])));
        s = vbslq_f32(hidden, vdupq_n_f32(-INFINITY), s);
    }
    vst1q_f32(scores, s);
}

static void score(const phi_attention *a, const phi_tile *t, int page, const float *keys, float *scores) {
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

PHI_INLINE void score_one(const phi_attention *a, phi_kv_type type, const phi_tile *t, int page, float *scores) {
    const size_t head_dim = (size_t)a->head_dim;
    const phi_kv_slice p = head_of(a, type, page);
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

/* e^x, 0 where x is too low for a normal result; NaN stays NaN. */
PHI_INLINE float32x4_t exp_or_zero(float32x4_t x) {
    const uint32x4_t low = vcltq_f32(x, vdupq_n_f32(-87.3f));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(phi_exp(x)), low));
}

static void soften(phi_tile *t, int row, float *scores, int n) {
    float32x4_t largest = vdupq_n_f32(t->top[row]);
    for (int i = 0; i < n; i += 4) largest = vmaxnmq_f32(largest, vld1q_f32(scores + i));
    const float top = vmaxnmvq_f32(largest);
    const float32x4_t tops = vdupq_n_f32(top), kept = exp_or_zero(vsubq_f32(vdupq_n_f32(t->top[row]), tops));
    float32x4_t total = vmulq_f32(vld1q_f32(t->totals[row]), kept);
    for (int i = 0; i < n; i += 4) {
        const float32x4_t weight = exp_or_zero(vsubq_f32(vld1q_f32(scores + i), tops));
        vst1q_f32(scores + i, weight);
        total = vaddq_f32(total, weight);
    }
    vst1q_f32(t->totals[row], total);
    t->top[row] = top;
    t->kept[row] = vgetq_lane_f32(kept, 0);
}

static void weigh(const phi_tile *t, const float *weights, const float *values, int n, size_t first_dim) {
    for (size_t d = 0; d < PHI_VALUE_DIMS; d += 16) {
        float32x4_t sum[ROWS][4];
        UNROLL for (int r = 0; r < ROWS; r++) {
            const float *sums = t->sums + (size_t)r * t->sums_stride + first_dim + d;
            UNROLL for (int i = 0; i < 4; i++) sum[r][i] = vmulq_n_f32(vld1q_f32(sums + 4 * i), t->kept[r]);
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
            float *sums = t->sums + (size_t)r * t->sums_stride + first_dim + d;
            UNROLL for (int i = 0; i < 4; i++) vst1q_f32(sums + 4 * i, sum[r][i]);
        }
    }
}

/* 8 * n_pairs dimensions from first_dim on, n_dims (at most 8) of the last pair of vectors. n_pairs is a constant where
 * this is inlined. */
PHI_INLINE void weigh_dims(const phi_attention *a, phi_kv_type type, const phi_tile *t, int first, int end,
                           const float *weights, size_t first_dim, int n_pairs, size_t n_dims) {
    const size_t head_dim = (size_t)a->head_dim;
    float *sums = t->sums + first_dim;
    float32x4_t sum[8][2];
    UNROLL for (int i = 0; i < n_pairs; i++) {
        sum[i][0] = vmulq_n_f32(vld1q_f32(sums + 8 * i), t->kept[0]);
        sum[i][1] = vmulq_n_f32(vld1q_f32(sums + 8 * i + 4), t->kept[0]);
    }
    for (int p = first; p < end; p++, weights++) {
        const phi_kv_slice page = head_of(a, type, p);
        const size_t slot = (size_t)(p % PHI_PAGE_TOKENS);
        UNROLL for (int i = 0; i < n_pairs; i++) {
            float32x4_t v[2];
            load_values(type, &page, head_dim, slot, first_dim + 8 * (size_t)i, i == n_pairs - 1 ? n_dims : 8, v);
            sum[i][0] = vfmaq_n_f32(sum[i][0], v[0], *weights);
            sum[i][1] = vfmaq_n_f32(sum[i][1], v[1], *weights);
        }
    }
    UNROLL for (int i = 0; i < n_pairs; i++) {
        vst1q_f32(sums + 8 * i, sum[i][0]);
        vst1q_f32(sums + 8 * i + 4, sum[i][1]);
    }
}

PHI_INLINE void weigh_one(const phi_attention *a, phi_kv_type type, const phi_tile *t, int first, int end,
                          const float *weights) {
    const size_t head_dim = (size_t)a->head_dim;
    size_t d = 0;
    for (; d + 64 <= head_dim; d += 64) weigh_dims(a, type, t, first, end, weights, d, 8, 8);
    for (; d + 32 <= head_dim; d += 32) weigh_dims(a, type, t, first, end, weights, d, 4, 8);
    for (; d + 8 <= head_dim; d += 8) weigh_dims(a, type, t, first, end, weights, d, 1, 8);
    if (d < head_dim) weigh_dims(a, type, t, first, end, weights, d, 1, head_dim - d);
}

PHI_KV_STEPS(PHI_KV_F16, f16, neon)
PHI_KV_STEPS(PHI_KV_Q8, q8, neon)
