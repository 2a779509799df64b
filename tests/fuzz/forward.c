/* Fuzzes the forward pass. A model of arbitrary sizes and bytes, infinite and NaN weights, norms and biases included,
 * runs a sequence twice on one tier: token by token on one thread, and in one batch on one or two threads.
 *
 * Checked: both have the same logits, bit for bit, up to max_exact_batch tokens.
 *
 * The sizes are those that config.py accepts: n_kv_heads divides n_heads, head_dim and rope_dims are even, and rows are
 * whole blocks of their type. RoPE frequencies are finite. */
#include <stdlib.h>
#include <string.h>

#include "input.h"

enum { MAX_LAYERS = 2, MAX_EXPERTS = 4, MAX_TOKENS = 40, N_PAGES = 2, MAX_BUFFERS = 256 };

typedef struct {
    phi_model model;
    phi_layer layers[MAX_LAYERS];
    phi_feed_forward ffn[MAX_LAYERS][MAX_EXPERTS];
    void *owned[MAX_BUFFERS];
    int n_owned;
    input *in;
    size_t first; /* offset in the input of the bytes that fill the weights */
    bool packed;  /* pack the matrices that the tier can pack */
    bool biases;
} any_model;

static void *own(any_model *m, size_t n_bytes) {
    CHECK(m->n_owned < MAX_BUFFERS, "the model has more than %d buffers", MAX_BUFFERS);
    return m->owned[m->n_owned++] = memory(n_bytes);
}

static float *any_floats(any_model *m, int n) {
    float *x = own(m, (size_t)n * sizeof *x);
    fill(m->in, m->first, (size_t)n * sizeof *x, x);
    return x;
}

static phi_norm any_norm(any_model *m) {
    return (phi_norm){.weight = any_floats(m, m->model.n_embd),
                      .bias = m->model.norm_kind == PHI_LAYER_NORM ? any_floats(m, m->model.n_embd) : NULL};
}

static phi_matrix any_matrix(any_model *m, phi_type type, int n_rows, int n_cols, int row_unit, bool has_bias) {
    if (n_cols % phi_types[type].block_elements != 0) type = (phi_type)(type % 3); /* F32, F16 or BF16 */
    const size_t n_bytes = (size_t)n_rows * phi_row_bytes(type, (size_t)n_cols);
    uint8_t *data = own(m, n_bytes);
    fill(m->in, m->first, n_bytes, data);
    phi_matrix matrix = {.type = type, .n_rows = n_rows, .n_cols = n_cols, .data = data, .row_unit = row_unit};
    if (has_bias) matrix.bias = any_floats(m, n_rows);
    return matrix;
}

static phi_matrix any_packed(any_model *m, phi_type type, int n_rows, int n_cols, int row_unit, bool has_bias) {
    phi_matrix matrix = any_matrix(m, type, n_rows, n_cols, row_unit, has_bias);
    const size_t n_bytes = m->packed ? phi_packed_bytes(m->model.kernels, &matrix) : 0;
    if (n_bytes == 0) return matrix;
    phi_matrix *const matrices[] = {&matrix};
    const phi_packing packing = {.kernels = m->model.kernels,
                                 .pool = m->model.pool,
                                 .matrices = matrices,
                                 .n_matrices = 1,
                                 .memory = own(m, n_bytes)};
    CHECK(phi_pack(&packing) == PHI_OK, "packing failed");
    return matrix;
}

/* A number of columns: any, or a multiple of a quantised type's block. */
static int pick_width(input *in) {
    const int unit = (const int[]){1, 2, 32, 256}[pick(in, 0, 3)];
    return unit * pick(in, 1, unit == 256 ? 1 : unit == 32 ? 5 : 40);
}

static void make_layer(any_model *m, int l, const phi_type types[8]) {
    const phi_model *model = &m->model;
    const int n_embd = model->n_embd, n_ffn = model->n_ffn, head_dim = model->head_dim;
    const int q_dim = model->n_heads * head_dim, kv_dim = model->n_kv_heads * head_dim;
    const bool biases = m->biases, gelu = model->ffn_activation == PHI_FFN_GELU;
    phi_layer *layer = &m->layers[l];
    layer->attn_norm = any_norm(m);
    layer->wq = any_packed(m, types[0], q_dim, n_embd, head_dim, biases);
    layer->wk = any_packed(m, types[1], kv_dim, n_embd, head_dim, biases);
    layer->wv = any_packed(m, types[2], kv_dim, n_embd, head_dim, biases);
    layer->wo = any_packed(m, types[3], n_embd, q_dim, 0, biases);
    if (!model->parallel) layer->ffn_norm = any_norm(m);
    if (model->n_experts) layer->router = any_matrix(m, types[7], model->n_experts, n_embd, 0, false);
    layer->ffn = m->ffn[l];
    for (int e = 0; e < (model->n_experts ? model->n_experts : 1); e++) {
        phi_feed_forward *ffn = &m->ffn[l][e];
        if (!gelu) ffn->gate = any_packed(m, types[4], n_ffn, n_embd, 0, false);
        ffn->up = any_packed(m, types[5], n_ffn, n_embd, 0, gelu);
        ffn->down = any_packed(m, types[6], n_embd, n_ffn, 0, gelu);
    }
}

static void make_sizes(input *in, phi_model *model) {
    const int kind = pick(in, 0, 2); /* 0: SwiGLU, 1: GELU, 2: experts */
    model->n_layers = pick(in, 1, MAX_LAYERS);
    model->n_embd = pick_width(in);
    model->n_ffn = pick_width(in);
    model->n_kv_heads = pick(in, 1, 2);
    model->n_heads = model->n_kv_heads * pick(in, 1, 5);
    model->head_dim = pick(in, 0, 1) ? 16 * pick(in, 1, 6) : 2 * pick(in, 1, 35);
    model->rope_dims = 2 * pick(in, 1, model->head_dim / 2);
    model->n_vocab = pick(in, 1, 50);
    model->rope_style = pick(in, 0, 1) ? PHI_ROPE_INTERLEAVED : PHI_ROPE_NEOX;
    model->norm_kind = pick(in, 0, 1) ? PHI_LAYER_NORM : PHI_RMS_NORM;
    model->parallel = pick(in, 0, 1);
    model->ffn_activation = kind == 1 ? PHI_FFN_GELU : PHI_FFN_SWIGLU;
    model->n_experts = kind == 2 ? pick(in, PHI_EXPERTS_USED, MAX_EXPERTS) : 0;
    model->window = pick(in, 0, 50);
    model->norm_eps = 1e-5f;
    model->rope_attn_factor = 1.0f;
}

static any_model *make_model(input *in, const phi_kernels *k, phi_pool *pool) {
    any_model *m = memory(sizeof *m);
    *m = (any_model){.in = in};
    phi_model *model = &m->model;
    phi_type types[10];
    make_sizes(in, model);
    model->kernels = k;
    model->pool = pool;
    model->tuning = phi_default_tuning();
    m->packed = pick(in, 0, 1);
    m->biases = pick(in, 0, 1);
    for (int i = 0; i < 10; i++) types[i] = (phi_type)pick(in, 0, PHI_N_TYPES - 1);
    m->first = in->at;
    float *inv_freq = own(m, (size_t)model->rope_dims / 2 * sizeof *inv_freq);
    for (int i = 0; i < model->rope_dims / 2; i++) inv_freq[i] = 1.0f / (1.0f + (float)(i * i));
    model->rope_inv_freq = model->rope_inv_freq_long = inv_freq;
    model->token_embd = any_matrix(m, types[8], model->n_vocab, model->n_embd, 0, false);
    model->output_norm = any_norm(m);
    model->output = any_packed(m, types[9], model->n_vocab, model->n_embd, 0, m->biases);
    for (int l = 0; l < model->n_layers; l++) make_layer(m, l, types);
    model->layers = m->layers;
    return m;
}

static void free_model(any_model *m) {
    for (int i = 0; i < m->n_owned; i++) free(m->owned[i]);
    free(m);
}

static double *sums(any_model *m, int n) {
    double *x = own(m, (size_t)n * sizeof *x);
    for (int i = 0; i < n; i++) x[i] = 0.0;
    return x;
}

static phi_observer make_observer(any_model *m) {
    const phi_model *model = &m->model;
    const int n_layers = model->n_layers, n_experts = n_layers * model->n_experts;
    phi_observer observer = {.attn_in = sums(m, n_layers * model->n_embd),
                             .attn_out = sums(m, n_layers * model->n_heads * model->head_dim),
                             .ffn_in = sums(m, n_layers * model->n_embd),
                             .ffn_inner = sums(m, n_layers * model->n_ffn),
                             .expert_in = sums(m, n_experts * model->n_embd),
                             .expert_inner = sums(m, n_experts * model->n_ffn),
                             .expert_tokens = own(m, (size_t)n_experts * sizeof(int64_t)),
                             .output = sums(m, model->n_embd)};
    for (int i = 0; i < n_experts; i++) observer.expert_tokens[i] = 0;
    return observer;
}

/* Logits [n_tokens, n_vocab] of a sequence, computed in chunks of `chunk` tokens. */
static void run(const phi_model *model, phi_kv_type type, int n_tokens, int chunk, const phi_observer *observer,
                float *logits) {
    phi_kv *kv;
    CHECK(phi_kv_create(model, type, N_PAGES, &kv) == PHI_OK, "phi_kv_create failed");
    const int32_t pages[N_PAGES] = {1, 0}, seq_ids[MAX_TOKENS] = {0};
    const phi_sequence sequence = {.pages = pages};
    int32_t tokens[MAX_TOKENS], positions[MAX_TOKENS], rows[MAX_TOKENS];
    for (int i = 0; i < n_tokens; i++) {
        tokens[i] = i * 31 % model->n_vocab;
        positions[i] = i;
        rows[i] = i;
    }
    for (int first = 0; first < n_tokens; first += chunk) {
        const int n = n_tokens - first < chunk ? n_tokens - first : chunk;
        const phi_batch batch = {
            .n_tokens = n,
            .tokens = tokens + first,
            .positions = positions + first,
            .seq_ids = seq_ids,
            .sequences = &sequence,
            .n_logit_rows = n,
            .logit_rows = rows,
            .logits = logits + (size_t)first * (size_t)model->n_vocab,
            .observer = observer,
        };
        CHECK(phi_forward(model, kv, &batch) == PHI_OK, "%s: phi_forward failed", model->kernels->name);
    }
    phi_kv_free(kv);
}

static const phi_kernels *pick_tier(input *in) {
    const phi_kernels *tables[16];
    int n = 0;
    for (const char *const *tier = phi_tier_names(); *tier; tier++) {
        if (phi_select_kernels(*tier, &tables[n]) == PHI_OK) n++;
    }
    return tables[pick(in, 0, n - 1)];
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes) {
    static phi_pool *pools[2];
    for (int i = 0; i < 2; i++) {
        if (!pools[i]) CHECK(phi_pool_create(i + 1, &pools[i]) == PHI_OK, "phi_pool_create failed");
    }
    input in = {bytes, n_bytes, 0};
    const phi_kernels *k = pick_tier(&in);
    const phi_kv_type type = (phi_kv_type)pick(&in, 0, PHI_N_KV_TYPES - 1);
    const int n_tokens = pick(&in, 1, MAX_TOKENS), n_threads = pick(&in, 1, 2);
    any_model *m = make_model(&in, k, pools[0]);
    const size_t n_logits = (size_t)n_tokens * (size_t)m->model.n_vocab;
    float *alone = floats(n_logits), *together = floats(n_logits);
    const phi_observer observer = make_observer(m);
    run(&m->model, type, n_tokens, 1, &observer, alone);
    m->model.pool = pools[n_threads - 1];
    run(&m->model, type, n_tokens, n_tokens, NULL, together);
    if (!k->max_exact_batch || n_tokens <= k->max_exact_batch) {
        const size_t at = first_difference(alone, together, n_logits), n_vocab = (size_t)m->model.n_vocab;
        CHECK(at == n_logits, "%s: logit %zu of token %zu is %.9g in a batch of %d tokens, %.9g alone", k->name,
              at % n_vocab, at / n_vocab, (double)together[at], n_tokens, (double)alone[at]);
    }
    free(alone);
    free(together);
    free_model(m);
    return 0;
}
