/* A feed-forward of experts: a router chooses PHI_EXPERTS_USED of them for each token.
 *
 * route, by token: scores, chosen experts and their weights | rows, by one thread: which token is whose | gather, by
 * row | inner, by expert and chunk of rows of gate and up | back, by chunk of rows of down, for all experts in turn
 * The weights of an expert are read once a batch, those of one that nobody chose not at all. What a token gets does
 * not depend on the others: its experts are added in ascending order.
 *
 * Routing is SparseMixer at inference (transformers, modeling_phimoe.py; arXiv 2409.12136), not a softmax over the
 * largest scores, which some engines take: each choice is weighed by a softmax over the scores that are near enough. */
#include <math.h>
#include <string.h>

#include "pass.h"

/* router_jitter_noise of the published configuration; GGUF has no key for it. */
static const float JITTER = 0.01f;

/* The largest score that is not `taken`, and its share of a softmax over those within 2 * JITTER of it: relative to
 * the larger of their own size and its. */
static int choose(const float *scores, int n, int taken, float *weight) {
    int best = -1;
    for (int e = 0; e < n; e++) {
        if (e != taken && (best < 0 || scores[e] > scores[best])) best = e;
    }
    const float top = scores[best];
    float total = 0.0f;
    for (int e = 0; e < n; e++) {
        const float size = fabsf(scores[e]), factor = size > top ? size : top;
        if (e != taken && !((top - scores[e]) / factor > 2 * JITTER)) total += expf(scores[e] - top);
    }
    *weight = 1.0f / total;
    return best;
}

void phi_route(worker *w, int layer, const phi_activations *normed) {
    const forward *f = w->f;
    const expert_rows *x = &f->experts;
    const int n = f->model->n_experts;
    FOR_EACH_TASK(w, t, f->batch->n_tokens) {
        float *scores = x->scores + (size_t)t * (size_t)n, *weights = x->weights + (size_t)t * PHI_EXPERTS_USED;
        int *chosen = x->chosen + (size_t)t * PHI_EXPERTS_USED;
        multiply_rows(f, &f->model->layers[layer].router, 0, n, normed, t, 1, scores, (size_t)n);
        chosen[0] = choose(scores, n, -1, &weights[0]);
        chosen[1] = choose(scores, n, chosen[0], &weights[1]);
    }
    end_phase(w);
}

static void assign_rows(forward *f) {
    expert_rows *x = &f->experts;
    const int n_chosen = f->batch->n_tokens * PHI_EXPERTS_USED;
    x->n_active = 0;
    int row = 0;
    for (int e = 0; e < f->model->n_experts; e++) {
        const int first = row;
        for (int i = 0; i < n_chosen; i++) {
            if (x->chosen[i] != e) continue;
            x->token[row] = i / PHI_EXPERTS_USED;
            x->slot[row++] = i % PHI_EXPERTS_USED;
        }
        x->first_row[e] = first;
        x->n_rows[e] = row - first;
        if (row > first) x->active[x->n_active++] = e;
    }
}

static void gather(worker *w, const phi_activations *normed) {
    forward *f = w->f;
    expert_rows *x = &f->experts;
    const size_t n_embd = (size_t)f->model->n_embd;
    FOR_EACH_TASK(w, task, 1) assign_rows(f);
    end_phase(w);
    FOR_EACH_TASK(w, row, f->batch->n_tokens * PHI_EXPERTS_USED) {
        memcpy(x->in.f32 + (size_t)row * n_embd, normed->f32 + (size_t)x->token[row] * n_embd, n_embd * sizeof(float));
        quantize(f->model->kernels, &x->in, row, 0, n_embd);
    }
    end_phase(w);
}

/* inner = silu(gate) * up */
static void project_inner(worker *w, const phi_feed_forward *experts) {
    const forward *f = w->f;
    const expert_rows *x = &f->experts;
    const phi_kernels *kernels = f->model->kernels;
    const int n_ffn = f->model->n_ffn, chunk = chunk_rows(f, n_ffn, CHUNK_ROWS), n = n_chunks(n_ffn, chunk);
    float *gates = f->scratch + (size_t)w->thread * f->scratch_floats;
    float *ups = gates + (size_t)f->batch->n_tokens * CHUNK_ROWS;
    FOR_EACH_TASK(w, task, x->n_active * n) {
        const int e = x->active[task / n], first = task % n * chunk, n_rows = min_int(chunk, n_ffn - first);
        const int first_row = x->first_row[e], n_tokens = x->n_rows[e];
        multiply_rows(f, &experts[e].gate, first, n_rows, &x->in, first_row, n_tokens, gates, CHUNK_ROWS);
        multiply_rows(f, &experts[e].up, first, n_rows, &x->in, first_row, n_tokens, ups, CHUNK_ROWS);
        for (int t = 0; t < n_tokens; t++) {
            const size_t at = (size_t)t * CHUNK_ROWS;
            float *y = x->inner.f32 + (size_t)(first_row + t) * (size_t)n_ffn + (size_t)first;
            kernels->silu_mul(gates + at, ups + at, (size_t)n_rows, y);
            quantize(kernels, &x->inner, first_row + t, (size_t)first, (size_t)n_rows);
        }
    }
    end_phase(w);
}

/* residual += weight * (inner @ down.T) of each chosen expert */
static void project_back(worker *w, const phi_feed_forward *experts) {
    const forward *f = w->f;
    const expert_rows *x = &f->experts;
    const int n_embd = f->model->n_embd, chunk = chunk_rows(f, n_embd, CHUNK_ROWS);
    float *out = f->scratch + (size_t)w->thread * f->scratch_floats;
    FOR_EACH_TASK(w, task, n_chunks(n_embd, chunk)) {
        const int first = task * chunk, n_rows = min_int(chunk, n_embd - first);
        for (int i = 0; i < x->n_active; i++) {
            const int e = x->active[i], first_row = x->first_row[e];
            multiply_rows(f, &experts[e].down, first, n_rows, &x->inner, first_row, x->n_rows[e], out, CHUNK_ROWS);
            for (int t = 0; t < x->n_rows[e]; t++) {
                const int token = x->token[first_row + t];
                const float weight = x->weights[token * PHI_EXPERTS_USED + x->slot[first_row + t]];
                float *y = out + (size_t)t * CHUNK_ROWS;
                for (int r = 0; r < n_rows; r++) y[r] *= weight;
                f->model->kernels->add(y, (size_t)n_rows, f->residual + (size_t)token * (size_t)n_embd + (size_t)first);
            }
        }
    }
    end_phase(w);
}

void phi_run_experts(worker *w, int layer, const phi_activations *normed) {
    const phi_feed_forward *experts = w->f->model->layers[layer].ffn;
    gather(w, normed);
    project_inner(w, experts);
    project_back(w, experts);
}

void phi_observe_experts(worker *w, int layer) {
    const forward *f = w->f;
    const expert_rows *x = &f->experts;
    const phi_observer *seen = f->batch->observer;
    const size_t first = (size_t)layer * (size_t)f->model->n_experts;
    const size_t n_embd = (size_t)f->model->n_embd, n_ffn = (size_t)f->model->n_ffn;
    FOR_EACH_TASK(w, i, x->n_active) {
        const int e = x->active[i], row = x->first_row[e], n = x->n_rows[e];
        const size_t at = first + (size_t)e;
        for (int c = 0; c < n_chunks((int)n_embd, CHUNK_ROWS); c++)
            observe_columns(&x->in, row, n, c, seen->expert_in + at * n_embd);
        for (int c = 0; c < n_chunks((int)n_ffn, CHUNK_ROWS); c++)
            observe_columns(&x->inner, row, n, c, seen->expert_inner + at * n_ffn);
        seen->expert_tokens[at] += n;
    }
    end_phase(w);
}
