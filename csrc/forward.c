/* One forward pass of a batch: every thread of the pool walks through the same phases, takes tasks from a shared
 * counter within each, and waits for the others before the next.
 *
 * A layer:   norm, and q, k, v by head, rotated, keys and values stored | attention by token and head | output
 *            projection | norm, and gate, up and their product | down projection
 * Few tokens are normed by every thread for itself, which takes less time than to meet; many by all together.
 * Where products take tiled activations, inputs of the output and the down projection become such in phases before. */
#include "phi.h"

#include <math.h>
#include <string.h>

#include "pass.h"

enum {
    FEW_TOKENS = 4, /* normed by every thread for itself */
    SHORT_RUN = 8,  /* tokens of a run where longer ones would be too few for all threads */
};

/* ---- phases ---- */

/* What a product is fed, summed as a phase; for every thread once x is whole. */
static void observe(worker *w, const phi_activations *x, double *sums) {
    FOR_EACH_TASK(w, task, n_chunks(x->n_cols, CHUNK_ROWS)) {
        observe_columns(x, 0, w->f->batch->n_tokens, task, sums);
    }
    end_phase(w);
}

static void embed(worker *w) {
    const forward *f = w->f;
    const phi_model *model = f->model;
    const phi_matrix *embd = &model->token_embd;
    const size_t n_embd = (size_t)model->n_embd, n_freqs = (size_t)model->rope_dims / 2;
    const size_t row_bytes = phi_row_bytes(embd->type, n_embd);
    FOR_EACH_TASK(w, t, f->batch->n_tokens) {
        const size_t token = (size_t)f->batch->tokens[t];
        const uint8_t *row = (const uint8_t *)embd->data + token * row_bytes;
        model->kernels->dequantize[embd->type](row, n_embd, f->residual + (size_t)t * n_embd);

        const bool long_rope = f->batch->seqs[f->batch->sequences[t]].long_rope;
        const float *inv_freq = long_rope ? model->rope_inv_freq_long : model->rope_inv_freq;
        for (size_t i = 0; i < n_freqs; i++) {
            const float angle = (float)f->batch->positions[t] * inv_freq[i]; /* float32, as transformers */
            f->cos[(size_t)t * n_freqs + i] = (float)cos((double)angle) * model->rope_attn_factor;
            f->sin[(size_t)t * n_freqs + i] = (float)sin((double)angle) * model->rope_attn_factor;
        }
    }
    end_phase(w);
}

static void norm_row(const forward *f, int residual_row, const phi_norm *norm, const phi_activations *normed, int row) {
    const phi_model *model = f->model;
    const size_t n_embd = (size_t)model->n_embd;
    const float *x = f->residual + (size_t)residual_row * n_embd;
    float *y = normed->f32 + (size_t)row * n_embd;
    if (model->norm_kind == PHI_LAYER_NORM) {
        model->kernels->layer_norm(x, norm->weight, norm->bias, n_embd, model->norm_eps, y);
    } else {
        model->kernels->rms_norm(x, norm->weight, n_embd, model->norm_eps, y);
    }
    /* Rows whose logits are wanted may be few. */
    if (!f->all_tiled || norm == &model->output_norm) quantize(model->kernels, normed, row, 0, n_embd);
    quantize_tiled(model->kernels, normed, row);
}

/* Norms n_rows rows of the residual: row i is rows[i], or i where rows is NULL. Returns where the thread finds them. */
static const phi_activations *norm(worker *w, const phi_norm *by, int n_rows, const int32_t *rows) {
    const forward *f = w->f;
    const phi_activations *normed = &f->normed[f->n_norms == 1 ? 0 : w->thread];
    if (f->n_norms > 1) {
        for (int i = 0; i < n_rows; i++) norm_row(f, rows ? rows[i] : i, by, normed, i);
    } else {
        FOR_EACH_TASK(w, i, n_rows) norm_row(f, rows ? rows[i] : i, by, normed, i);
        end_phase(w);
    }
    return normed;
}

static void rotate(const forward *f, float *heads, size_t stride) {
    const phi_model *model = f->model;
    const size_t n_freqs = (size_t)model->rope_dims / 2;
    for (int t = 0; t < f->batch->n_tokens; t++) {
        model->kernels->rope[model->rope_style](heads + (size_t)t * stride, model->rope_dims,
                                                f->cos + (size_t)t * n_freqs, f->sin + (size_t)t * n_freqs);
    }
}

/* k, v: a head's, stride floats from a token to the next. */
static void store(const forward *f, int layer, int kv_head, const float *k, const float *v, size_t stride) {
    const phi_model *model = f->model;
    const phi_kv_type type = phi_kv_type_of(f->kv);
    const size_t page_bytes = phi_kv_page_bytes(model, type);
    uint8_t *head = phi_kv_head(model, f->kv, layer, kv_head);
    for (int t = 0; t < f->batch->n_tokens; t++) {
        const int position = f->batch->positions[t];
        const int32_t page = f->batch->seqs[f->batch->sequences[t]].pages[position / PHI_PAGE_TOKENS];
        const size_t at = (size_t)t * stride;
        model->kernels->store_kv[type](k + at, v + at, model->head_dim, position % PHI_PAGE_TOKENS,
                                       head + (size_t)page * page_bytes);
    }
}

/* As many as give a task its rows. */
static int heads_a_task(const forward *f, const phi_activations *normed) {
    int n = max_int(most_rows(normed) / f->model->head_dim, 1);
    while (n > 1 && (f->model->n_kv_heads + f->model->n_heads) / n < 8 * phi_pool_size(f->model->pool)) n /= 2;
    return n;
}

static void project_heads(worker *w, int layer, const phi_activations *normed) {
    const forward *f = w->f;
    const phi_model *model = f->model;
    const phi_layer *l = &model->layers[layer];
    const int head_dim = model->head_dim, n_tokens = f->batch->n_tokens, most = heads_a_task(f, normed);
    const size_t q_dim = (size_t)model->n_heads * (size_t)head_dim, stride = (size_t)(most * head_dim);
    const int n_kv_tasks = n_chunks(model->n_kv_heads, most);
    float *heads = f->scratch + (size_t)w->thread * f->scratch_floats, *values = heads + (size_t)n_tokens * stride;
    FOR_EACH_TASK(w, task, n_kv_tasks + n_chunks(model->n_heads, most)) {
        const bool is_kv = task < n_kv_tasks;
        const int first = (is_kv ? task : task - n_kv_tasks) * most;
        const int n = min_int(most, (is_kv ? model->n_kv_heads : model->n_heads) - first);
        multiply(f, is_kv ? &l->wk : &l->wq, first * head_dim, n * head_dim, normed, n_tokens, heads, stride);
        if (is_kv) multiply(f, &l->wv, first * head_dim, n * head_dim, normed, n_tokens, values, stride);
        for (int i = 0; i < n; i++) {
            const size_t at = (size_t)(i * head_dim);
            rotate(f, heads + at, stride);
            if (is_kv) store(f, layer, first + i, heads + at, values + at, stride);
        }
        /* Products of many tokens would write rows so far apart into few sets of the caches. */
        float *q = f->q + (size_t)(first * head_dim);
        for (int t = 0; !is_kv && t < n_tokens; t++)
            memcpy(q + (size_t)t * q_dim, heads + (size_t)t * stride, (size_t)(n * head_dim) * sizeof *q);
    }
    end_phase(w);
}

static void attend(worker *w, int layer) {
    const forward *f = w->f;
    const phi_model *model = f->model;
    const int n_queries = model->n_heads / model->n_kv_heads;
    const phi_kv_type type = phi_kv_type_of(f->kv);
    const size_t q_dim = (size_t)model->n_heads * (size_t)model->head_dim;
    const size_t group_dim = (size_t)n_queries * (size_t)model->head_dim;
    const bool whole_blocks = group_dim % PHI_Q8_BLOCK == 0; /* of the row, for each task */
    FOR_EACH_TASK(w, task, f->n_runs * model->n_kv_heads) {
        /* Runs of a prompt find in cache what the one before them read. The last one sees the most: it goes first. */
        const token_run *run = &f->runs[f->n_runs - 1 - task % f->n_runs];
        const int kv_head = task / f->n_runs;
        const size_t first_col = (size_t)kv_head * group_dim, at = (size_t)run->first * q_dim + first_col;
        const phi_attention a = {
            .q = f->q + at,
            .n_tokens = run->n_tokens,
            .n_queries = n_queries,
            .head_dim = model->head_dim,
            .token_stride = q_dim,
            .pages = phi_kv_head(model, f->kv, layer, kv_head),
            .page_bytes = phi_kv_page_bytes(model, type),
            .page_table = f->batch->seqs[f->batch->sequences[run->first]].pages,
            .last = f->batch->positions[run->first],
            .window = model->window,
            .scale = 1.0f / sqrtf((float)model->head_dim),
            .scratch = f->scratch + (size_t)w->thread * f->scratch_floats,
            .out = f->attended.f32 + at,
        };
        model->kernels->attention[type](&a);
        for (int t = run->first; whole_blocks && t < run->first + run->n_tokens; t++)
            quantize(model->kernels, &f->attended, t, first_col, group_dim);
    }
    end_phase(w);
    quantize_all_tiled(w, &f->attended, f->batch->n_tokens);
    if (whole_blocks) return;
    FOR_EACH_TASK(w, t, f->batch->n_tokens) quantize(model->kernels, &f->attended, t, 0, q_dim);
    end_phase(w);
}

/* residual += x @ matrix.T */
static void project_back(worker *w, const phi_matrix *matrix, const phi_activations *x) {
    const forward *f = w->f;
    const size_t n_embd = (size_t)f->model->n_embd;
    float *out = f->scratch + (size_t)w->thread * f->scratch_floats;
    const int most = most_rows(x), chunk = chunk_rows(f, matrix->n_rows, most);
    FOR_EACH_TASK(w, task, n_chunks(matrix->n_rows, chunk)) {
        const int first = task * chunk, n_rows = min_int(chunk, matrix->n_rows - first);
        multiply(f, matrix, first, n_rows, x, f->batch->n_tokens, out, (size_t)most);
        for (int t = 0; t < f->batch->n_tokens; t++) {
            f->model->kernels->add(out + (size_t)t * (size_t)most, (size_t)n_rows,
                                   f->residual + (size_t)t * n_embd + (size_t)first);
        }
    }
    end_phase(w);
}

/* inner = silu(gate) * up, or gelu(up) */
static void project_inner(worker *w, const phi_feed_forward *ffn, const phi_activations *normed) {
    const forward *f = w->f;
    const phi_kernels *kernels = f->model->kernels;
    const int n_tokens = f->batch->n_tokens, n_ffn = f->model->n_ffn;
    float *gates = f->scratch + (size_t)w->thread * f->scratch_floats;
    const int most = most_rows(normed), chunk = chunk_rows(f, n_ffn, most);
    float *ups = gates + (size_t)n_tokens * (size_t)most;
    FOR_EACH_TASK(w, task, n_chunks(n_ffn, chunk)) {
        const int first = task * chunk, n_rows = min_int(chunk, n_ffn - first);
        const bool gated = f->model->activation == PHI_FFN_SWIGLU;
        if (gated) multiply(f, &ffn->gate, first, n_rows, normed, n_tokens, gates, (size_t)most);
        multiply(f, &ffn->up, first, n_rows, normed, n_tokens, ups, (size_t)most);
        for (int t = 0; t < n_tokens; t++) {
            const size_t at = (size_t)t * (size_t)most;
            float *y = f->inner.f32 + (size_t)t * (size_t)n_ffn + (size_t)first;
            if (gated) {
                kernels->silu_mul(gates + at, ups + at, (size_t)n_rows, y);
            } else {
                kernels->gelu(ups + at, (size_t)n_rows, y);
            }
            quantize(kernels, &f->inner, t, (size_t)first, (size_t)n_rows);
        }
    }
    end_phase(w);
    quantize_all_tiled(w, &f->inner, n_tokens);
}

static void feed_forward(worker *w, int layer, const phi_activations *normed) {
    const forward *f = w->f;
    const phi_model *model = f->model;
    const phi_layer *l = &model->layers[layer];
    const phi_observer *seen = f->batch->observer;
    if (seen) observe(w, normed, seen->ffn_in + (size_t)layer * (size_t)model->n_embd);
    if (model->n_experts) {
        phi_route(w, layer, normed);
        phi_run_experts(w, layer, normed);
        if (seen) phi_observe_experts(w, layer);
        return;
    }
    project_inner(w, l->ffn, normed);
    if (seen) observe(w, &f->inner, seen->ffn_inner + (size_t)layer * (size_t)model->n_ffn);
    project_back(w, &l->ffn->down, &f->inner);
}

/* logits [n_rows, n_vocab] = normed @ output.T */
static void project_head(worker *w, const phi_activations *normed, int n_rows, float *logits) {
    const forward *f = w->f;
    const phi_model *model = f->model;
    const int chunk = chunk_rows(f, model->n_vocab, most_rows(normed));
    FOR_EACH_TASK(w, task, n_chunks(model->n_vocab, chunk)) {
        const int first = task * chunk, n = min_int(chunk, model->n_vocab - first);
        multiply(f, &model->output, first, n, normed, n_rows, logits + first, (size_t)model->n_vocab);
    }
}

static void write_rows(worker *w) {
    const phi_batch *batch = w->f->batch;
    const phi_model *model = w->f->model;
    if (batch->n_logit_rows == 0) return;
    const phi_activations *normed = norm(w, &model->output_norm, batch->n_logit_rows, batch->logit_rows);
    if (w->thread == 0 && batch->hidden_states)
        memcpy(batch->hidden_states, normed->f32, (size_t)batch->n_logit_rows * (size_t)model->n_embd * sizeof(float));
    if (batch->logits) project_head(w, normed, batch->n_logit_rows, batch->logits);
}

static void run_layer(worker *w, int layer) {
    forward *f = w->f;
    const phi_batch *batch = f->batch;
    const phi_model *model = f->model;
    const phi_layer *l = &model->layers[layer];
    const phi_observer *seen = batch->observer;
    const phi_activations *normed = norm(w, &l->attn_norm, batch->n_tokens, NULL);
    if (seen) observe(w, normed, seen->attn_in + (size_t)layer * (size_t)model->n_embd);
    project_heads(w, layer, normed);
    attend(w, layer);
    if (seen) observe(w, &f->attended, seen->attn_out + (size_t)layer * (size_t)f->attended.n_cols);
    project_back(w, &l->wo, &f->attended);
    if (!model->parallel) normed = norm(w, &l->ffn_norm, batch->n_tokens, NULL);
    if (w->thread == 0 && batch->poll && batch->poll(batch->poll_context)) atomic_store(&f->stop, true);
    feed_forward(w, layer, normed);
}

static void run(void *context, int thread) {
    forward *f = context;
    const phi_model *model = f->model;
    const phi_batch *batch = f->batch;
    worker w = {.f = f, .thread = thread};
    embed(&w);
    for (int layer = 0; layer < model->n_layers; layer++) {
        run_layer(&w, layer);
        /* Barriers lie between the write and this, and between this and the next write: all threads leave together. */
        if (atomic_load(&f->stop)) return;
    }
    const phi_observer *seen = batch->observer;
    if (seen && seen->output) observe(&w, norm(&w, &model->output_norm, batch->n_tokens, NULL), seen->output);
    write_rows(&w);
}

/* ---- scratch memory ---- */

typedef struct {
    uint8_t *memory; /* NULL: only count */
    size_t used;     /* bytes */
} arena;

static void *allot(arena *a, size_t n_bytes) {
    void *p = a->memory ? a->memory + a->used : NULL;
    a->used += round_up(n_bytes, PHI_ALIGN_BYTES);
    return p;
}

static phi_activations allot_narrow(arena *a, size_t n_tokens, int n_cols) {
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

static bool takes_tiled(const phi_kernels *k, size_t n_tokens) {
    return k->quantize_tiled && n_tokens > (size_t)k->max_exact_batch;
}

static bool all_take_tiled(const phi_model *model, size_t n_tokens) {
    const phi_kernels *k = model->kernels;
    if (!takes_tiled(k, n_tokens) || model->n_experts) return false;
    for (int i = 0; i < model->n_layers; i++) {
        const phi_layer *l = &model->layers[i];
        const bool gated = model->activation == PHI_FFN_SWIGLU;
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

/* With wide ones, where products of so many tokens take them; floats alone beside these where only_tiled. */
static phi_activations allot_activations(arena *a, const phi_kernels *k, size_t n_tokens, int n_cols, bool only_tiled) {
    phi_activations x = {.n_cols = n_cols};
    if (only_tiled)
        x.f32 = allot(a, n_tokens * (size_t)n_cols * sizeof(float));
    else
        x = allot_narrow(a, n_tokens, n_cols);
    if (takes_tiled(k, n_tokens) && n_cols % PHI_TILED_BLOCK == 0) {
        x.tiled = (phi_tiled){
            .tiles = allot(a, phi_tiled_bytes(n_tokens, (size_t)n_cols)),
            .scales = allot(a, phi_tiled_n_scales(n_tokens, (size_t)n_cols) * sizeof(float)),
            .n_tokens = phi_tiled_tokens(n_tokens),
        };
    }
    return x;
}

static void lay_out_experts(forward *f, arena *a, size_t n_tokens) {
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
        .in = allot_narrow(a, n_chosen, model->n_embd),
        .inner = allot_narrow(a, n_chosen, model->n_ffn),
    };
}

/* Lays the buffers of a pass into an arena; called once to count and once to place. */
static void lay_out(forward *f, arena *a) {
    const phi_model *model = f->model;
    const phi_batch *batch = f->batch;
    /* The final norm reuses the activations of the batch for its logit rows, which may repeat a token. */
    const size_t n_tokens = (size_t)max_int(batch->n_tokens, batch->n_logit_rows);
    const int n_threads = phi_pool_size(model->pool);
    const int q_dim = model->n_heads * model->head_dim;

    const size_t attention = phi_attention_scratch_floats(model->head_dim);
    const int most = takes_tiled(model->kernels, n_tokens) ? PHI_TILED_TASK_ROWS : CHUNK_ROWS;
    const size_t products = 2 * n_tokens * (size_t)max_int(most, model->head_dim);
    f->scratch_floats = round_up(attention > products ? attention : products, PHI_ALIGN_BYTES / sizeof(float));

    f->residual = allot(a, n_tokens * (size_t)model->n_embd * sizeof(float));
    f->q = allot(a, n_tokens * (size_t)q_dim * sizeof(float));
    f->cos = allot(a, n_tokens * (size_t)model->rope_dims / 2 * sizeof(float));
    f->sin = allot(a, n_tokens * (size_t)model->rope_dims / 2 * sizeof(float));
    f->n_norms = n_tokens <= FEW_TOKENS ? n_threads : 1;
    f->normed = allot(a, (size_t)f->n_norms * sizeof *f->normed);
    for (int i = 0; i < f->n_norms; i++) {
        const phi_activations normed = allot_activations(a, model->kernels, n_tokens, model->n_embd, false);
        if (a->memory) f->normed[i] = normed;
    }
    f->attended = allot_activations(a, model->kernels, n_tokens, q_dim, f->all_tiled);
    if (model->n_experts) {
        lay_out_experts(f, a, n_tokens);
    } else {
        f->inner = allot_activations(a, model->kernels, n_tokens, model->n_ffn, f->all_tiled);
    }
    f->runs = allot(a, n_tokens * sizeof *f->runs);
    f->scratch = allot(a, (size_t)n_threads * f->scratch_floats * sizeof(float));
}

static void find_runs(forward *f) {
    const phi_batch *b = f->batch;
    const int n_tasks = b->n_tokens / PHI_ATTENTION_ROWS * f->model->n_kv_heads;
    const int longest = n_tasks >= 4 * phi_pool_size(f->model->pool) ? PHI_ATTENTION_ROWS : SHORT_RUN;
    for (int t = 0; t < b->n_tokens; t++) {
        token_run *run = f->n_runs ? &f->runs[f->n_runs - 1] : NULL;
        if (run && run->n_tokens < longest && b->sequences[t] == b->sequences[run->first] &&
            b->positions[t] == b->positions[run->first] + run->n_tokens) {
            run->n_tokens++;
        } else {
            f->runs[f->n_runs++] = (token_run){t, 1};
        }
    }
}

phi_status phi_forward(const phi_model *model, phi_kv *kv, const phi_batch *batch) {
    const bool all_tiled = all_take_tiled(model, (size_t)batch->n_tokens);
    forward f = {.model = model, .kv = kv, .batch = batch, .all_tiled = all_tiled};
    arena a = {NULL, 0};
    lay_out(&f, &a);
    a.memory = phi_kv_scratch(kv, a.used);
    if (!a.memory) return PHI_OUT_OF_MEMORY;
    a.used = 0;
    lay_out(&f, &a);
    find_runs(&f);
    const phi_status status = phi_pool_run(model->pool, run, &f);
    if (status != PHI_OK) return status;
    return atomic_load(&f.stop) ? PHI_CANCELLED : PHI_OK;
}

/* ---- the head alone ---- */

typedef struct {
    forward f; /* model and activations only */
    int n_rows;
    const float *rows;
    float *logits;
} head;

static void run_head(void *context, int thread) {
    head *h = context;
    const size_t n_embd = (size_t)h->f.model->n_embd;
    worker w = {.f = &h->f, .thread = thread};
    const phi_activations *x = h->f.normed;
    FOR_EACH_TASK(&w, i, h->n_rows) {
        memcpy(x->f32 + (size_t)i * n_embd, h->rows + (size_t)i * n_embd, n_embd * sizeof(float));
        quantize(h->f.model->kernels, x, i, 0, n_embd);
        quantize_tiled(h->f.model->kernels, x, i);
    }
    end_phase(&w);
    project_head(&w, x, h->n_rows, h->logits);
}

phi_status phi_lm_head(const phi_model *model, phi_kv *kv, int n_rows, const float *rows, float *logits) {
    head h = {.f = {.model = model}, .n_rows = n_rows, .rows = rows, .logits = logits};
    arena a = {NULL, 0};
    allot_activations(&a, model->kernels, (size_t)n_rows, model->n_embd, false);
    a.memory = phi_kv_scratch(kv, a.used);
    if (!a.memory) return PHI_OUT_OF_MEMORY;
    a.used = 0;
    phi_activations x = allot_activations(&a, model->kernels, (size_t)n_rows, model->n_embd, false);
    h.f.normed = &x;
    return phi_pool_run(model->pool, run_head, &h);
}
