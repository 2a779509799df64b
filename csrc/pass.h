/* What the phases of a forward pass share: the pass, its workers and their tasks, and products. */
#ifndef PHI_PASS_H
#define PHI_PASS_H

#include "kernels.h"
#include "kv_cache.h"
#include "threads.h"

enum { CHUNK_ROWS = 64 }; /* rows of a weight matrix a task, at most, where activations are not wide */

/* Tokens at consecutive positions of one sequence, at most PHI_ATTENTION_ROWS of them. */
typedef struct {
    int first, n_tokens; /* in the batch */
} token_run;

/* Which experts run for which tokens, and their activations: an expert's rows lie together, its tokens in ascending
 * order. They are never wide: how many tokens share an expert must not decide how its products round. */
typedef struct {
    float *scores;           /* [n_tokens, n_experts] of the router */
    int *chosen;             /* [n_tokens, PHI_EXPERTS_USED] */
    float *weights;          /* [n_tokens, PHI_EXPERTS_USED] of the chosen ones */
    int *first_row, *n_rows; /* [n_experts] */
    int *active, n_active;   /* [n_active] experts that have rows */
    int *token, *slot;       /* [n_rows]: whose row it is, and which of its chosen experts */
    phi_activations in;      /* [n_rows, n_embd]; there are n_tokens * PHI_EXPERTS_USED rows */
    phi_activations inner;   /* [n_rows, n_ffn] */
} expert_rows;

typedef struct {
    const phi_model *model;
    const phi_kv *kv;
    const phi_batch *batch;
    float *residual;         /* [n_tokens, n_embd] */
    float *q;                /* [n_tokens, n_heads * head_dim] */
    float *cos, *sin;        /* [n_tokens, rope_dims / 2] */
    bool all_tiled;           /* no product in a layer takes other than tiled activations */
    phi_activations *normed; /* [n_norms] of [n_tokens, n_embd]: one for all threads, or one each */
    int n_norms;
    phi_activations attended; /* [n_tokens, n_heads * head_dim] */
    phi_activations inner;    /* [n_tokens, n_ffn] */
    expert_rows experts;      /* of models with experts, in place of inner */
    token_run *runs;          /* [n_runs] */
    int n_runs;
    float *scratch; /* [n_threads, scratch_floats] */
    size_t scratch_floats;
    atomic_int next_task[3]; /* by phase modulo 3 */
    atomic_bool stop;
} forward;

typedef struct {
    forward *f;
    int thread;
    int phase;
} worker;

static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int n_chunks(int n_rows, int chunk) { return (n_rows + chunk - 1) / chunk; }
static inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static inline int take_task(const worker *w) { return atomic_fetch_add(&w->f->next_task[w->phase % 3], 1); }

#define FOR_EACH_TASK(w, task, n_tasks) for (int task; (task = take_task(w)) < (n_tasks);)

static inline void end_phase(worker *w) {
    /* The counter of the phase after the next: its last users passed the barrier before this one. */
    if (w->thread == 0) atomic_store(&w->f->next_task[(w->phase + 2) % 3], 0);
    phi_pool_barrier(w->f->model->pool);
    w->phase++;
}

/* Rows of n_cols as products take them: floats, and int8 where blocks fit (no quantised matrix exists where not). */
static inline void quantize(const phi_kernels *k, const phi_activations *x, int token, size_t first_col, size_t n) {
    const size_t n_cols = (size_t)x->n_cols, at = (size_t)token * n_cols + first_col;
    if (n_cols % PHI_Q8_BLOCK != 0 || !x->q8.quants) return;
    k->quantize_q8(x->f32 + at, n, phi_q8_at(x->q8, at));
}

/* A whole row as products of many tokens take it, where they do. */
static inline void quantize_tiled(const phi_kernels *k, const phi_activations *x, int token) {
    const size_t n_cols = (size_t)x->n_cols;
    if (!x->tiled.tiles) return;
    k->quantize_tiled(x->f32 + (size_t)token * n_cols, n_cols, &x->tiled, (size_t)token);
}

/* The same for all rows, as a phase: for activations whose tasks have too few columns for a wide block. */
static inline void quantize_all_tiled(worker *w, const phi_activations *x, int n_rows) {
    if (!x->tiled.tiles) return;
    FOR_EACH_TASK(w, t, n_rows) quantize_tiled(w->f->model->kernels, x, t);
    end_phase(w);
}

/* out[t, r] = row r of the weights times token t, and its bias; tokens first_token .. first_token + n_tokens - 1. */
static inline void multiply_rows(const forward *f, const phi_matrix *w, int first_row, int n_rows,
                                 const phi_activations *x, int first_token, int n_tokens, float *out,
                                 size_t out_stride) {
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
        .prefetch = f->model->kernels->prefetch,
    };
    const phi_kernels *k = f->model->kernels;
    (w->layout == PHI_LAYOUT_PANELS ? k->matmul_packed : k->matmul)[w->type](&m);
    if (!w->bias) return;
    for (int t = 0; t < n_tokens; t++) k->add(w->bias + first_row, (size_t)n_rows, out + (size_t)t * out_stride);
}

/* The same for all tokens of the batch, or rows whose logits are wanted. */
static inline void multiply(const forward *f, const phi_matrix *w, int first_row, int n_rows, const phi_activations *x,
                            int n_tokens, float *out, size_t out_stride) {
    multiply_rows(f, w, first_row, n_rows, x, 0, n_tokens, out, out_stride);
}

/* Rows of a weight matrix a task, at most, for products of x. */
static inline int most_rows(const phi_activations *x) { return x->tiled.tiles ? PHI_TILED_TASK_ROWS : CHUNK_ROWS; }

/* Cuts n_rows into tasks of at most so many rows: at least eight for each thread where that leaves whole blocks, so
 * that none waits for long. */
static inline int chunk_rows(const forward *f, int n_rows, int most) {
    int chunk = most;
    while (chunk > PHI_Q8_BLOCK && n_rows / chunk < 8 * phi_pool_size(f->model->pool)) chunk /= 2;
    return chunk;
}

/* The phases of experts.c. normed [n_tokens, n_embd] is the feed-forward's input. */
void phi_route(worker *w, int layer, const phi_activations *normed);
void phi_run_experts(worker *w, int layer, const phi_activations *normed);
void phi_observe_experts(worker *w, int layer);

/* sums[column] += x[row, column]^2 for n_rows rows from first_row on, in the columns of one task. */
static inline void observe_columns(const phi_activations *x, int first_row, int n_rows, int task, double *sums) {
    const int n_cols = x->n_cols, first = task * CHUNK_ROWS, end = min_int(first + CHUNK_ROWS, n_cols);
    for (int t = first_row; t < first_row + n_rows; t++) {
        const float *row = x->f32 + (size_t)t * (size_t)n_cols;
        for (int i = first; i < end; i++) sums[i] += (double)row[i] * (double)row[i];
    }
}

#endif
