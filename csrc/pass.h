/* Shared by forward.c and experts.c: the state of a forward pass, its tasks, and matrix products.
 *
 * A pass is a sequence of phases. Within a phase, every thread has a range of tasks, and helps with the ranges of
 * others when its own is done; a barrier ends the phase. */
#ifndef PHI_PASS_H
#define PHI_PASS_H

#include "kernels.h"
#include "kv_cache.h"
#include "threads.h"

enum {
    OBSERVER_COLS = 64,  /* columns per task of phi_observer */
    TASK_OUTPUTS = 1024, /* outputs up to which a task of a small batch has more rows than max_task_rows */
};

/* At most PHI_ATTENTION_ROWS adjacent tokens of the batch, at consecutive positions of one sequence. */
typedef struct {
    int first, n_tokens; /* tokens first .. first + n_tokens - 1 of the batch */
} token_run;

/* Routing and activations of the experts. A row is one (token, expert) pair; rows are sorted by expert, then by token.
 * Their activations are never tiled, since the bits of a token must not depend on how many tokens share its experts. */
typedef struct {
    float *scores;           /* [n_tokens, n_experts]: output of the router */
    int *chosen;             /* [n_tokens, PHI_EXPERTS_USED] experts */
    float *weights;          /* [n_tokens, PHI_EXPERTS_USED] factors of their outputs */
    int *first_row, *n_rows; /* [n_experts]: an expert's rows */
    int *active, n_active;   /* [n_active] experts that have rows */
    int *token, *slot;       /* [n_tokens * PHI_EXPERTS_USED]: a row's token, and its index in that token's chosen */
    phi_activations in;      /* [n_tokens * PHI_EXPERTS_USED, n_embd]: input of gate and up */
    phi_activations inner;   /* [n_tokens * PHI_EXPERTS_USED, n_ffn]: input of down */
} expert_rows;

/* How many tasks of one thread's range are claimed; alone on its cache line. */
typedef struct {
    atomic_int n_claimed;
    char padding[PHI_ALIGN_BYTES - sizeof(atomic_int)];
} task_range;

typedef struct {
    const phi_model *model;
    const phi_kv *kv;
    const phi_batch *batch;
    const phi_timings *timings; /* NULL: none */
    double start;               /* phi_seconds() at the start of the call; unset without timings */
    float *residual;            /* [n_tokens, n_embd] */
    float *q;                   /* [n_tokens, n_heads * head_dim] */
    float *cos, *sin;           /* [n_tokens, rope_dims / 2] */
    bool all_tiled;             /* all products of all layers read tiled activations only */
    phi_activations *normed;    /* [n_normed], each [n_tokens, n_embd]: output of a norm */
    int n_normed;               /* 1: shared by all threads; n_threads: a copy per thread */
    phi_activations attn_out;   /* [n_tokens, n_heads * head_dim]: input of wo */
    phi_activations ffn_inner;  /* [n_tokens, n_ffn]: input of down; unset with experts */
    expert_rows experts;        /* unset without experts */
    token_run *runs;            /* [n_runs] */
    int n_runs;
    float *scratch; /* [n_threads, scratch_floats]: buffers of the current task */
    size_t scratch_floats;
    task_range *ranges; /* [3, n_threads], indexed by phase modulo 3 */
    atomic_bool stop;   /* poll returned true */
} forward_pass;

/* One thread of a pass. */
typedef struct {
    forward_pass *f;
    int thread; /* index in the pool; 0 is the calling thread */
    int phase;  /* number of phases ended */
    double lap; /* phi_seconds() when the last measured time ended; unset without timings */
} worker;

static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int ceil_div(int n, int by) { return (n + by - 1) / by; }
static inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* First task of a thread's range. */
static inline int first_task(int n_tasks, int thread, int n_threads) {
    return (int)((int64_t)n_tasks * thread / n_threads);
}

/* Returns a task that is not claimed yet, n_tasks if there is none. A thread claims the tasks of its range in order, so
 * that it reads a matrix as one stream and what a kernel prefetches beyond a task is the thread's next one. */
static inline int claim_task(const worker *w, int n_tasks) {
    const int n_threads = phi_pool_size(w->f->model->pool);
    task_range *ranges = w->f->ranges + w->phase % 3 * n_threads;
    for (int i = 0; i < n_threads; i++) {
        const int owner = (w->thread + i) % n_threads;
        const int first = first_task(n_tasks, owner, n_threads), end = first_task(n_tasks, owner + 1, n_threads);
        if (first + atomic_load(&ranges[owner].n_claimed) >= end) continue; /* does not take the line from the owner */
        const int task = first + atomic_fetch_add(&ranges[owner].n_claimed, 1);
        if (task < end) return task;
    }
    return n_tasks;
}

/* Runs the body for the tasks 0 .. n_tasks - 1 that this thread claims. */
#define FOR_EACH_TASK(w, task, n_tasks) for (int task; (task = claim_task(w, n_tasks)) < (n_tasks);)

/* Adds the seconds since the end of the last measured time to one of the thread's times [n_threads, PHI_N_PHASES]. */
static inline void add_time(worker *w, phi_phase name, double *times) {
    const double now = phi_seconds();
    times[w->thread * (int)PHI_N_PHASES + (int)name] += now - w->lap;
    w->lap = now;
}

/* Ends the work of a phase without a barrier. */
static inline void end_work(worker *w, phi_phase name) {
    if (w->f->timings) add_time(w, name, w->f->timings->working);
}

/* Waits until all threads have ended the phase. */
static inline void end_phase(worker *w, phi_phase name) {
    const phi_timings *timings = w->f->timings;
    end_work(w, name);
    /* Resets the range for the phase after the next. Its last users passed the previous barrier. */
    phi_pool *pool = w->f->model->pool;
    atomic_store(&w->f->ranges[(w->phase + 2) % 3 * phi_pool_size(pool) + w->thread].n_claimed, 0);
    phi_pool_barrier(pool);
    w->phase++;
    if (!timings) return;
    add_time(w, name, timings->waiting);
    if (w->thread == 0) timings->n_barriers[name]++;
}

/* Quantises columns first_col .. first_col + n - 1 of a token to int8. Without whole blocks of PHI_Q8_BLOCK columns
 * there is no quantised matrix that would read them. */
static inline void quantize(const phi_kernels *k, const phi_activations *x, int token, size_t first_col, size_t n) {
    const size_t n_cols = (size_t)x->n_cols, at = (size_t)token * n_cols + first_col;
    if (n_cols % PHI_Q8_BLOCK != 0 || !x->q8.quants) return;
    k->quantize_q8(x->f32 + at, n, phi_q8_at(x->q8, at));
}

/* Writes a token's row in the AMX layout if the batch's products read it. */
static inline void quantize_tiled(const phi_kernels *k, const phi_activations *x, int token) {
    const size_t n_cols = (size_t)x->n_cols;
    if (!x->tiled.tiles) return;
    k->quantize_tiled(x->f32 + (size_t)token * n_cols, n_cols, &x->tiled, (size_t)token);
}

/* The same for all rows, as a separate phase: for activations that are computed in tasks of fewer columns than
 * PHI_TILED_BLOCK. */
static inline void quantize_all_tiled(worker *w, const phi_activations *x, int n_rows) {
    if (!x->tiled.tiles) return;
    FOR_EACH_TASK(w, t, n_rows) quantize_tiled(w->f->model->kernels, x, t);
    end_phase(w, PHI_PHASE_QUANTIZE);
}

/* out[t, r] = dot(row first_row + r of the weights, token first_token + t of x) + bias[first_row + r] */
static inline void multiply_rows(const forward_pass *f, const phi_matrix *w, int first_row, int n_rows,
                                 const phi_activations *x, int first_token, int n_tokens, float *out,
                                 size_t out_stride) {
    const phi_tuning *tuning = &f->model->tuning;
    const size_t row_bytes = phi_row_bytes(w->type, (size_t)w->n_cols);
    const phi_matmul m = {
        .rows = (const uint8_t *)w->data + (size_t)first_row * row_bytes,
        .row_bytes = row_bytes,
        .n_rows = n_rows,
        .n_cols = w->n_cols,
        .x = x,
        .first_token = first_token,
        .n_tokens = n_tokens,
        .out = out,
        .out_stride = out_stride,
        .prefetch = tuning->prefetch[w->type][phi_batch_class_of(n_tokens)],
        .max_small_batch = tuning->max_small_batch[w->type],
    };
    const phi_kernels *k = f->model->kernels;
    (w->layout == PHI_LAYOUT_PANELS ? k->matmul_packed : k->matmul)[w->type](&m);
    if (!w->bias) return;
    for (int t = 0; t < n_tokens; t++) k->add(w->bias + first_row, (size_t)n_rows, out + (size_t)t * out_stride);
}

/* The same for tokens 0 .. n_tokens - 1. */
static inline void multiply(const forward_pass *f, const phi_matrix *w, int first_row, int n_rows,
                            const phi_activations *x, int n_tokens, float *out, size_t out_stride) {
    multiply_rows(f, w, first_row, n_rows, x, 0, n_tokens, out, out_stride);
}

/* Maximum number of weight rows per task for products of n_tokens untiled tokens. What a task does after its product
 * pauses the stream of weights, which then takes long to be as fast again: small batches, which wait for memory, have
 * few long tasks. */
static inline int max_untiled_rows(const phi_model *model, int n_tokens) {
    int n = model->tuning.max_task_rows;
    while (n < TASK_OUTPUTS && 2 * n * n_tokens <= TASK_OUTPUTS) n *= 2;
    return n;
}

/* The same for products with x. */
static inline int max_task_rows(const forward_pass *f, const phi_activations *x, int n_tokens) {
    return x->tiled.tiles ? PHI_TILED_TASK_ROWS : max_untiled_rows(f->model, n_tokens);
}

/* Number of tasks that a phase is divided into, so that no thread waits long at its barrier. */
static inline int min_tasks(const forward_pass *f) {
    return f->model->tuning.tasks_per_thread * phi_pool_size(f->model->pool);
}

/* Weight rows per task: max_rows, or fewer for min_tasks, but whole blocks of PHI_Q8_BLOCK rows, which are columns of
 * the next product. */
static inline int task_rows(const forward_pass *f, int n_rows, int max_rows) {
    int chunk = max_rows;
    while (chunk > PHI_Q8_BLOCK && n_rows / chunk < min_tasks(f)) chunk /= 2;
    return chunk;
}

/* Phases of experts.c; normed [n_tokens, n_embd] is the input of the feed-forward.
 * Chooses the experts of every token and their weights. */
void phi_route(worker *w, int layer, const phi_activations *normed);
/* Adds the output of the chosen experts to the residual. */
void phi_run_experts(worker *w, int layer, const phi_activations *normed);
/* Adds the inputs of the experts to the batch's observer. */
void phi_observe_experts(worker *w, int layer);

/* sums[column] += x[row, column]^2 for n_rows rows from first_row on, and the OBSERVER_COLS columns of one task. */
static inline void observe_columns(const phi_activations *x, int first_row, int n_rows, int task, double *sums) {
    const int n_cols = x->n_cols, first = task * OBSERVER_COLS, end = min_int(first + OBSERVER_COLS, n_cols);
    for (int t = first_row; t < first_row + n_rows; t++) {
        const float *row = x->f32 + (size_t)t * (size_t)n_cols;
        for (int i = first; i < end; i++) sums[i] += (double)row[i] * (double)row[i];
    }
}

#endif
