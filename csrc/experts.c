/* Mixture of experts: a router chooses PHI_EXPERTS_USED feed-forwards for each token.
 *
 * Phases, with the unit of a task:
 *   route            token                       router scores, chosen experts and their weights
 *   assign           the whole batch             rows sorted by expert
 *   gather           row                         the expert's input
 *   gate and up      expert, chunk of n_ffn      inner = silu(gate) * up
 *   down             chunk of n_embd             residual += weight * output, for all experts
 *
 * The weights of an expert are read once per batch; experts that no token chose are not read. The result of a token
 * does not depend on the other tokens: its experts are added in ascending order.
 *
 * Routing is SparseMixer at inference (transformers, modeling_phimoe.py; arXiv 2409.12136), not a softmax over the top
 * scores: each choice is weighted by a softmax over the scores within a threshold of it. */
#include <math.h>
#include <string.h>

#include "pass.h"

/* router_jitter_noise of the published configuration. GGUF has no key for it. */
static const float JITTER = 0.01f;

/* Returns the expert with the highest score, other than `excluded` (-1: none). weight: its softmax probability among
 * the scores s with (best - s) / max(|s|, best) <= 2 * JITTER. */
static int choose_expert(const float *scores, int n, int excluded, float *weight) {
    int best = -1;
    for (int e = 0; e < n; e++) {
        if (e != excluded && (best < 0 || scores[e] > scores[best])) best = e;
    }
    const float best_score = scores[best];
    float total = 0.0f;
    for (int e = 0; e < n; e++) {
        const float magnitude = fabsf(scores[e]), factor = magnitude > best_score ? magnitude : best_score;
        if (e != excluded && !((best_score - scores[e]) / factor > 2 * JITTER)) total += expf(scores[e] - best_score);
    }
    *weight = 1.0f / total;
    return best;
}

void phi_route(worker *w, int layer, const phi_activations *normed) {
    const forward_pass *f = w->f;
    const expert_rows *x = &f->experts;
    const int n = f->model->n_experts;
    FOR_EACH_TASK(w, t, f->batch->n_tokens) {
        float *scores = x->scores + (size_t)t * (size_t)n, *weights = x->weights + (size_t)t * PHI_EXPERTS_USED;
        int *chosen = x->chosen + (size_t)t * PHI_EXPERTS_USED;
        multiply_rows(f, &f->model->layers[layer].router, 0, n, normed, t, 1, scores, (size_t)n);
        chosen[0] = choose_expert(scores, n, -1, &weights[0]);
        chosen[1] = choose_expert(scores, n, chosen[0], &weights[1]);
    }
    end_phase(w, PHI_PHASE_ROUTER);
}

/* Sorts the (token, expert) pairs by expert, then by token. */
static void assign_rows(forward_pass *f) {
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

/* Copies the input of every row and quantises it. */
static void gather(worker *w, const phi_activations *normed) {
    forward_pass *f = w->f;
    expert_rows *x = &f->experts;
    const size_t n_embd = (size_t)f->model->n_embd;
    FOR_EACH_TASK(w, task, 1) assign_rows(f);
    end_phase(w, PHI_PHASE_GATHER);
    FOR_EACH_TASK(w, row, f->batch->n_tokens * PHI_EXPERTS_USED) {
        memcpy(x->in.f32 + (size_t)row * n_embd, normed->f32 + (size_t)x->token[row] * n_embd, n_embd * sizeof(float));
        quantize(f->model->kernels, &x->in, row, 0, n_embd);
    }
    end_phase(w, PHI_PHASE_GATHER);
}

/* inner = silu(gate) * up */
static void project_gate_up(worker *w, const phi_feed_forward *experts) {
    const forward_pass *f = w->f;
    const expert_rows *x = &f->experts;
    const phi_kernels *kernels = f->model->kernels;
    const int n_ffn = f->model->n_ffn, max_rows = max_untiled_rows(f->model, f->batch->n_tokens);
    const int chunk = task_rows(f, n_ffn, max_rows), n = ceil_div(n_ffn, chunk);
    const size_t stride = (size_t)max_rows;
    float *gates = f->scratch + (size_t)w->thread * f->scratch_floats;
    float *ups = gates + (size_t)f->batch->n_tokens * stride;
    FOR_EACH_TASK(w, task, x->n_active * n) {
        const int e = x->active[task / n], first = task % n * chunk, n_rows = min_int(chunk, n_ffn - first);
        const int first_row = x->first_row[e], n_tokens = x->n_rows[e];
        multiply_rows(f, &experts[e].gate, first, n_rows, &x->in, first_row, n_tokens, gates, stride);
        multiply_rows(f, &experts[e].up, first, n_rows, &x->in, first_row, n_tokens, ups, stride);
        for (int t = 0; t < n_tokens; t++) {
            const size_t at = (size_t)t * stride;
            float *y = x->inner.f32 + (size_t)(first_row + t) * (size_t)n_ffn + (size_t)first;
            kernels->silu_mul(gates + at, ups + at, (size_t)n_rows, y);
            quantize(kernels, &x->inner, first_row + t, (size_t)first, (size_t)n_rows);
        }
    }
    end_phase(w, PHI_PHASE_GATE_UP);
}

/* residual += weight * (inner @ down.T) for each chosen expert */
static void project_down(worker *w, const phi_feed_forward *experts) {
    const forward_pass *f = w->f;
    const expert_rows *x = &f->experts;
    const int n_embd = f->model->n_embd, max_rows = max_untiled_rows(f->model, f->batch->n_tokens);
    const int chunk = task_rows(f, n_embd, max_rows);
    const size_t stride = (size_t)max_rows;
    float *out = f->scratch + (size_t)w->thread * f->scratch_floats;
    FOR_EACH_TASK(w, task, ceil_div(n_embd, chunk)) {
        const int first = task * chunk, n_rows = min_int(chunk, n_embd - first);
        for (int i = 0; i < x->n_active; i++) {
            const int e = x->active[i], first_row = x->first_row[e];
            multiply_rows(f, &experts[e].down, first, n_rows, &x->inner, first_row, x->n_rows[e], out, stride);
            for (int t = 0; t < x->n_rows[e]; t++) {
                const int token = x->token[first_row + t];
                const float weight = x->weights[token * PHI_EXPERTS_USED + x->slot[first_row + t]];
                float *y = out + (size_t)t * stride;
                for (int r = 0; r < n_rows; r++) y[r] *= weight;
                f->model->kernels->add(y, (size_t)n_rows, f->residual + (size_t)token * (size_t)n_embd + (size_t)first);
            }
        }
    }
    end_phase(w, PHI_PHASE_DOWN);
}

void phi_run_experts(worker *w, int layer, const phi_activations *normed) {
    const phi_feed_forward *experts = w->f->model->layers[layer].ffn;
    gather(w, normed);
    project_gate_up(w, experts);
    project_down(w, experts);
}

void phi_observe_experts(worker *w, int layer) {
    const forward_pass *f = w->f;
    const expert_rows *x = &f->experts;
    const phi_observer *observer = f->batch->observer;
    const size_t first = (size_t)layer * (size_t)f->model->n_experts;
    const size_t n_embd = (size_t)f->model->n_embd, n_ffn = (size_t)f->model->n_ffn;
    FOR_EACH_TASK(w, i, x->n_active) {
        const int e = x->active[i], row = x->first_row[e], n = x->n_rows[e];
        const size_t at = first + (size_t)e;
        for (int c = 0; c < ceil_div((int)n_embd, OBSERVER_COLS); c++)
            observe_columns(&x->in, row, n, c, observer->expert_in + at * n_embd);
        for (int c = 0; c < ceil_div((int)n_ffn, OBSERVER_COLS); c++)
            observe_columns(&x->inner, row, n, c, observer->expert_inner + at * n_ffn);
        observer->expert_tokens[at] += n;
    }
    end_phase(w, PHI_PHASE_OBSERVE);
}
