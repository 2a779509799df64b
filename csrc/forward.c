/* The forward pass of a batch. All threads of the pool run the same phases; within a phase they share its tasks
 * (pass.h).
 *
 * Phases of a layer, with the unit of a task:
 *   norm             token                       up to MAX_REPLICATED_TOKENS: every thread computes all of it itself
 *   q, k, v          group of heads              projection, RoPE, and storing keys and values in the cache
 *   attention        run of tokens, KV head
 *   output           chunk of n_embd             residual += attn_out @ wo.T
 *   norm             token                       skipped with parallel residuals
 *   gate and up      chunk of n_ffn              ffn_inner = silu(gate) * up, or gelu(up); or the phases of experts.c
 *   down             chunk of n_embd             residual += ffn_inner @ down.T
 *
 * A task quantises the activations that it computes. If the batch's products read tiled activations, or if a KV head's
 * part of attn_out is not whole blocks, the input of output or down is quantised in a further phase. */
#include "phi.h"

#include <math.h>
#include <string.h>

#include "pass.h"

enum {
    MAX_REPLICATED_TOKENS = 4, /* largest batch whose norms every thread computes itself: faster than a barrier */
    MAX_SLOTS_PREFETCHED = 8,  /* tokens whose slots are prefetched: 3 KiB each for head_dim 96 */
    SHORT_RUN_TOKENS = 8,      /* tokens per run if runs of PHI_ATTENTION_ROWS would be too few for all threads */
};

/* ---- phases ---- */

#define PHI_PHASE(name, text) text,
const char *const phi_phase_names[PHI_N_PHASES] = {
#include "phases.def"
};
#undef PHI_PHASE

/* Adds x, the input of a matrix product, to the observer's sums [n_cols]. x must be complete. */
static void observe(worker *w, const phi_activations *x, double *sums) {
    FOR_EACH_TASK(w, task, ceil_div(x->n_cols, OBSERVER_COLS)) {
        observe_columns(x, 0, w->f->batch->n_tokens, task, sums);
    }
    end_phase(w, PHI_PHASE_OBSERVE);
}

/* Looks up the embeddings of all tokens and computes the cosines and sines of their positions. */
static void embed(worker *w) {
    const forward_pass *f = w->f;
    const phi_model *model = f->model;
    const phi_matrix *embd = &model->token_embd;
    const size_t n_embd = (size_t)model->n_embd, n_freqs = (size_t)model->rope_dims / 2;
    const size_t row_bytes = phi_row_bytes(embd->type, n_embd);
    FOR_EACH_TASK(w, t, f->batch->n_tokens) {
        const size_t token = (size_t)f->batch->tokens[t];
        const uint8_t *row = (const uint8_t *)embd->data + token * row_bytes;
        model->kernels->dequantize[embd->type](row, n_embd, f->residual + (size_t)t * n_embd);

        const bool long_rope = f->batch->sequences[f->batch->seq_ids[t]].long_rope;
        const float *inv_freq = long_rope ? model->rope_inv_freq_long : model->rope_inv_freq;
        for (size_t i = 0; i < n_freqs; i++) {
            const float angle = (float)f->batch->positions[t] * inv_freq[i]; /* float32, as in transformers */
            f->cos[(size_t)t * n_freqs + i] = (float)cos((double)angle) * model->rope_attn_factor;
            f->sin[(size_t)t * n_freqs + i] = (float)sin((double)angle) * model->rope_attn_factor;
        }
    }
    end_phase(w, PHI_PHASE_EMBED);
}

static void normalise_row(const forward_pass *f, int residual_row, const phi_norm *norm, const phi_activations *normed,
                          int row) {
    const phi_model *model = f->model;
    const size_t n_embd = (size_t)model->n_embd;
    const float *x = f->residual + (size_t)residual_row * n_embd;
    float *y = normed->f32 + (size_t)row * n_embd;
    if (model->norm_kind == PHI_LAYER_NORM) {
        model->kernels->layer_norm(x, norm->weight, norm->bias, n_embd, model->norm_eps, y);
    } else {
        model->kernels->rms_norm(x, norm->weight, n_embd, model->norm_eps, y);
    }
    /* all_tiled does not apply to the output matrix, whose batch of logit rows may be small. */
    if (!f->all_tiled || norm == &model->output_norm) quantize(model->kernels, normed, row, 0, n_embd);
    quantize_tiled(model->kernels, normed, row);
}

/* Normalises n_rows rows of the residual: rows[i], or i if rows is NULL. Returns the buffer that this thread reads. */
static const phi_activations *normalise(worker *w, const phi_norm *norm, int n_rows, const int32_t *rows) {
    const forward_pass *f = w->f;
    const phi_activations *normed = &f->normed[f->n_normed == 1 ? 0 : w->thread];
    if (f->n_normed > 1) {
        for (int i = 0; i < n_rows; i++) normalise_row(f, rows ? rows[i] : i, norm, normed, i);
        end_work(w, PHI_PHASE_NORM);
    } else {
        FOR_EACH_TASK(w, i, n_rows) normalise_row(f, rows ? rows[i] : i, norm, normed, i);
        end_phase(w, PHI_PHASE_NORM);
    }
    return normed;
}

static void apply_rope(const forward_pass *f, float *heads, size_t stride) {
    const phi_model *model = f->model;
    const size_t n_freqs = (size_t)model->rope_dims / 2;
    for (int t = 0; t < f->batch->n_tokens; t++) {
        model->kernels->rope[model->rope_style](heads + (size_t)t * stride, model->rope_dims,
                                                f->cos + (size_t)t * n_freqs, f->sin + (size_t)t * n_freqs);
    }
}

/* Stores k, v of one KV head for all tokens; a token's head_dim floats are stride floats after the previous token's. */
static void store_kv(const forward_pass *f, int layer, int kv_head, const float *k, const float *v, size_t stride) {
    const phi_model *model = f->model;
    const phi_kv_type type = phi_kv_type_of(f->kv);
    const size_t page_bytes = phi_kv_page_bytes(model, type);
    uint8_t *first_slice = phi_kv_first_slice(model, f->kv, layer, kv_head);
    for (int t = 0; t < f->batch->n_tokens; t++) {
        const int position = f->batch->positions[t];
        const int32_t page = f->batch->sequences[f->batch->seq_ids[t]].pages[position / PHI_PAGE_TOKENS];
        const size_t at = (size_t)t * stride;
        model->kernels->store_kv[type](k + at, v + at, model->head_dim, position % PHI_PAGE_TOKENS,
                                       first_slice + (size_t)page * page_bytes);
    }
}

/* Prefetches, for writing, the lines that store_kv writes for token t. A key is a column of its group, so storing it
 * touches every line of the group, and would wait for one miss after another. */
static void prefetch_slot(const forward_pass *f, int layer, int kv_head, int t) {
#ifdef __GNUC__
    const phi_model *model = f->model;
    const phi_kv_type type = phi_kv_type_of(f->kv);
    const int position = f->batch->positions[t], slot = position % PHI_PAGE_TOKENS;
    const int32_t page = f->batch->sequences[f->batch->seq_ids[t]].pages[position / PHI_PAGE_TOKENS];
    uint8_t *first_slice = phi_kv_first_slice(model, f->kv, layer, kv_head);
    const phi_kv_slice slice =
        phi_kv_slice_of(type, model->head_dim, first_slice + (size_t)page * phi_kv_page_bytes(model, type));
    const size_t row_bytes = (size_t)model->head_dim * (type == PHI_KV_F16 ? sizeof(uint16_t) : 1);
    const uint8_t *keys = slice.keys + (size_t)(slot / PHI_KV_GROUP) * PHI_KV_GROUP * row_bytes;
    for (size_t i = 0; i < PHI_KV_GROUP * row_bytes; i += 64) __builtin_prefetch(keys + i, 1);
    for (size_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(slice.values + (size_t)slot * row_bytes + i, 1);
#else
    (void)f, (void)layer, (void)kv_head, (void)t;
#endif
}

/* Heads per task: as many as have max_task_rows rows, or fewer for min_tasks. */
static int heads_per_task(const forward_pass *f, const phi_activations *normed) {
    int n = max_int(max_task_rows(f, normed, f->batch->n_tokens) / f->model->head_dim, 1);
    while (n > 1 && (f->model->n_kv_heads + f->model->n_heads) / n < min_tasks(f)) n /= 2;
    return n;
}

/* q, k and v of all tokens: applies RoPE to q and k, writes q to f->q, and k and v to the cache. */
static void project_qkv(worker *w, int layer, const phi_activations *normed) {
    const forward_pass *f = w->f;
    const phi_model *model = f->model;
    const phi_layer *l = &model->layers[layer];
    const int head_dim = model->head_dim, n_tokens = f->batch->n_tokens, per_task = heads_per_task(f, normed);
    const size_t q_dim = (size_t)model->n_heads * (size_t)head_dim, stride = (size_t)(per_task * head_dim);
    const int n_kv_tasks = ceil_div(model->n_kv_heads, per_task);
    float *heads = f->scratch + (size_t)w->thread * f->scratch_floats, *values = heads + (size_t)n_tokens * stride;
    FOR_EACH_TASK(w, task, n_kv_tasks + ceil_div(model->n_heads, per_task)) {
        const bool is_kv = task < n_kv_tasks;
        const int first = (is_kv ? task : task - n_kv_tasks) * per_task;
        const int n = min_int(per_task, (is_kv ? model->n_kv_heads : model->n_heads) - first);
        for (int i = 0; is_kv && i < n; i++) {
            for (int t = 0; t < min_int(n_tokens, MAX_SLOTS_PREFETCHED); t++) prefetch_slot(f, layer, first + i, t);
        }
        multiply(f, is_kv ? &l->wk : &l->wq, first * head_dim, n * head_dim, normed, n_tokens, heads, stride);
        if (is_kv) multiply(f, &l->wv, first * head_dim, n * head_dim, normed, n_tokens, values, stride);
        for (int i = 0; i < n; i++) {
            const size_t at = (size_t)(i * head_dim);
            apply_rope(f, heads + at, stride);
            if (is_kv) store_kv(f, layer, first + i, heads + at, values + at, stride);
        }
        /* Products write to scratch first, since rows of f->q are so far apart that they map to few cache sets. */
        float *q = f->q + (size_t)(first * head_dim);
        for (int t = 0; !is_kv && t < n_tokens; t++)
            memcpy(q + (size_t)t * q_dim, heads + (size_t)t * stride, (size_t)(n * head_dim) * sizeof *q);
    }
    end_phase(w, PHI_PHASE_QKV);
}

/* attn_out = attention of all tokens and heads */
static void run_attention(worker *w, int layer) {
    const forward_pass *f = w->f;
    const phi_model *model = f->model;
    const int n_queries = model->n_heads / model->n_kv_heads;
    const phi_kv_type type = phi_kv_type_of(f->kv);
    const size_t q_dim = (size_t)model->n_heads * (size_t)model->head_dim;
    const size_t group_dim = (size_t)n_queries * (size_t)model->head_dim;
    const bool whole_blocks = group_dim % PHI_Q8_BLOCK == 0; /* a task can quantise its columns of attn_out */
    FOR_EACH_TASK(w, task, f->n_runs * model->n_kv_heads) {
        /* The last run of a prompt attends to the most positions, so it starts first. Runs of the same KV head are
         * adjacent tasks: a run finds in the CPU's caches what the one before it read. */
        const token_run *run = &f->runs[f->n_runs - 1 - task % f->n_runs];
        const int kv_head = task / f->n_runs;
        const size_t first_col = (size_t)kv_head * group_dim, at = (size_t)run->first * q_dim + first_col;
        const phi_attention a = {
            .q = f->q + at,
            .n_tokens = run->n_tokens,
            .n_queries = n_queries,
            .head_dim = model->head_dim,
            .token_stride = q_dim,
            .pages = phi_kv_first_slice(model, f->kv, layer, kv_head),
            .page_bytes = phi_kv_page_bytes(model, type),
            .page_table = f->batch->sequences[f->batch->seq_ids[run->first]].pages,
            .query_start = f->batch->positions[run->first],
            .window = model->window,
            .scale = 1.0f / sqrtf((float)model->head_dim),
            .scratch = f->scratch + (size_t)w->thread * f->scratch_floats,
            .out = f->attn_out.f32 + at,
        };
        model->kernels->attention[type](&a);
        for (int t = run->first; whole_blocks && t < run->first + run->n_tokens; t++)
            quantize(model->kernels, &f->attn_out, t, first_col, group_dim);
    }
    end_phase(w, PHI_PHASE_ATTENTION);
    quantize_all_tiled(w, &f->attn_out, f->batch->n_tokens);
    if (whole_blocks) return;
    FOR_EACH_TASK(w, t, f->batch->n_tokens) quantize(model->kernels, &f->attn_out, t, 0, q_dim);
    end_phase(w, PHI_PHASE_QUANTIZE);
}

/* residual += x @ matrix.T */
static void project_residual(worker *w, phi_phase name, const phi_matrix *matrix, const phi_activations *x) {
    const forward_pass *f = w->f;
    const size_t n_embd = (size_t)f->model->n_embd;
    float *out = f->scratch + (size_t)w->thread * f->scratch_floats;
    const int max_rows = max_task_rows(f, x, f->batch->n_tokens), chunk = task_rows(f, matrix->n_rows, max_rows);
    FOR_EACH_TASK(w, task, ceil_div(matrix->n_rows, chunk)) {
        const int first = task * chunk, n_rows = min_int(chunk, matrix->n_rows - first);
        multiply(f, matrix, first, n_rows, x, f->batch->n_tokens, out, (size_t)max_rows);
        for (int t = 0; t < f->batch->n_tokens; t++) {
            f->model->kernels->add(out + (size_t)t * (size_t)max_rows, (size_t)n_rows,
                                   f->residual + (size_t)t * n_embd + (size_t)first);
        }
    }
    end_phase(w, name);
}

/* ffn_inner = silu(gate) * up, or gelu(up) */
static void project_gate_up(worker *w, const phi_feed_forward *ffn, const phi_activations *normed) {
    const forward_pass *f = w->f;
    const phi_kernels *kernels = f->model->kernels;
    const int n_tokens = f->batch->n_tokens, n_ffn = f->model->n_ffn;
    float *gates = f->scratch + (size_t)w->thread * f->scratch_floats;
    const int max_rows = max_task_rows(f, normed, n_tokens), chunk = task_rows(f, n_ffn, max_rows);
    float *ups = gates + (size_t)n_tokens * (size_t)max_rows;
    FOR_EACH_TASK(w, task, ceil_div(n_ffn, chunk)) {
        const int first = task * chunk, n_rows = min_int(chunk, n_ffn - first);
        const bool gated = f->model->ffn_activation == PHI_FFN_SWIGLU;
        if (gated) multiply(f, &ffn->gate, first, n_rows, normed, n_tokens, gates, (size_t)max_rows);
        multiply(f, &ffn->up, first, n_rows, normed, n_tokens, ups, (size_t)max_rows);
        for (int t = 0; t < n_tokens; t++) {
            const size_t at = (size_t)t * (size_t)max_rows;
            float *y = f->ffn_inner.f32 + (size_t)t * (size_t)n_ffn + (size_t)first;
            if (gated) {
                kernels->silu_mul(gates + at, ups + at, (size_t)n_rows, y);
            } else {
                kernels->gelu(ups + at, (size_t)n_rows, y);
            }
            quantize(kernels, &f->ffn_inner, t, (size_t)first, (size_t)n_rows);
        }
    }
    end_phase(w, PHI_PHASE_GATE_UP);
    quantize_all_tiled(w, &f->ffn_inner, n_tokens);
}

/* residual += feed-forward of normed, or of its experts */
static void feed_forward(worker *w, int layer, const phi_activations *normed) {
    const forward_pass *f = w->f;
    const phi_model *model = f->model;
    const phi_layer *l = &model->layers[layer];
    const phi_observer *observer = f->batch->observer;
    if (observer) observe(w, normed, observer->ffn_in + (size_t)layer * (size_t)model->n_embd);
    if (model->n_experts) {
        phi_route(w, layer, normed);
        phi_run_experts(w, layer, normed);
        if (observer) phi_observe_experts(w, layer);
        return;
    }
    project_gate_up(w, l->ffn, normed);
    if (observer) observe(w, &f->ffn_inner, observer->ffn_inner + (size_t)layer * (size_t)model->n_ffn);
    project_residual(w, PHI_PHASE_DOWN, &l->ffn->down, &f->ffn_inner);
}

/* logits [n_rows, n_vocab] = normed @ output.T */
static void project_logits(worker *w, const phi_activations *normed, int n_rows, float *logits) {
    const forward_pass *f = w->f;
    const phi_model *model = f->model;
    const int chunk = task_rows(f, model->n_vocab, max_task_rows(f, normed, n_rows));
    FOR_EACH_TASK(w, task, ceil_div(model->n_vocab, chunk)) {
        const int first = task * chunk, n = min_int(chunk, model->n_vocab - first);
        multiply(f, &model->output, first, n, normed, n_rows, logits + first, (size_t)model->n_vocab);
    }
    end_phase(w, PHI_PHASE_LM_HEAD);
}

/* The batch's logits and hidden states. */
static void write_outputs(worker *w) {
    const phi_batch *batch = w->f->batch;
    const phi_model *model = w->f->model;
    if (batch->n_logit_rows == 0) return;
    const phi_activations *normed = normalise(w, &model->output_norm, batch->n_logit_rows, batch->logit_rows);
    if (w->thread == 0 && batch->hidden_states)
        memcpy(batch->hidden_states, normed->f32, (size_t)batch->n_logit_rows * (size_t)model->n_embd * sizeof(float));
    if (batch->logits) project_logits(w, normed, batch->n_logit_rows, batch->logits);
}

static void run_layer(worker *w, int layer) {
    forward_pass *f = w->f;
    const phi_batch *batch = f->batch;
    const phi_model *model = f->model;
    const phi_layer *l = &model->layers[layer];
    const phi_observer *observer = batch->observer;
    const phi_activations *normed = normalise(w, &l->attn_norm, batch->n_tokens, NULL);
    if (observer) observe(w, normed, observer->attn_in + (size_t)layer * (size_t)model->n_embd);
    project_qkv(w, layer, normed);
    run_attention(w, layer);
    if (observer) observe(w, &f->attn_out, observer->attn_out + (size_t)layer * (size_t)f->attn_out.n_cols);
    project_residual(w, PHI_PHASE_ATTN_OUTPUT, &l->wo, &f->attn_out);
    if (!model->parallel) normed = normalise(w, &l->ffn_norm, batch->n_tokens, NULL);
    if (w->thread == 0 && batch->poll && batch->poll(batch->poll_context)) atomic_store(&f->stop, true);
    feed_forward(w, layer, normed);
}

static void run_pass(void *context, int thread) {
    forward_pass *f = context;
    const phi_model *model = f->model;
    const phi_batch *batch = f->batch;
    worker w = {.f = f, .thread = thread, .lap = f->start};
    if (f->timings) add_time(&w, PHI_PHASE_START, thread == 0 ? f->timings->working : f->timings->waiting);
    embed(&w);
    for (int layer = 0; layer < model->n_layers; layer++) {
        run_layer(&w, layer);
        /* There is a barrier between a write of stop and this read, and between this read and the next write, so all
         * threads return after the same layer. */
        if (atomic_load(&f->stop)) return;
    }
    const phi_observer *observer = batch->observer;
    if (observer && observer->output)
        observe(&w, normalise(&w, &model->output_norm, batch->n_tokens, NULL), observer->output);
    write_outputs(&w);
}

/* ---- working memory ---- */

typedef struct {
    uint8_t *memory; /* NULL: only count the bytes */
    size_t used;     /* bytes */
} arena;

static void *allot(arena *a, size_t n_bytes) {
    void *p = a->memory ? a->memory + a->used : NULL;
    a->used += round_up(n_bytes, PHI_ALIGN_BYTES);
    return p;
}

static void allot_ranges(forward_pass *f, arena *a) {
    const int n = 3 * phi_pool_size(f->model->pool);
    f->ranges = allot(a, (size_t)n * sizeof *f->ranges);
    for (int i = 0; a->memory && i < n; i++) atomic_init(&f->ranges[i].n_claimed, 0);
}

/* Floats and int8. */
static phi_activations allot_untiled(arena *a, size_t n_tokens, int n_cols) {
    const size_t n = n_tokens * (size_t)n_cols;
    return (phi_activations){
        .n_cols = n_cols,
        .f32 = allot(a, n * sizeof(float)),
        .q8 = {.quants = allot(a, n),
               .scales = allot(a, n / PHI_Q8_BLOCK * sizeof(float)),
               .sums = allot(a, n / PHI_SUM_BLOCK * sizeof(float)),
               .block_sums = allot(a, n / PHI_Q8_BLOCK * sizeof(float)),
               .offsets = allot(a, n / PHI_SUM_BLOCK * sizeof(int32_t)),
               .block_offsets = allot(a, n / PHI_Q8_BLOCK * sizeof(int32_t))},
    };
}

/* Whether products of n_tokens tokens may read tiled activations. */
static bool uses_tiled(const phi_kernels *k, size_t n_tokens) {
    return k->quantize_tiled && n_tokens > (size_t)k->max_exact_batch;
}

/* Whether all matrices of all layers are multiplied with tiled activations, so that no int8 ones are needed. */
static bool all_take_tiled(const phi_model *model, size_t n_tokens) {
    const phi_kernels *k = model->kernels;
    if (!uses_tiled(k, n_tokens) || model->n_experts) return false;
    for (int i = 0; i < model->n_layers; i++) {
        const phi_layer *l = &model->layers[i];
        const bool gated = model->ffn_activation == PHI_FFN_SWIGLU;
        const phi_matrix *const gate = gated ? &l->ffn->gate : &l->ffn->up;
        const phi_matrix *const all[] = {&l->wq, &l->wk, &l->wv, &l->wo, gate, &l->ffn->up, &l->ffn->down};
        for (size_t j = 0; j < sizeof all / sizeof all[0]; j++) {
            const phi_matrix *m = all[j];
            if (m->layout != PHI_LAYOUT_PANELS || !k->takes_tiled[m->type] || m->n_cols % PHI_TILED_BLOCK != 0)
                return false;
        }
    }
    return true;
}

/* Floats, int8 unless only_tiled, and tiles if products of n_tokens tokens may read them. */
static phi_activations allot_activations(arena *a, const phi_kernels *k, size_t n_tokens, int n_cols, bool only_tiled) {
    phi_activations x = {.n_cols = n_cols};
    if (only_tiled)
        x.f32 = allot(a, n_tokens * (size_t)n_cols * sizeof(float));
    else
        x = allot_untiled(a, n_tokens, n_cols);
    if (uses_tiled(k, n_tokens) && n_cols % PHI_TILED_BLOCK == 0) {
        x.tiled = (phi_tiled){
            .tiles = allot(a, phi_tiled_bytes(n_tokens, (size_t)n_cols)),
            .scales = allot(a, phi_tiled_n_scales(n_tokens, (size_t)n_cols) * sizeof(float)),
            .n_tokens = phi_tiled_tokens(n_tokens),
        };
    }
    return x;
}

static void lay_out_experts(forward_pass *f, arena *a, size_t n_tokens) {
    const phi_model *model = f->model;
    const size_t n_experts = (size_t)model->n_experts, n_chosen = n_tokens * PHI_EXPERTS_USED;
    f->experts = (expert_rows){
        .scores = allot(a, n_tokens * n_experts * sizeof(float)),
        .chosen = allot(a, n_chosen * sizeof(int)),
        .weights = allot(a, n_chosen * sizeof(float)),
        .first_row = allot(a, n_experts * sizeof(int)),
        .n_rows = allot(a, n_experts * sizeof(int)),
        .active = allot(a, n_experts * sizeof(int)),
        .token = allot(a, n_chosen * sizeof(int)),
        .slot = allot(a, n_chosen * sizeof(int)),
        .in = allot_untiled(a, n_chosen, model->n_embd),
        .inner = allot_untiled(a, n_chosen, model->n_ffn),
    };
}

/* Allots the buffers of a pass. Called twice: to count the bytes, then with memory. */
static void lay_out(forward_pass *f, arena *a) {
    const phi_model *model = f->model;
    const phi_batch *batch = f->batch;
    /* The final norm reuses the buffers of the batch for the logit rows, which can be more than n_tokens. */
    const size_t n_tokens = (size_t)max_int(batch->n_tokens, batch->n_logit_rows);
    const int n_threads = phi_pool_size(model->pool);
    const int q_dim = model->n_heads * model->head_dim;

    const size_t attention = phi_attention_scratch_floats(model->head_dim);
    const int untiled_rows = max_untiled_rows(model, batch->n_tokens);
    const int max_rows =
        uses_tiled(model->kernels, n_tokens) ? max_int(PHI_TILED_TASK_ROWS, untiled_rows) : untiled_rows;
    const size_t products = 2 * n_tokens * (size_t)max_int(max_rows, model->head_dim);
    f->scratch_floats = round_up(attention > products ? attention : products, PHI_ALIGN_BYTES / sizeof(float));

    allot_ranges(f, a);
    f->residual = allot(a, n_tokens * (size_t)model->n_embd * sizeof(float));
    f->q = allot(a, n_tokens * (size_t)q_dim * sizeof(float));
    f->cos = allot(a, n_tokens * (size_t)model->rope_dims / 2 * sizeof(float));
    f->sin = allot(a, n_tokens * (size_t)model->rope_dims / 2 * sizeof(float));
    f->n_normed = n_tokens <= MAX_REPLICATED_TOKENS ? n_threads : 1;
    f->normed = allot(a, (size_t)f->n_normed * sizeof *f->normed);
    for (int i = 0; i < f->n_normed; i++) {
        const phi_activations normed = allot_activations(a, model->kernels, n_tokens, model->n_embd, false);
        if (a->memory) f->normed[i] = normed;
    }
    f->attn_out = allot_activations(a, model->kernels, n_tokens, q_dim, f->all_tiled);
    if (model->n_experts) {
        lay_out_experts(f, a, n_tokens);
    } else {
        f->ffn_inner = allot_activations(a, model->kernels, n_tokens, model->n_ffn, f->all_tiled);
    }
    f->runs = allot(a, n_tokens * sizeof *f->runs);
    f->scratch = allot(a, (size_t)n_threads * f->scratch_floats * sizeof(float));
}

/* Splits the batch into runs. */
static void find_runs(forward_pass *f) {
    const phi_batch *b = f->batch;
    const int n_tasks = b->n_tokens / PHI_ATTENTION_ROWS * f->model->n_kv_heads;
    const int max_tokens = n_tasks >= 4 * phi_pool_size(f->model->pool) ? PHI_ATTENTION_ROWS : SHORT_RUN_TOKENS;
    for (int t = 0; t < b->n_tokens; t++) {
        token_run *run = f->n_runs ? &f->runs[f->n_runs - 1] : NULL;
        if (run && run->n_tokens < max_tokens && b->seq_ids[t] == b->seq_ids[run->first] &&
            b->positions[t] == b->positions[run->first] + run->n_tokens) {
            run->n_tokens++;
        } else {
            f->runs[f->n_runs++] = (token_run){t, 1};
        }
    }
}

phi_status phi_forward(const phi_model *model, phi_kv *kv, const phi_batch *batch) {
    const bool all_tiled = all_take_tiled(model, (size_t)batch->n_tokens);
    forward_pass f = {.model = model, .kv = kv, .batch = batch, .timings = batch->timings, .all_tiled = all_tiled};
    if (f.timings) f.start = phi_seconds();
    arena a = {NULL, 0};
    lay_out(&f, &a);
    a.memory = phi_kv_scratch(kv, a.used);
    if (!a.memory) return PHI_OUT_OF_MEMORY;
    a.used = 0;
    lay_out(&f, &a);
    find_runs(&f);
    const phi_status status = phi_pool_run(model->pool, run_pass, &f);
    if (status != PHI_OK) return status;
    return atomic_load(&f.stop) ? PHI_CANCELLED : PHI_OK;
}

/* ---- LM head ---- */

typedef struct {
    forward_pass f; /* model, normed and ranges only */
    int n_rows;
    const float *hidden_states; /* [n_rows, n_embd] */
    float *logits;              /* [n_rows, n_vocab] */
} lm_head_call;

static void run_lm_head(void *context, int thread) {
    lm_head_call *c = context;
    const size_t n_embd = (size_t)c->f.model->n_embd;
    worker w = {.f = &c->f, .thread = thread};
    const phi_activations *x = c->f.normed;
    FOR_EACH_TASK(&w, i, c->n_rows) {
        memcpy(x->f32 + (size_t)i * n_embd, c->hidden_states + (size_t)i * n_embd, n_embd * sizeof(float));
        quantize(c->f.model->kernels, x, i, 0, n_embd);
        quantize_tiled(c->f.model->kernels, x, i);
    }
    end_phase(&w, PHI_PHASE_NORM);
    project_logits(&w, x, c->n_rows, c->logits);
}

phi_status phi_lm_head(const phi_model *model, phi_kv *kv, int n_rows, const float *hidden_states, float *logits) {
    lm_head_call c = {.f = {.model = model}, .n_rows = n_rows, .hidden_states = hidden_states, .logits = logits};
    arena a = {NULL, 0};
    allot_ranges(&c.f, &a);
    allot_activations(&a, model->kernels, (size_t)n_rows, model->n_embd, false);
    a.memory = phi_kv_scratch(kv, a.used);
    if (!a.memory) return PHI_OUT_OF_MEMORY;
    a.used = 0;
    allot_ranges(&c.f, &a);
    phi_activations x = allot_activations(&a, model->kernels, (size_t)n_rows, model->n_embd, false);
    c.f.normed = &x;
    return phi_pool_run(model->pool, run_lm_head, &c);
}
