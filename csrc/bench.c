/* Loops over single kernels (bench.h). */
#include "bench.h"

#include "memory.h"
#include "threads.h"

enum { MACS_PER_POLL = 1 << 22 }; /* multiply-accumulates between polls: at most some milliseconds */

/* Use results, so that compilers keep what computes them. */
static volatile uint64_t sink;
static volatile double float_sink;

const uint8_t *phi_walk_next(phi_walk *walk, size_t n_bytes) {
    if (walk->n_bytes - walk->at < n_bytes) walk->at = 0;
    const uint8_t *data = walk->data + walk->at;
    walk->at += (n_bytes + PHI_ALIGN_BYTES - 1) / PHI_ALIGN_BYTES * PHI_ALIGN_BYTES;
    if (walk->at > walk->n_bytes) walk->at = walk->n_bytes;
    return data;
}

double phi_bench_products(const phi_bench_product *b, phi_walk *walk, size_t n_calls, phi_bench_stop stop) {
    const int n_rows = b->product.n_rows;
    const size_t row_bytes = b->product.row_bytes;
    const size_t row_macs = (size_t)b->product.n_cols * (size_t)b->product.n_tokens;
    size_t n_macs = 0; /* since the last poll */
    const double start = phi_seconds();
    for (size_t i = 0; i < n_calls; i++) {
        const uint8_t *rows = phi_walk_next(walk, (size_t)n_rows * row_bytes);
        for (int r = 0; r < n_rows; r += b->task_rows) {
            phi_matmul m = b->product;
            m.rows = rows + (size_t)r * row_bytes;
            m.n_rows = n_rows - r < b->task_rows ? n_rows - r : b->task_rows;
            m.out += r;
            b->kernel(&m);
            n_macs += (size_t)m.n_rows * row_macs;
            if (n_macs < MACS_PER_POLL) continue;
            if (stop.poll && stop.poll(stop.context)) return -1.0;
            n_macs = 0;
        }
    }
    return phi_seconds() - start;
}

double phi_bench_attentions(const phi_bench_attention *b, size_t *next, size_t n_calls) {
    phi_attention a = b->attention;
    const double start = phi_seconds();
    for (size_t i = 0; i < n_calls; i++) {
        if (*next + b->n_pages > b->n_table_pages) *next = 0;
        a.page_table = b->page_table + *next;
        *next += b->n_pages;
        b->kernel(&a);
    }
    return phi_seconds() - start;
}

#define REPEAT(call)                           \
    for (size_t i = 0; i < n_calls; i++) call; \
    break

double phi_bench_vectors(const phi_bench_vector *b, size_t n_calls) {
    const phi_kernels *k = b->kernels;
    const int head_dim = (int)b->n;
    const double start = phi_seconds();
    switch (b->op) {
    case PHI_BENCH_RMS_NORM:
        REPEAT(k->rms_norm(b->x, b->weight, b->n, 1e-5f, b->y));
    case PHI_BENCH_LAYER_NORM:
        REPEAT(k->layer_norm(b->x, b->weight, b->bias, b->n, 1e-5f, b->y));
    case PHI_BENCH_ROPE_NEOX:
        REPEAT(k->rope[PHI_ROPE_NEOX](b->y, head_dim, b->weight, b->bias));
    case PHI_BENCH_ROPE_INTERLEAVED:
        REPEAT(k->rope[PHI_ROPE_INTERLEAVED](b->y, head_dim, b->weight, b->bias));
    case PHI_BENCH_SILU_MUL:
        REPEAT(k->silu_mul(b->x, b->weight, b->n, b->y));
    case PHI_BENCH_GELU:
        REPEAT(k->gelu(b->x, b->n, b->y));
    case PHI_BENCH_ADD:
        REPEAT(k->add(b->x, b->n, b->y));
    case PHI_BENCH_QUANTIZE_Q8:
        REPEAT(k->quantize_q8(b->x, b->n, b->q8));
    case PHI_BENCH_STORE_KV_F16:
        REPEAT(k->store_kv[PHI_KV_F16](b->x, b->weight, head_dim, (int)(i % PHI_PAGE_TOKENS), b->slice));
    case PHI_BENCH_STORE_KV_Q8:
        REPEAT(k->store_kv[PHI_KV_Q8](b->x, b->weight, head_dim, (int)(i % PHI_PAGE_TOKENS), b->slice));
    }
    return phi_seconds() - start;
}

typedef struct {
    phi_pool *pool;
    size_t n_calls;
    double seconds; /* of thread 0 */
} barrier_run;

static void run_barriers(void *context, int thread) {
    barrier_run *run = context;
    phi_pool_barrier(run->pool); /* all threads are awake */
    const double start = phi_seconds();
    for (size_t i = 0; i < run->n_calls; i++) phi_pool_barrier(run->pool);
    if (thread == 0) run->seconds = phi_seconds() - start;
}

double phi_bench_barriers(phi_pool *pool, size_t n_calls) {
    barrier_run run = {.pool = pool, .n_calls = n_calls};
    return phi_pool_run(pool, run_barriers, &run) == PHI_OK ? run.seconds : -1.0;
}

double phi_bench_reads(phi_walk *walk, size_t n_bytes, size_t prefetch_bytes, size_t n_calls) {
    uint64_t bits = 0;
    const double start = phi_seconds();
    for (size_t i = 0; i < n_calls; i++) bits ^= phi_read(phi_walk_next(walk, n_bytes), n_bytes, prefetch_bytes);
    const double seconds = phi_seconds() - start;
    sink = bits;
    return seconds;
}

double phi_bench_multiplies(const phi_peak *peak, size_t n_calls) {
    const double start = phi_seconds();
    float_sink = peak->run(n_calls);
    const double seconds = phi_seconds() - start;
    return seconds;
}

double phi_bench_clock(size_t n_calls) {
    static volatile uint64_t source = 0x9e3779b97f4a7c15u; /* unknown to compilers, which then add from a register */
    const uint64_t k = source;
    uint64_t x = k;
    const double start = phi_seconds();
    for (size_t i = 0; i < n_calls; i++) {
        /* Not foldable into fewer operations. Additions of constants may take no cycle on recent CPUs. */
        for (int step = 0; step < PHI_CLOCK_CYCLES / 2; step++) x = (x << 7 | x >> 57) + k;
    }
    const double seconds = phi_seconds() - start;
    sink = x;
    return seconds;
}
