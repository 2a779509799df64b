/* The scalar tier: portable, readable C, and the reference that every other tier is tested against.
 * Sums are in double precision, so that a difference from it is the other tier's error. */
#include <string.h>

#include "../../half.h"
#include "quantised.h"
#include "rotate.h"

static void phi_dequantize_f32_scalar(const void *row, size_t n, float *y) { memcpy(y, row, n * sizeof *y); }

static uint16_t load_u16(const uint8_t *bytes) {
    uint16_t value;
    memcpy(&value, bytes, sizeof value); /* rows of a mapped file may be unaligned */
    return value;
}

static void phi_dequantize_f16_scalar(const void *row, size_t n, float *y) {
    for (size_t i = 0; i < n; i++) y[i] = phi_half_to_float(load_u16((const uint8_t *)row + 2 * i));
}

static void phi_dequantize_bf16_scalar(const void *row, size_t n, float *y) {
    for (size_t i = 0; i < n; i++) y[i] = phi_bf16_to_float(load_u16((const uint8_t *)row + 2 * i));
}

typedef void (*dequantize_fn)(const void *row, size_t n, float *y);

static void matmul_float(dequantize_fn dequantize, size_t element_bytes, const phi_matmul *m) {
    float w[256];
    for (int r = 0; r < m->n_rows; r++) {
        const uint8_t *row = m->rows + (size_t)r * m->row_bytes;
        for (int t = 0; t < m->n_tokens; t++) {
            const float *x = m->x->f32 + (size_t)(m->first_token + t) * (size_t)m->n_cols;
            double total = 0.0;
            for (size_t i = 0; i < (size_t)m->n_cols; i += 256) {
                const size_t n = (size_t)m->n_cols - i < 256 ? (size_t)m->n_cols - i : 256;
                dequantize(row + i * element_bytes, n, w);
                for (size_t k = 0; k < n; k++) total += (double)w[k] * (double)x[i + k];
            }
            m->out[(size_t)t * m->out_stride + (size_t)r] = (float)total;
        }
    }
}

static void phi_matmul_f32_scalar(const phi_matmul *m) { matmul_float(phi_dequantize_f32_scalar, 4, m); }
static void phi_matmul_f16_scalar(const phi_matmul *m) { matmul_float(phi_dequantize_f16_scalar, 2, m); }
static void phi_matmul_bf16_scalar(const phi_matmul *m) { matmul_float(phi_dequantize_bf16_scalar, 2, m); }

static void phi_rms_norm_scalar(const float *x, const float *weight, size_t n, float eps, float *y) {
    double squares = 0.0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * (double)x[i];
    const float inverse = (float)(1.0 / sqrt(squares / (double)n + (double)eps));
    for (size_t i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

static void phi_layer_norm_scalar(const float *x, const float *weight, const float *bias, size_t n, float eps,
                                  float *y) {
    double sum = 0.0, squares = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i];
    const double mean = sum / (double)n;
    for (size_t i = 0; i < n; i++) squares += ((double)x[i] - mean) * ((double)x[i] - mean);
    const float inverse = (float)(1.0 / sqrt(squares / (double)n + (double)eps));
    for (size_t i = 0; i < n; i++) y[i] = (x[i] - (float)mean) * inverse * weight[i] + bias[i];
}

static void phi_rope_neox_scalar(float *x, int rope_dims, const float *cos, const float *sin) {
    for (int i = 0; i < rope_dims / 2; i++) phi_rotate(x + i, x + i + rope_dims / 2, cos[i], sin[i]);
}

static void phi_rope_interleaved_scalar(float *x, int rope_dims, const float *cos, const float *sin) {
    for (int i = 0; i < rope_dims / 2; i++) phi_rotate(x + 2 * i, x + 2 * i + 1, cos[i], sin[i]);
}

static void phi_silu_mul_scalar(const float *gate, const float *up, size_t n, float *y) {
    for (size_t i = 0; i < n; i++) y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)). */
static void phi_gelu_scalar(const float *x, size_t n, float *y) {
    for (size_t i = 0; i < n; i++) {
        const float u = 0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        y[i] = x[i] / (1.0f + expf(-2.0f * u));
    }
}

static void phi_add_scalar(const float *x, size_t n, float *y) {
    for (size_t i = 0; i < n; i++) y[i] += x[i];
}

static void phi_store_kv_f16_scalar(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    const phi_kv_slice page = phi_kv_slice_of(PHI_KV_F16, head_dim, slice);
    const size_t n = (size_t)head_dim;
    uint16_t *keys = (uint16_t *)(void *)page.keys + (size_t)(slot / PHI_KV_GROUP) * n * PHI_KV_GROUP;
    uint16_t *values = (uint16_t *)(void *)page.values + (size_t)slot * n;
    for (size_t d = 0; d < n; d++) {
        keys[d * PHI_KV_GROUP + (size_t)(slot % PHI_KV_GROUP)] = phi_float_to_half(k[d]);
        values[d] = phi_float_to_half(v[d]);
    }
}

/* Quantises n <= PHI_KV_BLOCK dimensions to q; returns their scale in half precision. If the scale is 0, infinite or
 * NaN, all of q is 0, so that an infinite or NaN input turns the whole block into NaN. */
static uint16_t quantize_kv(const float *x, size_t n, int8_t *q) {
    float largest = 0.0f;
    for (size_t i = 0; i < n; i++) largest = fabsf(x[i]) > largest || x[i] != x[i] ? fabsf(x[i]) : largest;
    const uint16_t half = phi_float_to_half(largest / 127.0f);
    const float scale = phi_half_to_float(half);
    const float inverse = scale > 0.0f && scale < INFINITY ? 1.0f / scale : 0.0f;
    for (size_t i = 0; i < n; i++)
        q[i] = (int8_t)(inverse > 0.0f ? fmaxf(-127.0f, fminf(127.0f, nearbyintf(x[i] * inverse))) : 0.0f);
    return half;
}

static void phi_store_kv_q8_scalar(const float *k, const float *v, int head_dim, int slot, uint8_t *slice) {
    const phi_kv_slice page = phi_kv_slice_of(PHI_KV_Q8, head_dim, slice);
    const size_t head = (size_t)head_dim, n_blocks = phi_kv_blocks(head_dim), s = (size_t)slot;
    int8_t *keys = (int8_t *)page.keys + s / PHI_KV_GROUP * head * PHI_KV_GROUP + s % PHI_KV_GROUP;
    int8_t *values = (int8_t *)page.values + s * head, q[PHI_KV_BLOCK];
    for (size_t b = 0; b < n_blocks; b++) {
        const size_t d = b * PHI_KV_BLOCK, n = head - d < PHI_KV_BLOCK ? head - d : PHI_KV_BLOCK;
        page.value_scales[s * n_blocks + b] = quantize_kv(v + d, n, values + d);
        page.key_scales[b * PHI_PAGE_TOKENS + s] = quantize_kv(k + d, n, q);
        for (size_t i = 0; i < n; i++) keys[(d + i) * PHI_KV_GROUP] = q[i];
    }
}

/* Dimension d of one position's key and value, as floats. */
static void load_kv(const phi_attention *a, phi_kv_type type, int position, size_t d, float *key, float *value) {
    const size_t head = (size_t)a->head_dim, n_blocks = phi_kv_blocks(a->head_dim);
    const size_t slot = (size_t)(position % PHI_PAGE_TOKENS);
    uint8_t *in_page = (uint8_t *)a->pages + (size_t)a->page_table[position / PHI_PAGE_TOKENS] * a->page_bytes;
    const phi_kv_slice page = phi_kv_slice_of(type, a->head_dim, in_page);
    const size_t k = (slot / PHI_KV_GROUP * head + d) * PHI_KV_GROUP + slot % PHI_KV_GROUP, v = slot * head + d;
    if (type == PHI_KV_F16) {
        *key = phi_half_to_float(((const uint16_t *)(const void *)page.keys)[k]);
        *value = phi_half_to_float(((const uint16_t *)(const void *)page.values)[v]);
    } else {
        const size_t b = d / PHI_KV_BLOCK;
        *key = (float)((const int8_t *)page.keys)[k] * phi_half_to_float(page.key_scales[b * PHI_PAGE_TOKENS + slot]);
        *value = (float)((const int8_t *)page.values)[v] * phi_half_to_float(page.value_scales[slot * n_blocks + b]);
    }
}

/* One row, over positions first .. last, with online softmax. */
static void attend(const phi_attention *a, phi_kv_type type, const float *q, int first, int last, float *out) {
    const size_t head_dim = (size_t)a->head_dim;
    float row_max = -INFINITY, key, value;
    double row_sum = 0.0;
    for (size_t d = 0; d < head_dim; d++) out[d] = 0.0f;
    for (int p = first; p <= last; p++) {
        double dot = 0.0;
        for (size_t d = 0; d < head_dim; d++) {
            load_kv(a, type, p, d, &key, &value);
            dot += (double)q[d] * (double)key;
        }
        const float score = (float)dot * a->scale;
        if (score > row_max) { /* earlier weights are relative to the old maximum */
            const float rescale = expf(row_max - score);
            for (size_t d = 0; d < head_dim; d++) out[d] *= rescale;
            row_sum *= (double)rescale;
            row_max = score;
        }
        const float weight = expf(score - row_max);
        for (size_t d = 0; d < head_dim; d++) {
            load_kv(a, type, p, d, &key, &value);
            out[d] += weight * value;
        }
        row_sum += (double)weight;
    }
    for (size_t d = 0; d < head_dim; d++) out[d] = (float)((double)out[d] / row_sum);
}

static void attend_all(const phi_attention *a, phi_kv_type type) {
    for (int t = 0; t < a->n_tokens; t++) {
        for (int i = 0; i < a->n_queries; i++) {
            const size_t at = (size_t)t * a->token_stride + (size_t)i * (size_t)a->head_dim;
            const int position = a->query_start + t;
            attend(a, type, a->q + at, phi_first_visible(position, a->window), position, a->out + at);
        }
    }
}

static void phi_attention_f16_scalar(const phi_attention *a) { attend_all(a, PHI_KV_F16); }
static void phi_attention_q8_scalar(const phi_attention *a) { attend_all(a, PHI_KV_Q8); }

#define PHI_SLOTS(UPPER, lower)                                      \
    .dequantize[PHI_TYPE_##UPPER] = phi_dequantize_##lower##_scalar, \
    .matmul[PHI_TYPE_##UPPER] = phi_matmul_##lower##_scalar

const phi_kernels phi_kernels_scalar = {
    .name = "scalar",
    PHI_SLOTS(F32, f32),
    PHI_SLOTS(F16, f16),
    PHI_SLOTS(BF16, bf16),
    PHI_SLOTS(Q4_0, q4_0),
    PHI_SLOTS(Q4_1, q4_1),
    PHI_SLOTS(Q5_0, q5_0),
    PHI_SLOTS(Q5_1, q5_1),
    PHI_SLOTS(Q8_0, q8_0),
    PHI_SLOTS(Q2_K, q2_k),
    PHI_SLOTS(Q3_K, q3_k),
    PHI_SLOTS(Q4_K, q4_k),
    PHI_SLOTS(Q5_K, q5_k),
    PHI_SLOTS(Q6_K, q6_k),
    .quantize_q8 = phi_quantize_q8_scalar,
    .rms_norm = phi_rms_norm_scalar,
    .layer_norm = phi_layer_norm_scalar,
    .rope = {phi_rope_neox_scalar, phi_rope_interleaved_scalar},
    .silu_mul = phi_silu_mul_scalar,
    .gelu = phi_gelu_scalar,
    .add = phi_add_scalar,
    .store_kv = {phi_store_kv_f16_scalar, phi_store_kv_q8_scalar},
    .attention = {phi_attention_f16_scalar, phi_attention_q8_scalar},
};
