/* Quantises float32 rows to any tensor type on all threads of a pool. Rows are independent, so the output does not
 * depend on the number of threads. */
#include "quantize.h"

#include <string.h>

#include "half.h"
#include "phi.h"
#include "threads.h"

static void quantize_row_f32(const float *x, const float *importance, size_t n_cols, void *out) {
    (void)importance;
    memcpy(out, x, n_cols * sizeof *x);
}

/* To the nearest half; overflows become the largest finite one instead of infinity. */
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

static const phi_quantize_row quantize_row_fns[PHI_N_TYPES] = {
    [PHI_TYPE_F32] = quantize_row_f32,       [PHI_TYPE_F16] = quantize_row_f16,
    [PHI_TYPE_BF16] = quantize_row_bf16,     [PHI_TYPE_Q4_0] = phi_quantize_row_q4_0,
    [PHI_TYPE_Q4_1] = phi_quantize_row_q4_1, [PHI_TYPE_Q5_0] = phi_quantize_row_q5_0,
    [PHI_TYPE_Q5_1] = phi_quantize_row_q5_1, [PHI_TYPE_Q8_0] = phi_quantize_row_q8_0,
    [PHI_TYPE_Q2_K] = phi_quantize_row_q2_k, [PHI_TYPE_Q3_K] = phi_quantize_row_q3_k,
    [PHI_TYPE_Q4_K] = phi_quantize_row_q4_k, [PHI_TYPE_Q5_K] = phi_quantize_row_q5_k,
    [PHI_TYPE_Q6_K] = phi_quantize_row_q6_k,
};

typedef struct {
    phi_quantize_row quantize_row;
    const float *x, *importance;
    uint8_t *out;
    size_t n_rows, n_cols, row_bytes;
    atomic_size_t next;
} quantize_job;

static void quantize_next_rows(void *context, int thread) {
    quantize_job *job = context;
    (void)thread;
    for (size_t i; (i = atomic_fetch_add(&job->next, 1)) < job->n_rows;) {
        job->quantize_row(job->x + i * job->n_cols, job->importance, job->n_cols, job->out + i * job->row_bytes);
    }
}

phi_status phi_quantize_rows(phi_pool *pool, phi_type type, const float *x, size_t n_rows, size_t n_cols,
                             const float *importance, void *out) {
    quantize_job job = {
        .quantize_row = quantize_row_fns[type],
        .x = x,
        .importance = importance,
        .out = out,
        .n_rows = n_rows,
        .n_cols = n_cols,
        .row_bytes = phi_row_bytes(type, n_cols),
    };
    return phi_pool_run(pool, quantize_next_rows, &job);
}
