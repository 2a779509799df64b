/* Benchmarks of single kernels: each function runs a kernel n_calls times and returns the seconds that this took. The
 * clock is read before the first call and after the last one only. */
#ifndef PHI_BENCH_H
#define PHI_BENCH_H

#include "kernels.h"

/* Memory that calls read in turn, so that a call reads what was not read recently. Benchmarks may share a walk. */
typedef struct {
    const uint8_t *data;
    size_t n_bytes;
    size_t at; /* where the next call reads */
} phi_walk;

/* Returns the next n_bytes of a walk, aligned to PHI_ALIGN_BYTES. n_bytes is at most walk->n_bytes. */
const uint8_t *phi_walk_next(phi_walk *walk, size_t n_bytes);

/* Requests to stop, polled at least once per call of a kernel that may take long. */
typedef struct {
    bool (*poll)(void *); /* true: stop; the result is then negative. NULL: never */
    void *context;
} phi_bench_stop;

/* A product whose weights are the next ones of a walk in each call. Rows are multiplied in tasks of at most task_rows,
 * as in a forward pass. */
typedef struct {
    void (*kernel)(const phi_matmul *m);
    phi_matmul product; /* of all rows; product.rows is set to the weights of each call */
    int task_rows;      /* a multiple of PHI_PANEL_ROWS */
} phi_bench_product;
double phi_bench_products(const phi_bench_product *b, phi_walk *walk, size_t n_calls, phi_bench_stop stop);

/* Attention of one KV head. Each call reads n_pages pages in the order of a page table [n_table_pages], from *next on.
 */
typedef struct {
    void (*kernel)(const phi_attention *a);
    phi_attention attention;
    const int32_t *page_table;
    size_t n_table_pages, n_pages;
} phi_bench_attention;
double phi_bench_attentions(const phi_bench_attention *b, size_t *next, size_t n_calls);

typedef enum {
    PHI_BENCH_RMS_NORM,
    PHI_BENCH_LAYER_NORM,
    PHI_BENCH_ROPE_NEOX,
    PHI_BENCH_ROPE_INTERLEAVED,
    PHI_BENCH_SILU_MUL,
    PHI_BENCH_GELU,
    PHI_BENCH_ADD,
    PHI_BENCH_QUANTIZE_Q8,
    PHI_BENCH_STORE_KV_F16,
    PHI_BENCH_STORE_KV_Q8,
} phi_bench_vector_op;

enum { PHI_BENCH_HEADS = 32 };

/* A kernel on vectors of n elements; head_dim = n for rope and store_kv. */
typedef struct {
    phi_bench_vector_op op;
    const phi_kernels *kernels;
    size_t n;
    const float *x, *weight,
        *bias;      /* [n]; the second inputs of silu_mul and store_kv, and cos and sin, are weight, bias */
    float *y;       /* [n] */
    phi_q8 q8;      /* [n], of quantize_q8 */
    uint8_t *slice; /* [phi_kv_slice_bytes], of store_kv */
} phi_bench_vector;
double phi_bench_vectors(const phi_bench_vector *b, size_t n_calls);

/* Barriers of all threads of a pool; negative if its threads cannot be started. */
double phi_bench_barriers(phi_pool *pool, size_t n_calls);
/* Reads of the next n_bytes of a walk; prefetch_bytes: see phi_read. */
double phi_bench_reads(phi_walk *walk, size_t n_bytes, size_t prefetch_bytes, size_t n_calls);
/* Steps of a loop of multiply-accumulates. */
double phi_bench_multiplies(const phi_peak *peak, size_t n_calls);

enum { PHI_CLOCK_CYCLES = 32 };
/* Steps of a chain of dependent additions and rotations, each of PHI_CLOCK_CYCLES cycles on any CPU: the core's clock.
 */
double phi_bench_clock(size_t n_calls);

#endif
