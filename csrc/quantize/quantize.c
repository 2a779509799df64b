/* Rows of float32 into rows of any tensor type, on every thread of a pool: rows do not depend on each other, so the
 * bytes are the same on any number of threads. */
#include "quantize.h"

#include <string.h>

#include "half.h"
#include "phi.h"
#include "threads.h"

static void quantize_row_f32(const float *x, const float *importance, size_t n_cols, void *out) {
    (void)importance;
    memcpy(out, x, n_cols * sizeof *x);
}

/* The nearest half; the largest where that were infinite. */
static void quantize_row_f16(const float *x, const float *importance, size_t n_cols, void *out) {
    (void)importance;
    for (size_t i = 0; i < n_cols; i++) {
        uint16_t half = phi_float_to_half(x[i]);
        if ((half & 0x7fffu) == 0x7c00u) half = (uint16_t)(half - 1);
        memcpy((uint8_t *)out + 2 * i, &half, 2);
    }
}

static void quantize_row_bf16(const float *x, const float *importance, size_t n_cols, void *out) {
    (void)importance;
    for (size_t i = 0; i < n_cols; i++) {
        const uint32_t bits = phi_bits_from_float(x[i]);
        uint16_t high = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16); /* ties to even */
        if ((high & 0x7fffu) == 0x7f80u) high = (uint16_t)(high - 1);
        memcpy((uint8_t *)out + 2 * i, &high, 2);
    }
}

static const phi_quantize_row quantize_row[PHI_N_TYPES] = {
    [PHI_TYPE_F32] = quantize_row_f32,       [PHI_TYPE_F16] = quantize_row_f16,
    [PHI_TYPE_BF16] = quantize_row_bf16,     [PHI_TYPE_Q4_0] = phi_quantize_row_q4_0,
    [PHI_TYPE_Q4_1] = phi_quantize_row_q4_1, [PHI_TYPE_Q5_0] = phi_quantize_row_q5_0,
    [PHI_TYPE_Q5_1] = phi_quantize_row_q5_1, [PHI_TYPE_Q8_0] = phi_quantize_row_q8_0,
    [PHI_TYPE_Q2_K] = phi_quantize_row_q2_k, [PHI_TYPE_Q3_K] = phi_quantize_row_q3_k,
    [PHI_TYPE_Q4_K] = phi_quantize_row_q4_k, [PHI_TYPE_Q5_K] = phi_quantize_row_q5_k,
    [PHI_TYPE_Q6_K] = phi_quantize_row_q6_k,
};

typedef struct {
    phi_quantize_row quantize;
    const float *x, *importance;
    uint8_t *out;
    size_t n_rows, n_cols, row_bytes;
    atomic_size_t next;
} quantizing;

static void run(void *context, int thread) {
    quantizing *q = context;
    (void)thread;
    for (size_t i; (i = atomic_fetch_add(&q->next, 1)) < q->n_rows;) {
        q->quantize(q->x + i * q->n_cols, q->importance, q->n_cols, q->out + i * q->row_bytes);
    }
}

phi_status phi_quantize_rows(phi_pool *pool, phi_type type, const float *x, size_t n_rows, size_t n_cols,
                             const float *importance, void *out) {
    quantizing q = {
        .quantize = quantize_row[type],
        .x = x,
        .importance = importance,
        .out = out,
        .n_rows = n_rows,
        .n_cols = n_cols,
        .row_bytes = phi_row_bytes(type, n_cols),
    };
    return phi_pool_run(pool, run, &q);
}
