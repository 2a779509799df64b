/* Run-time tuning: chooses the prefetch of packed products by measuring.
 *
 * A measurement multiplies about SAMPLE_BYTES of weights per thread, in the tasks of a forward pass, by the tokens of a
 * batch class. Candidates take turns, in rounds. After a share of the time the slower half of them is dropped, and so
 * on. The default setting is never dropped: a candidate replaces it only if the median of the ratios of each round is
 * below 1 - MIN_GAIN, and if it is faster in clearly more than half of the rounds. */
#include "phi.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "memory.h"
#include "threads.h"

enum {
    SAMPLE_BYTES = 3 << 19,      /* of weights, per thread */
    MAX_SAMPLE_BYTES = 32 << 20, /* of weights, for all threads */
    MAX_CANDIDATES = 16,
    MAX_SAMPLES = 256, /* per candidate */
    MIN_SAMPLES = 5,   /* without as many, the default setting stays */
};

static const double MIN_GAIN = 0.02;
static const double MIN_SHARE = 0.02; /* of the bytes of all packed weights, for a type to be measured */
/* Parts of the budget. Single tokens come first: their speed depends most on prefetch. */
static const double CLASS_SHARE[PHI_N_BATCH_CLASSES] = {0.55, 0.15, 0.15, 0.15};
static const int CLASS_TOKENS[PHI_N_BATCH_CLASSES] = {1, 4, 8, 16};

#define KIB(n) ((size_t)(n) << 10)
/* In front the default settings, within 10 % of the best decode on Zen 4, where none is best, and on Zen 5, where 16
 * KiB is; without any, Zen 5 decodes at half the speed. In batches of 8, Zen 4 needs one too: without any it takes 1.6
 * times as long. */
static const phi_prefetch decode_candidates[] = {
    {0, KIB(8), true},       {0, 0, false},          {0, 0, true},
    {0, KIB(4), false},      {0, KIB(8), false},     {0, KIB(16), true},
    {0, KIB(16), false},     {0, KIB(32), true},     {0, KIB(32), false},
    {KIB(2), 0, false},      {KIB(4), 0, false},     {KIB(4), 0, true},
    {KIB(2), KIB(4), false}, {KIB(2), KIB(4), true}, {KIB(2), KIB(8), false},
};
static const phi_prefetch batch_candidates[] = {
    {KIB(2), KIB(8), false}, {0, 0, false},      {0, KIB(4), false}, {0, KIB(8), false},      {0, KIB(16), false},
    {0, KIB(32), false},     {KIB(2), 0, false}, {KIB(4), 0, false}, {KIB(2), KIB(4), false}, {KIB(2), KIB(16), false},
};
static_assert(sizeof decode_candidates / sizeof *decode_candidates <= MAX_CANDIDATES, "MAX_CANDIDATES is too small");
static_assert(sizeof batch_candidates / sizeof *batch_candidates <= MAX_CANDIDATES, "MAX_CANDIDATES is too small");

const phi_prefetch *phi_tune_candidates(phi_batch_class batch_class, int *n) {
    const bool decode = batch_class == PHI_BATCH_1;
    *n = (int)(decode ? sizeof decode_candidates : sizeof batch_candidates) / (int)sizeof(phi_prefetch);
    return decode ? decode_candidates : batch_candidates;
}

phi_tuning phi_default_tuning(void) {
    phi_tuning tuning = {.max_task_rows = 64, .tasks_per_thread = 8, .spins = PHI_DEFAULT_SPINS};
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        tuning.max_small_batch[type] = PHI_DEFAULT_SMALL_BATCH;
        for (int c = 0; c < PHI_N_BATCH_CLASSES; c++)
            tuning.prefetch[type][c] = c == PHI_BATCH_1 ? decode_candidates[0] : batch_candidates[0];
    }
    return tuning;
}

/* ---- the packed weights of a type, as a ring of tasks ---- */

typedef struct {
    const phi_matrix **matrices; /* [n_matrices] */
    int *first_task;             /* [n_matrices + 1] */
    int n_matrices, n_tasks;
    size_t n_bytes;
    int cursor; /* the task after the last one measured */
} task_ring;

typedef struct {
    const phi_model *model;
    const phi_tune_call *call;
    task_ring rings[PHI_N_TYPES];
    phi_q8 q8;  /* of PHI_MAX_SMALL_BATCH tokens and the most columns that a matrix has */
    float *out; /* [n_threads, PHI_MAX_SMALL_BATCH, max_task_rows] */
    void *memory;
    size_t memory_bytes, n_bytes; /* n_bytes: of all packed weights */
} tuner;

/* One measurement: n_tasks tasks of a ring from its cursor on. */
typedef struct {
    const tuner *t;
    const task_ring *ring;
    phi_prefetch prefetch;
    int n_tasks, n_tokens;
} sample;

static int matrices_per_layer(const phi_model *model) { return 4 + 3 * (model->n_experts ? model->n_experts : 1); }

/* The i-th matrix of the model, of those that can be packed; the last one is output. */
static const phi_matrix *matrix_at(const phi_model *model, int i) {
    const int per_layer = matrices_per_layer(model), k = i % per_layer;
    if (i == model->n_layers * per_layer) return &model->output;
    const phi_layer *l = &model->layers[i / per_layer];
    const phi_matrix *attention[] = {&l->wq, &l->wk, &l->wv, &l->wo};
    if (k < 4) return attention[k];
    const phi_feed_forward *ffn = &l->ffn[(k - 4) / 3];
    return k % 3 == 1 ? &ffn->gate : k % 3 == 2 ? &ffn->up : &ffn->down;
}

static size_t matrix_bytes(const phi_matrix *m) {
    return (size_t)m->n_rows * phi_row_bytes(m->type, (size_t)m->n_cols);
}

static bool add_matrices(tuner *t) {
    const phi_model *model = t->model;
    const int n = model->n_layers * matrices_per_layer(model) + 1, task_rows = model->tuning.max_task_rows;
    for (int i = 0; i < n; i++) {
        const phi_matrix *m = matrix_at(model, i);
        task_ring *ring = &t->rings[m->type];
        if (m->layout != PHI_LAYOUT_PANELS) continue;
        if (!ring->matrices) {
            ring->matrices = calloc((size_t)n, sizeof *ring->matrices);
            ring->first_task = calloc((size_t)n + 1, sizeof *ring->first_task);
            if (!ring->matrices || !ring->first_task) return false;
        }
        ring->matrices[ring->n_matrices++] = m;
        ring->n_tasks += (m->n_rows + task_rows - 1) / task_rows;
        ring->first_task[ring->n_matrices] = ring->n_tasks;
        ring->n_bytes += matrix_bytes(m);
        t->n_bytes += matrix_bytes(m);
    }
    return true;
}

/* A part of a matrix: the rows of one task. */
typedef struct {
    const phi_matrix *matrix;
    int first_row, n_rows;
} task_part;

static task_part part_at(const task_ring *ring, int task, int task_rows) {
    int low = 0, high = ring->n_matrices;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (ring->first_task[middle] <= task)
            low = middle;
        else
            high = middle;
    }
    const phi_matrix *m = ring->matrices[low];
    const int first = (task - ring->first_task[low]) * task_rows, left = m->n_rows - first;
    return (task_part){m, first, left < task_rows ? left : task_rows};
}

static size_t part_bytes(const task_part *p) {
    return (size_t)p->n_rows * phi_row_bytes(p->matrix->type, (size_t)p->matrix->n_cols);
}

/* ---- measurements ---- */

/* Each thread has adjacent tasks, and joins those of a matrix if it has few tokens, as in a forward pass: what a
 * prefetch gains depends on how often a stream of weights breaks off. */
static void run_sample(void *context, int thread) {
    const sample *s = context;
    const tuner *t = s->t;
    const int n_threads = phi_pool_size(t->model->pool), end = s->n_tasks * (thread + 1) / n_threads;
    const int task_rows = t->model->tuning.max_task_rows, max_rows = task_rows * PHI_MAX_SMALL_BATCH / s->n_tokens;
    float *out = t->out + (size_t)thread * PHI_MAX_SMALL_BATCH * (size_t)task_rows;
    for (int i = s->n_tasks * thread / n_threads; i < end;) {
        task_part p = part_at(s->ring, (s->ring->cursor + i++) % s->ring->n_tasks, task_rows);
        for (; i < end; i++) {
            const task_part next = part_at(s->ring, (s->ring->cursor + i) % s->ring->n_tasks, task_rows);
            if (next.matrix != p.matrix || next.first_row == 0 || p.n_rows + next.n_rows > max_rows) break;
            p.n_rows += next.n_rows;
        }
        const size_t row_bytes = phi_row_bytes(p.matrix->type, (size_t)p.matrix->n_cols);
        const phi_activations x = {.n_cols = p.matrix->n_cols, .q8 = t->q8};
        const phi_matmul m = {
            .rows = (const uint8_t *)p.matrix->data + (size_t)p.first_row * row_bytes,
            .row_bytes = row_bytes,
            .n_rows = p.n_rows,
            .n_cols = p.matrix->n_cols,
            .x = &x,
            .n_tokens = s->n_tokens,
            .out = out,
            .out_stride = (size_t)max_rows,
            .prefetch = s->prefetch,
            .max_small_batch = t->model->tuning.max_small_batch[p.matrix->type],
        };
        t->model->kernels->matmul_packed[p.matrix->type](&m);
    }
}

/* Seconds per byte of weights; negative if the threads cannot be started. */
static double measure(const tuner *t, task_ring *ring, const phi_prefetch *prefetch, int n_tokens) {
    const int task_rows = t->model->tuning.max_task_rows, n_threads = phi_pool_size(t->model->pool);
    const size_t wanted = (size_t)SAMPLE_BYTES * (size_t)n_threads;
    const size_t limit = wanted < MAX_SAMPLE_BYTES ? wanted : MAX_SAMPLE_BYTES;
    sample s = {.t = t, .ring = ring, .prefetch = *prefetch, .n_tokens = n_tokens};
    size_t n_bytes = 0;
    while (n_bytes < limit) {
        const task_part p = part_at(ring, (ring->cursor + s.n_tasks++) % ring->n_tasks, task_rows);
        n_bytes += part_bytes(&p);
    }
    const double start = phi_seconds();
    if (phi_pool_run(t->model->pool, run_sample, &s) != PHI_OK) return -1.0;
    const double seconds = phi_seconds() - start;
    ring->cursor = (ring->cursor + s.n_tasks) % ring->n_tasks;
    return seconds / (double)n_bytes;
}

/* ---- the choice between candidates ---- */

typedef struct {
    const phi_prefetch *candidates;
    int n_candidates;
    int alive[MAX_CANDIDATES], n_alive;         /* indices; alive[0] is 0, the default setting */
    float seconds[MAX_CANDIDATES][MAX_SAMPLES]; /* per byte */
    double score[MAX_CANDIDATES];               /* median over rounds of its time by the round's median */
    int n_rounds;
} contest;

static int compare_floats(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* The median; sorts the values. */
static double median(float *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare_floats);
    return ((double)values[(n - 1) / 2] + (double)values[n / 2]) / 2.0;
}

/* A round takes about as long as a busy core is given to another process, so each round is its own scale. */
static void update_scores(contest *c) {
    float values[MAX_SAMPLES], round[MAX_CANDIDATES];
    double scale[MAX_SAMPLES];
    for (int r = 0; r < c->n_rounds; r++) {
        for (int i = 0; i < c->n_alive; i++) round[i] = c->seconds[c->alive[i]][r];
        scale[r] = median(round, c->n_alive);
    }
    for (int i = 0; i < c->n_alive; i++) {
        for (int r = 0; r < c->n_rounds; r++) values[r] = (float)((double)c->seconds[c->alive[i]][r] / scale[r]);
        c->score[c->alive[i]] = median(values, c->n_rounds);
    }
}

/* Drops the slower half of the candidates. */
static void halve(contest *c) {
    const int n_kept = (c->n_alive + 1) / 2;
    update_scores(c);
    for (int i = 1; i < c->n_alive; i++) { /* insertion sort; the default stays in front */
        for (int k = i; k > 1 && c->score[c->alive[k]] < c->score[c->alive[k - 1]]; k--) {
            const int swapped = c->alive[k];
            c->alive[k] = c->alive[k - 1];
            c->alive[k - 1] = swapped;
        }
    }
    c->n_alive = n_kept < 2 ? 2 : n_kept;
}

/* The candidate that replaces the default setting, or 0: the default itself. *ratio: the median over rounds of its time
 * divided by the default's. *is_clear: as in phi_tune_result. */
static int winner(contest *c, double *ratio, bool *is_clear) {
    int best = 0, n_faster = 0;
    float ratios[MAX_SAMPLES];
    update_scores(c);
    for (int i = 1; i < c->n_alive; i++) {
        if (c->score[c->alive[i]] < c->score[best]) best = c->alive[i];
    }
    for (int r = 0; r < c->n_rounds; r++) {
        ratios[r] = c->seconds[best][r] / c->seconds[0][r];
        n_faster += ratios[r] < 1.0f;
    }
    *ratio = median(ratios, c->n_rounds);
    const int margin = 2 * n_faster - c->n_rounds; /* its standard deviation for equal candidates is sqrt(n_rounds) */
    const bool is_certain = margin > 0 && 4 * margin * margin >= 9 * c->n_rounds; /* 1.5 standard deviations */
    const bool is_faster = *ratio < 1.0 - MIN_GAIN;
    *is_clear = c->n_rounds >= MIN_SAMPLES && (is_certain || !is_faster);
    if (*is_clear && is_faster) return best;
    *ratio = 1.0;
    return 0;
}

/* Measures every candidate that is left once. The order rotates, so that no candidate always has the same weights. */
static phi_status run_round(const tuner *t, task_ring *ring, int n_tokens, contest *c) {
    for (int i = 0; i < c->n_alive; i++) {
        const int candidate = c->alive[(i + c->n_rounds) % c->n_alive];
        const double seconds = measure(t, ring, &c->candidates[candidate], n_tokens);
        if (seconds < 0.0) return PHI_NO_THREADS;
        c->seconds[candidate][c->n_rounds] = (float)seconds;
        if (t->call->poll && t->call->poll(t->call->poll_context)) return PHI_CANCELLED;
    }
    c->n_rounds++;
    return PHI_OK;
}

/* Chooses the prefetch of a type and a batch class until `end`. */
static phi_status choose(const tuner *t, task_ring *ring, phi_batch_class class, double end, phi_tune_result *result) {
    contest c = {.n_rounds = 0};
    c.candidates = phi_tune_candidates(class, &c.n_candidates);
    c.n_alive = c.n_candidates;
    int n_stages = 1;
    for (int i = 0; i < c.n_candidates; i++) c.alive[i] = i;
    for (int n = c.n_candidates; n > 2; n = (n + 1) / 2) n_stages++;
    for (int stage = n_stages; stage > 0; stage--) {
        const double now = phi_seconds(), stage_end = now + (end - now) / stage;
        do {
            const phi_status status = run_round(t, ring, CLASS_TOKENS[class], &c);
            if (status != PHI_OK) return status;
        } while (phi_seconds() < stage_end && c.n_rounds < MAX_SAMPLES * (n_stages - stage + 1) / n_stages);
        if (stage > 1) halve(&c);
    }
    double ratio;
    bool is_clear;
    const int best = winner(&c, &ratio, &is_clear);
    const double default_seconds = median(c.seconds[0], c.n_rounds);
    *result = (phi_tune_result){
        .measured = true,
        .chosen = c.candidates[best],
        .default_seconds = default_seconds,
        .chosen_seconds = default_seconds * ratio,
        .n_samples = c.n_rounds,
        .is_clear = is_clear,
    };
    return PHI_OK;
}

/* ---- all types ---- */

static bool is_large(const tuner *t, phi_type type) {
    return (double)t->rings[type].n_bytes >= MIN_SHARE * (double)t->n_bytes && t->rings[type].n_bytes > 0;
}

static bool is_measured(const tuner *t, phi_type type) { return is_large(t, type) && !t->call->is_known[type]; }

/* Allots activations and outputs. The values do not matter for the speed. */
static bool allot_buffers(tuner *t) {
    size_t n_cols = 0;
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        for (int i = 0; i < t->rings[type].n_matrices; i++) {
            if ((size_t)t->rings[type].matrices[i]->n_cols > n_cols)
                n_cols = (size_t)t->rings[type].matrices[i]->n_cols;
        }
    }
    const size_t n = n_cols * PHI_MAX_SMALL_BATCH, n_blocks = n / PHI_Q8_BLOCK, n_sums = n / PHI_SUM_BLOCK;
    const size_t n_out =
        (size_t)phi_pool_size(t->model->pool) * PHI_MAX_SMALL_BATCH * (size_t)t->model->tuning.max_task_rows;
    t->memory_bytes = n + (2 * n_blocks + n_sums + n_out + n) * sizeof(float) + (n_blocks + n_sums) * sizeof(int32_t);
    uint8_t *memory = t->memory = phi_map(t->memory_bytes);
    if (!memory) return false;
    t->out = (float *)(void *)memory;
    float *x = t->out + n_out;
    t->q8.scales = x + n;
    t->q8.block_sums = t->q8.scales + n_blocks;
    t->q8.sums = t->q8.block_sums + n_blocks;
    t->q8.offsets = (int32_t *)(void *)(t->q8.sums + n_sums);
    t->q8.block_offsets = t->q8.offsets + n_sums;
    t->q8.quants = (int8_t *)(t->q8.block_offsets + n_blocks);
    for (size_t i = 0; i < n; i++) x[i] = (float)(i % 13) - 6.0f;
    t->model->kernels->quantize_q8(x, n, t->q8);
    return true;
}

/* Measures types by descending size, for each batch class in turn. */
static phi_status measure_all(tuner *t, phi_tune_call *call, phi_tuning *tuning) {
    const double start = phi_seconds();
    double share = 0.0; /* of the budget, for all that is measured so far and for the next */
    size_t n_bytes = 0;
    for (phi_type type = 0; type < PHI_N_TYPES; type++) n_bytes += is_measured(t, type) ? t->rings[type].n_bytes : 0;
    for (int c = 0; c < PHI_N_BATCH_CLASSES; c++) {
        bool done[PHI_N_TYPES] = {false};
        for (;;) {
            int next = -1;
            for (int i = 0; i < PHI_N_TYPES; i++) {
                if (!is_measured(t, (phi_type)i) || done[i]) continue;
                if (next < 0 || t->rings[i].n_bytes > t->rings[next].n_bytes) next = i;
            }
            if (next < 0) break;
            done[next] = true;
            share += CLASS_SHARE[c] * (double)t->rings[next].n_bytes / (double)n_bytes;
            const double end = start + share * call->seconds;
            if (phi_seconds() >= end) continue;
            phi_tune_result *result = &call->results[next][c];
            const phi_status status = choose(t, &t->rings[next], (phi_batch_class)c, end, result);
            if (status != PHI_OK) return status;
            tuning->prefetch[next][c] = result->chosen;
        }
    }
    return PHI_OK;
}

/* Bytes per weight. */
static double density(phi_type type) {
    return (double)phi_types[type].block_bytes / (double)phi_types[type].block_elements;
}

/* Copies the settings of the most similar large type, by bytes per weight, to types with few bytes. */
static void copy_to_small(const tuner *t, phi_tuning *tuning) {
    for (int i = 0; i < PHI_N_TYPES; i++) {
        int similar = -1;
        double least = 0.0;
        if (t->call->is_known[i] || is_large(t, (phi_type)i) || t->rings[i].n_bytes == 0) continue;
        for (int k = 0; k < PHI_N_TYPES; k++) {
            const double difference = density((phi_type)k) - density((phi_type)i);
            const double distance = difference < 0.0 ? -difference : difference;
            if (!is_large(t, (phi_type)k) || (similar >= 0 && distance >= least)) continue;
            similar = k;
            least = distance;
        }
        if (similar >= 0) memcpy(tuning->prefetch[i], tuning->prefetch[similar], sizeof tuning->prefetch[i]);
    }
}

phi_status phi_tune(const phi_model *model, phi_tune_call *call, phi_tuning *tuning) {
    tuner t = {.model = model, .call = call};
    phi_status status = add_matrices(&t) ? PHI_OK : PHI_OUT_OF_MEMORY;
    bool any = false;
    memset(call->results, 0, sizeof call->results);
    for (phi_type type = 0; type < PHI_N_TYPES; type++) any = any || is_measured(&t, type);
    if (status == PHI_OK && any) {
        status = allot_buffers(&t) ? measure_all(&t, call, tuning) : PHI_OUT_OF_MEMORY;
        if (t.memory) phi_unmap(t.memory, t.memory_bytes);
    }
    if (status == PHI_OK) copy_to_small(&t, tuning);
    for (int i = 0; i < PHI_N_TYPES; i++) {
        free(t.rings[i].matrices);
        free(t.rings[i].first_task);
    }
    return status;
}
