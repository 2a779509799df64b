/* Attention over a paged KV cache, with online softmax: the part that all instruction sets share. A tier supplies the
 * phi_attention_steps.
 * Layout: a row is one query head of one token; up to eight rows form a query tile.
 * Idea: all tiles walk through the KV cache together, block by block. A page's keys, then 32 dimensions of a block's
 * values, are converted to float once for all rows. If a block raises a row's maximum score, what earlier blocks added
 * is rescaled. A single row reads the pages directly, without the conversion.
 * Results do not depend on the other rows of a call: blocks start at multiples of their size, masked positions get
 * weight exactly 0, and a block with no visible position leaves a row's sums unchanged. The exception is an infinite
 * or NaN value at a masked position, since 0 * NaN is NaN: a row whose output is not finite is computed again, alone.
 * Bound: one row: reading the pages; more: the FMAs. */
#ifndef PHI_GENERIC_ATTENTION_TILE_H
#define PHI_GENERIC_ATTENTION_TILE_H

#include <float.h>
#include <string.h>

#include "../../kernels.h"
#include "unroll.h"

enum { PHI_QUERY_TILE_ROWS = 8, PHI_MAX_QUERY_TILES = PHI_ATTENTION_ROWS / 4, PHI_VALUE_DIMS = 32 };

typedef struct {
    int n_rows;  /* 1, 4 or 8; rows from n_valid on repeat row n_valid - 1 */
    int n_valid; /* rows whose output is stored */
    /* Row r attends to positions row_first[r] .. row_last[r]: the causal mask and the sliding window. */
    int row_first[PHI_QUERY_TILE_ROWS], row_last[PHI_QUERY_TILE_ROWS];
    int any_first, any_end;                 /* any_first .. any_end - 1 are visible to at least one row */
    int all_first, all_last;                /* all_first .. all_last are visible to every row */
    float *q;                               /* [head_dim, n_rows], multiplied by the scale of the scores */
    float *acc;                             /* [n_rows, acc_stride]: sum of weight * value, not yet normalised */
    size_t acc_stride;                      /* floats: head_dim, rounded up to a multiple of PHI_VALUE_DIMS */
    float *weights;                         /* [n_rows, PHI_ATTENTION_BLOCK]: a block's scores, then exp(score - max) */
    float row_max[PHI_QUERY_TILE_ROWS];     /* maximum score so far */
    float rescale[PHI_QUERY_TILE_ROWS];     /* exp(old row_max - new row_max), a factor for acc */
    float row_sum[PHI_QUERY_TILE_ROWS][16]; /* sum of the weights so far, by vector lane */
    float *out[PHI_QUERY_TILE_ROWS];        /* [head_dim] */
} phi_query_tile;

typedef struct {
    int max_rows; /* of a tile: 8 or 4 */
    /* The keys of a page to floats [head_dim, PHI_PAGE_TOKENS]. */
    void (*convert_keys)(const phi_attention *a, int page, float *keys);
    /* The values at positions first .. end - 1 to floats [end - first, PHI_VALUE_DIMS], zeros beyond head_dim. */
    void (*convert_values)(const phi_attention *a, int first, int end, size_t first_dim, float *values);
    /* A page's scores, q * k, to scores [n_rows, PHI_ATTENTION_BLOCK], of which it writes the first PHI_PAGE_TOKENS
     * columns; -infinity at masked positions. */
    void (*compute_scores)(const phi_attention *a, const phi_query_tile *t, int page, const float *keys, float *scores);
    /* Replaces a row's scores [n] by weights; updates row_max, rescale, row_sum. n: a multiple of PHI_PAGE_TOKENS. */
    void (*update_softmax)(phi_query_tile *t, int row, float *scores, int n);
    /* PHI_VALUE_DIMS dimensions of acc = acc * rescale + sum over n positions of weight * value. */
    void (*accumulate_pv)(const phi_query_tile *t, const float *weights, const float *values, int n, size_t first_dim);
    /* compute_scores and accumulate_pv for a tile of one row, straight from the pages. Same operations, same bits. */
    void (*compute_scores_one)(const phi_attention *a, const phi_query_tile *t, int page, float *scores);
    void (*accumulate_pv_one)(const phi_attention *a, const phi_query_tile *t, int first, int end,
                              const float *weights);
} phi_attention_steps;

static inline int phi_min(int a, int b) { return a < b ? a : b; }
static inline int phi_max(int a, int b) { return a > b ? a : b; }

/* The call's KV head in the page that holds a position. */
static inline const uint8_t *phi_page_of(const phi_attention *a, int position) {
    return a->pages + (size_t)a->page_table[position / PHI_PAGE_TOKENS] * a->page_bytes;
}
PHI_INLINE phi_kv_slice phi_kv_slice_at(const phi_attention *a, phi_kv_type type, int position) {
    return phi_kv_slice_of(type, a->head_dim, (uint8_t *)phi_page_of(a, position));
}

PHI_INLINE size_t phi_kv_element_bytes(phi_kv_type type) { return type == PHI_KV_F16 ? 2 : 1; }

/* Rows first_row .. first_row + n_valid - 1 of the call; memory [n_rows, phi_attention_row_floats]. */
static inline void phi_init_tile(const phi_attention *a, int first_row, int n_valid, int n_rows, float *memory,
                                 phi_query_tile *t) {
    const size_t head_dim = (size_t)a->head_dim, n = (size_t)n_rows;
    t->n_rows = n_rows;
    t->n_valid = n_valid;
    t->any_first = t->all_last = a->query_start + a->n_tokens;
    t->any_end = t->all_first = 0;
    t->acc_stride = phi_attention_sums_stride(a->head_dim);
    t->weights = memory;
    t->acc = t->weights + n * PHI_ATTENTION_BLOCK;
    t->q = t->acc + n * t->acc_stride;
    memset(t->acc, 0, n * t->acc_stride * sizeof *t->acc);
    memset(t->row_sum, 0, sizeof t->row_sum);
    for (int r = 0; r < n_rows; r++) {
        const int row = first_row + phi_min(r, n_valid - 1), token = row / a->n_queries;
        const size_t at = (size_t)token * a->token_stride + (size_t)(row % a->n_queries) * head_dim;
        for (size_t d = 0; d < head_dim; d++) t->q[d * n + (size_t)r] = a->q[at + d] * a->scale;
        t->out[r] = a->out + at;
        t->row_max[r] = -FLT_MAX; /* not -INFINITY: score - row_max would be NaN at masked positions */
        t->row_last[r] = a->query_start + token;
        t->row_first[r] = phi_first_visible(t->row_last[r], a->window);
        t->any_first = phi_min(t->any_first, t->row_first[r]);
        t->any_end = phi_max(t->any_end, t->row_last[r] + 1);
        t->all_first = phi_max(t->all_first, t->row_first[r]);
        t->all_last = phi_min(t->all_last, t->row_last[r]);
    }
}

static inline bool phi_all_finite(const float *x, int n) {
    uint32_t largest = 0; /* magnitude, as bits: these order as the floats do, infinity and NaN above all others */
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest < 0x7f800000;
}

static inline void phi_normalise_row(const phi_attention *a, const phi_query_tile *t, int r) {
    float row_sum = 0.0f;
    for (int i = 0; i < 16; i++) row_sum += t->row_sum[r][i];
    const float *acc = t->acc + (size_t)r * t->acc_stride, inverse = 1.0f / row_sum;
    for (int d = 0; d < a->head_dim; d++) t->out[r][d] = acc[d] * inverse;
}

/* For a block's scores from position first_page up to the end of the page that holds position end - 1. */
static inline void phi_update_softmax(const phi_attention_steps *steps, phi_query_tile *t, int block, int first_page,
                                      int end) {
    const int n = (end - first_page + PHI_PAGE_TOKENS - 1) / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS;
    for (int r = 0; r < t->n_rows; r++)
        steps->update_softmax(t, r, t->weights + r * PHI_ATTENTION_BLOCK + (first_page - block), n);
}

static inline void phi_attend_one(const phi_attention *a, const phi_attention_steps *steps, phi_query_tile *t) {
    for (int first = t->any_first; first < t->any_end;) {
        const int block = first / PHI_ATTENTION_BLOCK * PHI_ATTENTION_BLOCK;
        const int end = phi_min(block + PHI_ATTENTION_BLOCK, t->any_end);
        const int first_page = first / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS;
        for (int page = first_page; page < end; page += PHI_PAGE_TOKENS)
            steps->compute_scores_one(a, t, page, t->weights + (page - block));
        phi_update_softmax(steps, t, block, first_page, end);
        steps->accumulate_pv_one(a, t, first, end, t->weights + (first - block));
        first = end;
    }
}

/* Writes the output of rows first_row .. first_row + n_valid - 1 of the call. */
static inline void phi_finish_tile(const phi_attention *a, const phi_attention_steps *steps, const phi_query_tile *t,
                                   int first_row) {
    for (int r = 0; r < t->n_valid; r++) phi_normalise_row(a, t, r);
    for (int r = 0; t->n_rows > 1 && r < t->n_valid; r++) {
        phi_query_tile alone;
        if (phi_all_finite(t->out[r], a->head_dim)) continue;
        phi_init_tile(a, first_row + r, 1, 1, t->weights, &alone);
        phi_attend_one(a, steps, &alone);
        phi_normalise_row(a, &alone, 0);
    }
}

/* Positions first .. end - 1, all in one block. floats: buffer for converted keys, then for converted values. */
static inline void phi_attend_block(const phi_attention *a, const phi_attention_steps *steps, phi_query_tile *tiles,
                                    int n_tiles, int first, int end, float *floats) {
    const int block = first / PHI_ATTENTION_BLOCK * PHI_ATTENTION_BLOCK;
    for (int page = first / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS; page < end; page += PHI_PAGE_TOKENS) {
        steps->convert_keys(a, page, floats);
        for (phi_query_tile *t = tiles; t < tiles + n_tiles; t++) {
            if (t->any_first < page + PHI_PAGE_TOKENS && page < t->any_end)
                steps->compute_scores(a, t, page, floats, t->weights + (page - block));
        }
    }
    for (phi_query_tile *t = tiles; t < tiles + n_tiles; t++) {
        const int t_first = phi_max(first, t->any_first), t_end = phi_min(end, t->any_end);
        if (t_first < t_end) phi_update_softmax(steps, t, block, t_first / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS, t_end);
    }
    for (size_t d = 0; d < (size_t)a->head_dim; d += PHI_VALUE_DIMS) {
        steps->convert_values(a, first, end, d, floats);
        for (phi_query_tile *t = tiles; t < tiles + n_tiles; t++) {
            const int t_first = phi_max(first, t->any_first), t_end = phi_min(end, t->any_end);
            if (t_first < t_end)
                steps->accumulate_pv(t, t->weights + (t_first - block), floats + (t_first - first) * PHI_VALUE_DIMS,
                                     t_end - t_first, d);
        }
    }
}

static inline void phi_attend(const phi_attention *a, const phi_attention_steps *steps) {
    const int n_rows = a->n_tokens * a->n_queries;
    float *floats = a->scratch, *memory = floats + phi_attention_converted_floats(a->head_dim);
    for (int row = 0; row < n_rows;) {
        phi_query_tile tiles[PHI_MAX_QUERY_TILES];
        const int first_row = row, end_row = phi_min(n_rows, row + PHI_ATTENTION_ROWS);
        int n_tiles = 0, first = a->query_start + a->n_tokens, end = 0;
        for (float *free = memory; row < end_row; n_tiles++) {
            const int left = end_row - row, n_valid = phi_min(left, steps->max_rows);
            const int n = n_tiles == 0 && left == 1 ? 1 : left > 4 ? steps->max_rows : 4;
            phi_query_tile *t = &tiles[n_tiles];
            phi_init_tile(a, row, n_valid, n, free, t);
            free += (size_t)n * phi_attention_row_floats(a->head_dim);
            first = phi_min(first, t->any_first);
            end = phi_max(end, t->any_end);
            row += n_valid;
        }
        if (tiles[0].n_rows == 1) {
            phi_attend_one(a, steps, &tiles[0]);
        } else {
            for (int next; first < end; first = next) {
                next = phi_min(end, (first / PHI_ATTENTION_BLOCK + 1) * PHI_ATTENTION_BLOCK);
                phi_attend_block(a, steps, tiles, n_tiles, first, next, floats);
            }
        }
        for (int i = 0; i < n_tiles; i++) phi_finish_tile(a, steps, &tiles[i], first_row + i * steps->max_rows);
    }
}

/* Defines the kernel for one KV cache type from a tier's functions. Those that read pages take the type as an argument,
 * a compile-time constant once inlined. */
#define PHI_DEFINE_ATTENTION(TYPE, type, tier)                                                                        \
    static void convert_keys_##type(const phi_attention *a, int page, float *keys) {                                  \
        convert_keys(a, TYPE, page, keys);                                                                            \
    }                                                                                                                 \
    static void convert_values_##type(const phi_attention *a, int first, int end, size_t first_dim, float *values) {  \
        convert_values(a, TYPE, first, end, first_dim, values);                                                       \
    }                                                                                                                 \
    static void compute_scores_one_##type(const phi_attention *a, const phi_query_tile *t, int page, float *scores) { \
        compute_scores_one(a, TYPE, t, page, scores);                                                                 \
    }                                                                                                                 \
    static void accumulate_pv_one_##type(const phi_attention *a, const phi_query_tile *t, int first, int end,         \
                                         const float *weights) {                                                      \
        accumulate_pv_one(a, TYPE, t, first, end, weights);                                                           \
    }                                                                                                                 \
    void phi_attention_##type##_##tier(const phi_attention *a) {                                                      \
        static const phi_attention_steps steps = {                                                                    \
            .max_rows = ROWS,                                                                                         \
            .convert_keys = convert_keys_##type,                                                                      \
            .convert_values = convert_values_##type,                                                                  \
            .compute_scores = compute_scores,                                                                         \
            .update_softmax = update_softmax,                                                                         \
            .accumulate_pv = accumulate_pv,                                                                           \
            .compute_scores_one = compute_scores_one_##type,                                                          \
            .accumulate_pv_one = accumulate_pv_one_##type,                                                            \
        };                                                                                                            \
        phi_attend(a, &steps);                                                                                        \
    }

#endif
