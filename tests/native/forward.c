/* Forward passes of a tiny model with random weights: a token's logits have the same bits in any batch, with any number
 * of threads and any tuning, and those of every tier are close to the scalar tier's. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "weights.h"

enum {
    N_LAYERS = 2,
    N_EMBD = 256,
    N_FFN = 512,
    N_HEADS = 4,
    N_KV_HEADS = 2,
    HEAD_DIM = 64,
    ROPE_DIMS = 48,
    N_VOCAB = 100, /* not a multiple of PHI_PANEL_ROWS: the output matrix is not packed */
    N_TOKENS = 45,
    WINDOW = 37,
    NAN_TOKEN = 5, /* the token whose embedding check_nan makes NaN */
    N_PAGES = 2 * ((N_TOKENS + PHI_PAGE_TOKENS - 1) / PHI_PAGE_TOKENS),
    N_MATRICES = 7 * N_LAYERS + 2,
};

typedef struct {
    phi_model model;
    phi_layer layers[N_LAYERS];
    phi_feed_forward ffn[N_LAYERS];
    float norm[N_EMBD], inv_freq[ROPE_DIMS / 2];
    uint16_t *embeddings; /* [N_VOCAB, N_EMBD], half precision */
    void *owned[2 * N_MATRICES];
    int n_owned;
} tiny;

static void *own(tiny *m, void *p) { return m->owned[m->n_owned++] = p; }

static phi_matrix random_matrix(tiny *m, generator *g, phi_type type, int n_rows, int n_cols) {
    const size_t n_bytes = (size_t)n_rows * phi_row_bytes(type, (size_t)n_cols);
    uint8_t *data = own(m, memory(n_bytes));
    fill_rows(g, type, WEIGHTS_TRAINED, (size_t)n_rows, (size_t)n_cols, data);
    return (phi_matrix){.type = type, .n_rows = n_rows, .n_cols = n_cols, .data = data};
}

static void pack(tiny *m, phi_matrix *matrix) {
    const size_t n_bytes = phi_packed_bytes(m->model.kernels, matrix);
    if (n_bytes == 0) return;
    const phi_packing packing = {.kernels = m->model.kernels,
                                 .pool = m->model.pool,
                                 .matrices = &matrix,
                                 .n_matrices = 1,
                                 .memory = own(m, memory(n_bytes))};
    CHECK(phi_pack(&packing) == PHI_OK, "packing failed");
    CHECK(matrix->layout == PHI_LAYOUT_PANELS, "a packed matrix has layout %d", (int)matrix->layout);
}

/* The weights are the same for every tier. */
static tiny *make_tiny(const phi_kernels *k, phi_pool *pool, phi_rope_style style, bool packed) {
    generator g = {7};
    tiny *m = memory(sizeof *m);
    *m = (tiny){.n_owned = 0};
    for (int i = 0; i < N_EMBD; i++) m->norm[i] = 0.5f + next_uniform(&g);
    for (int i = 0; i < ROPE_DIMS / 2; i++) m->inv_freq[i] = 1.0f / (1.0f + (float)(i * i));
    for (int l = 0; l < N_LAYERS; l++) {
        m->layers[l] = (phi_layer){
            .attn_norm = {.weight = m->norm},
            .wq = random_matrix(m, &g, PHI_TYPE_Q5_K, N_HEADS * HEAD_DIM, N_EMBD),
            .wk = random_matrix(m, &g, PHI_TYPE_Q8_0, N_KV_HEADS * HEAD_DIM, N_EMBD),
            .wv = random_matrix(m, &g, PHI_TYPE_Q4_1, N_KV_HEADS * HEAD_DIM, N_EMBD),
            .wo = random_matrix(m, &g, PHI_TYPE_Q4_K, N_EMBD, N_HEADS * HEAD_DIM),
            .ffn_norm = {.weight = m->norm},
            .ffn = &m->ffn[l],
        };
        m->ffn[l] = (phi_feed_forward){
            .gate = random_matrix(m, &g, PHI_TYPE_Q4_K, N_FFN, N_EMBD),
            .up = random_matrix(m, &g, PHI_TYPE_Q4_0, N_FFN, N_EMBD),
            .down = random_matrix(m, &g, PHI_TYPE_Q6_K, N_EMBD, N_FFN),
        };
    }
    m->model = (phi_model){
        .n_layers = N_LAYERS,
        .n_embd = N_EMBD,
        .n_ffn = N_FFN,
        .n_heads = N_HEADS,
        .n_kv_heads = N_KV_HEADS,
        .head_dim = HEAD_DIM,
        .n_vocab = N_VOCAB,
        .rope_dims = ROPE_DIMS,
        .rope_style = style,
        .rope_inv_freq = m->inv_freq,
        .rope_inv_freq_long = m->inv_freq,
        .rope_attn_factor = 1.0f,
        .norm_eps = 1e-5f,
        .window = WINDOW,
        .token_embd = random_matrix(m, &g, PHI_TYPE_F16, N_VOCAB, N_EMBD),
        .output_norm = {.weight = m->norm},
        .output = random_matrix(m, &g, PHI_TYPE_Q6_K, N_VOCAB, N_EMBD),
        .layers = m->layers,
        .kernels = k,
        .pool = pool,
        .tuning = phi_default_tuning(),
    };
    m->embeddings = (uint16_t *)(void *)m->model.token_embd.data;
    for (int l = 0; packed && l < N_LAYERS; l++) {
        phi_layer *layer = &m->layers[l];
        phi_feed_forward *ffn = &m->ffn[l];
        phi_matrix *matrices[] = {&layer->wq, &layer->wk, &layer->wv, &layer->wo, &ffn->gate, &ffn->up, &ffn->down};
        for (int i = 0; i < 7; i++) pack(m, matrices[i]);
    }
    if (packed) pack(m, &m->model.output);
    return m;
}

static void free_tiny(tiny *m) {
    for (int i = 0; i < m->n_owned; i++) free(m->owned[i]);
    free(m);
}

static bool always_true(void *context) {
    (void)context;
    return true;
}

/* Logits [N_TOKENS, N_VOCAB] of a sequence, computed in chunks of `chunk` tokens. two_sequences: batches contain the
 * tokens of another sequence too. */
static void run(const tiny *m, phi_kv_type type, int chunk, bool two_sequences, float *logits) {
    phi_kv *kv;
    CHECK(phi_kv_create(&m->model, type, N_PAGES, &kv) == PHI_OK, "phi_kv_create failed");
    const int32_t pages[2][2] = {{3, 0}, {2, 1}};
    const phi_sequence sequences[2] = {{.pages = pages[0]}, {.pages = pages[1]}};
    for (int first = 0; first < N_TOKENS; first += chunk) {
        int32_t tokens[2 * N_TOKENS], positions[2 * N_TOKENS], seq_ids[2 * N_TOKENS], rows[N_TOKENS];
        const int n = N_TOKENS - first < chunk ? N_TOKENS - first : chunk;
        int n_tokens = 0;
        for (int i = 0; i < n; i++) {
            for (int s = two_sequences ? 1 : 0; s >= 0; s--) {
                if (s == 0) rows[i] = n_tokens;
                tokens[n_tokens] = ((first + i) * 31 + 7 * s) % N_VOCAB;
                positions[n_tokens] = first + i;
                seq_ids[n_tokens++] = s;
            }
        }
        const phi_batch batch = {
            .n_tokens = n_tokens,
            .tokens = tokens,
            .positions = positions,
            .seq_ids = seq_ids,
            .sequences = sequences,
            .n_logit_rows = n,
            .logit_rows = rows,
            .logits = logits + first * N_VOCAB,
        };
        CHECK(phi_forward(&m->model, kv, &batch) == PHI_OK, "%s: phi_forward failed", m->model.kernels->name);
    }
    phi_kv_free(kv);
}

static void check_cancel(const tiny *m) {
    phi_kv *kv;
    float logits[N_VOCAB];
    const int32_t zero = 0;
    CHECK(phi_kv_create(&m->model, PHI_KV_F16, 1, &kv) == PHI_OK, "phi_kv_create failed");
    const phi_sequence sequence = {.pages = &zero};
    const phi_batch batch = {.n_tokens = 1,
                             .tokens = &zero,
                             .positions = &zero,
                             .seq_ids = &zero,
                             .sequences = &sequence,
                             .n_logit_rows = 1,
                             .logit_rows = &zero,
                             .logits = logits,
                             .poll = always_true};
    CHECK(phi_forward(&m->model, kv, &batch) == PHI_CANCELLED, "phi_forward was not cancelled");
    phi_kv_free(kv);
}

/* Normalised mean squared error: sum((got - expected)^2) / sum(expected^2). */
static double nmse(const float *got, const float *expected) {
    double error = 0.0, signal = 0.0;
    for (int i = 0; i < N_TOKENS * N_VOCAB; i++) {
        const double difference = (double)got[i] - (double)expected[i];
        error += difference * difference;
        signal += (double)expected[i] * (double)expected[i];
    }
    return error / signal;
}

/* One element of a token's embedding is NaN: all logits from that token on must be NaN, and none before it. */
static void check_nan(const tiny *m, phi_kv_type type, int chunk, bool two_sequences) {
    float *logits = floats(N_TOKENS * N_VOCAB);
    const int row = NAN_TOKEN * 31 % N_VOCAB;
    uint16_t *embedding = m->embeddings + row * N_EMBD;
    embedding[9] = 0x7e00;
    run(m, type, chunk, two_sequences, logits);
    for (int i = 0; i < N_TOKENS * N_VOCAB; i++)
        CHECK(isfinite(logits[i]) == (i / N_VOCAB < NAN_TOKEN), "%s: token %d is NaN, and logit %d of token %d is %g",
              m->model.kernels->name, NAN_TOKEN, i % N_VOCAB, i / N_VOCAB, (double)logits[i]);
    free(logits);
}

/* Settings other than the default in every field. */
static phi_tuning other_tuning(int max_task_rows, int max_small_batch) {
    phi_tuning tuning = {.max_task_rows = max_task_rows, .tasks_per_thread = 1 + max_small_batch, .spins = 10};
    for (int type = 0; type < PHI_N_TYPES; type++) {
        tuning.max_small_batch[type] = max_small_batch;
        for (int c = 0; c < PHI_N_BATCH_CLASSES; c++)
            tuning.prefetch[type][c] = (phi_prefetch){(size_t)(64 * type), (size_t)(100 * c), type % 2 == 0};
    }
    return tuning;
}

static bool is_candidate(phi_prefetch p, phi_batch_class batch_class) {
    int n;
    const phi_prefetch *candidates = phi_tune_candidates(batch_class, &n);
    for (int i = 0; i < n; i++) {
        const phi_prefetch *c = &candidates[i];
        if (p.l1_bytes == c->l1_bytes && p.l2_bytes == c->l2_bytes && p.next_page == c->next_page) return true;
    }
    return false;
}

/* Measures a model: every choice is a candidate, known types keep their settings, and the model is left unchanged. */
static phi_tuning check_tune(const tiny *m) {
    const phi_tuning before = m->model.tuning, start = other_tuning(64, 16);
    const bool packs = m->layers[0].wo.layout == PHI_LAYOUT_PANELS;
    phi_tuning tuning = start;
    phi_tune_call call = {.seconds = 0.0};
    CHECK(phi_tune(&m->model, &call, &tuning) == PHI_OK, "phi_tune failed without a budget");
    CHECK(!call.results[PHI_TYPE_Q4_K][PHI_BATCH_1].measured, "phi_tune measures without a budget");
    call = (phi_tune_call){.seconds = 0.03, .is_known = {[PHI_TYPE_Q6_K] = true}};
    CHECK(phi_tune(&m->model, &call, &tuning) == PHI_OK, "phi_tune failed");
    CHECK(call.results[PHI_TYPE_Q4_K][PHI_BATCH_1].measured == packs, "phi_tune does not measure Q4_K, or unpacked");
    for (int type = 0; type < PHI_N_TYPES; type++) {
        for (int c = 0; c < PHI_N_BATCH_CLASSES; c++) {
            const phi_tune_result *r = &call.results[type][c];
            if (!r->measured) continue;
            CHECK(type != PHI_TYPE_Q6_K, "phi_tune measures a known type");
            CHECK(is_candidate(r->chosen, (phi_batch_class)c), "the choice of %s is not a candidate",
                  phi_types[type].name);
            CHECK(memcmp(&r->chosen, &tuning.prefetch[type][c], sizeof r->chosen) == 0, "the choice is not used");
            CHECK(r->n_samples > 0 && r->chosen_seconds > 0.0 && r->chosen_seconds <= r->default_seconds,
                  "%s: %d samples, %g s with the choice, %g s by default", phi_types[type].name, r->n_samples,
                  r->chosen_seconds, r->default_seconds);
        }
    }
    CHECK(memcmp(tuning.prefetch[PHI_TYPE_Q6_K], start.prefetch[PHI_TYPE_Q6_K], sizeof start.prefetch[0]) == 0,
          "phi_tune changes a known type");
    CHECK(memcmp(&before, &m->model.tuning, sizeof before) == 0, "phi_tune changes the model's tuning");
    call = (phi_tune_call){.seconds = 60.0, .poll = always_true};
    CHECK(phi_tune(&m->model, &call, &tuning) == (packs ? PHI_CANCELLED : PHI_OK), "phi_tune was not cancelled");
    return tuning;
}

static void check_batches(const phi_kernels *k, phi_kv_type type, phi_rope_style style, bool packed,
                          const float *expected) {
    enum { N_LOGITS = N_TOKENS * N_VOCAB };
    static const struct {
        int n_threads, chunk;
        bool two_sequences;
    } cases[] = {{1, 1, false}, {1, N_TOKENS, false}, {3, N_TOKENS, true}, {2, 7, true}, {3, 1, false}};
    float *first = floats(N_LOGITS), *logits = floats(N_LOGITS);
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        phi_pool *pool;
        CHECK(phi_pool_create(cases[i].n_threads, &pool) == PHI_OK, "phi_pool_create failed");
        tiny *m = make_tiny(k, pool, style, packed);
        const bool rounds_differently =
            k->max_exact_batch && cases[i].chunk * (cases[i].two_sequences ? 2 : 1) > k->max_exact_batch;
        if (i) m->model.tuning = i % 3 == 0 ? other_tuning(32, 1) : i % 3 == 1 ? other_tuning(256, 5) : check_tune(m);
        phi_pool_set_spins(pool, m->model.tuning.spins);
        run(m, type, cases[i].chunk, cases[i].two_sequences, i ? logits : first);
        if (i == 0) check_cancel(m);
        if (i && !rounds_differently) {
            const size_t at = first_difference(logits, first, N_LOGITS);
            CHECK(at == N_LOGITS,
                  "%s: %d threads, chunks of %d tokens%s: logit %zu of token %zu differs from one thread, one token at "
                  "a time",
                  k->name, cases[i].n_threads, cases[i].chunk, cases[i].two_sequences ? ", two sequences" : "",
                  at % N_VOCAB, at / N_VOCAB);
        }
        const double error = nmse(i ? logits : first, expected);
        CHECK(error <= (rounds_differently ? 1e-2 : 2e-3), "%s: the NMSE of the logits against the scalar tier is %g",
              k->name, error);
        check_nan(m, type, cases[i].chunk, cases[i].two_sequences);
        free_tiny(m);
        phi_pool_free(pool);
    }
    free(first);
    free(logits);
}

void test_forward(const phi_kernels *k) {
    const phi_kernels *scalar;
    float *expected = floats(N_TOKENS * N_VOCAB);
    phi_pool *pool;
    CHECK(phi_select_kernels("scalar", &scalar) == PHI_OK && phi_pool_create(1, &pool) == PHI_OK,
          "the scalar tier or a thread pool is unavailable");
    for (phi_kv_type type = 0; type < PHI_N_KV_TYPES; type++) {
        const phi_rope_style style = type == PHI_KV_F16 ? PHI_ROPE_NEOX : PHI_ROPE_INTERLEAVED;
        tiny *m = make_tiny(scalar, pool, style, false);
        run(m, type, N_TOKENS, false, expected);
        free_tiny(m);
        check_batches(k, type, style, false, expected);
        check_batches(k, type, style, true, expected);
    }
    phi_pool_free(pool);
    free(expected);
}
