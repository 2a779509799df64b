/* What attention does alike on every instruction set. The rows of a call (a row: one query head of one token) are cut
 * into tiles, and all tiles walk through the positions together, block by block: keys of a page, then 32 dimensions of
 * a block's values, are converted to floats once for all rows. Softmax is online: each block may find a new largest
 * score, by which what earlier blocks gave is scaled down. A row alone skips the detour through converted floats.
 * Blocks begin at multiples of their size wherever a row begins to see, positions that a row does not see weigh exactly
 * 0, and a block of which it sees nothing leaves its sums as they are: what a row gets does not depend on the others.
 * Only where a value is infinite or NaN would it: 0 times that is NaN. So a row of which no number came is done anew,
 * alone.
 */
#ifndef PHI_GENERIC_ATTENTION_TILE_H
#define PHI_GENERIC_ATTENTION_TILE_H

#include <float.h>
#include <string.h>

#include "../../kernels.h"

enum { PHI_TILE_ROWS = 8, PHI_MAX_TILES = PHI_ATTENTION_ROWS / 4, PHI_VALUE_DIMS = 32 };

typedef struct {
    int n_rows;                                    /* 1, 4 or 8; those beyond n_real repeat the last one */
    int n_real;                                    /* rows that are wanted */
    int first[PHI_TILE_ROWS], last[PHI_TILE_ROWS]; /* positions that a row sees */
    int seen_first, seen_end;                      /* some row sees seen_first .. seen_end - 1 */
    int all_first, all_last;                       /* every row sees those from all_first to all_last */
    float *q;                                      /* [head_dim, n_rows], times the scale of the scores */
    float *sums;                                   /* [n_rows, sums_stride]: weighted values so far */
    size_t sums_stride;                            /* floats: head_dim in whole PHI_VALUE_DIMS */
    float *weights;                                /* [n_rows, PHI_ATTENTION_BLOCK]: scores, then weights of a block */
    float top[PHI_TILE_ROWS];                      /* the largest score so far */
    float kept[PHI_TILE_ROWS];                     /* what a new largest score leaves of the sums */
    float totals[PHI_TILE_ROWS][16];               /* the sum of the weights so far, by lanes */
    float *out[PHI_TILE_ROWS];                     /* [head_dim] */
} phi_tile;

typedef struct {
    int most_rows; /* of a tile: 8, or 4 */
    /* A page's keys as floats [head_dim, PHI_PAGE_TOKENS]. */
    void (*convert_keys)(const phi_attention *a, int page, float *keys);
    /* Values at positions first .. end - 1 as floats [end - first, PHI_VALUE_DIMS], zeros beyond head_dim. */
    void (*convert_values)(const phi_attention *a, int first, int end, size_t first_dim, float *values);
    /* scores [n_rows, PHI_ATTENTION_BLOCK], the first PHI_PAGE_TOKENS of each: minus infinity where a row sees nothing.
     */
    void (*score)(const phi_attention *a, const phi_tile *t, int page, const float *keys, float *scores);
    /* A row's scores [n] to weights in place; sets top and kept, adds to totals. n is a multiple of PHI_PAGE_TOKENS. */
    void (*soften)(phi_tile *t, int row, float *scores, int n);
    /* Scales down PHI_VALUE_DIMS of the sums, and adds n weighted values to them. */
    void (*weigh)(const phi_tile *t, const float *weights, const float *values, int n, size_t first_dim);
    /* The same for one row, from the page: every operation has the result that it has above. */
    void (*score_one)(const phi_attention *a, const phi_tile *t, int page, float *scores);
    void (*weigh_one)(const phi_attention *a, const phi_tile *t, int first, int end, const float *weights);
} phi_attention_steps;

static inline int phi_min(int a, int b) { return a < b ? a : b; }
static inline int phi_max(int a, int b) { return a > b ? a : b; }

static inline const uint8_t *phi_page_of(const phi_attention *a, int position) {
    return a->pages + (size_t)a->page_table[position / PHI_PAGE_TOKENS] * a->page_bytes;
}

/* Rows first_row .. first_row + n_real - 1 of the call; memory [n_rows, phi_attention_row_floats]. */
static inline void phi_start_tile(const phi_attention *a, int first_row, int n_real, int n_rows, float *memory,
                                  phi_tile *t) {
    const size_t head_dim = (size_t)a->head_dim, n = (size_t)n_rows;
    t->n_rows = n_rows;
    t->n_real = n_real;
    t->seen_first = t->all_last = a->last + a->n_tokens;
    t->seen_end = t->all_first = 0;
    t->sums_stride = phi_attention_sums_stride(a->head_dim);
    t->weights = memory;
    t->sums = t->weights + n * PHI_ATTENTION_BLOCK;
    t->q = t->sums + n * t->sums_stride;
    memset(t->sums, 0, n * t->sums_stride * sizeof *t->sums);
    memset(t->totals, 0, sizeof t->totals);
    for (int r = 0; r < n_rows; r++) {
        const int row = first_row + phi_min(r, n_real - 1), token = row / a->n_queries;
        const size_t at = (size_t)token * a->token_stride + (size_t)(row % a->n_queries) * head_dim;
        for (size_t d = 0; d < head_dim; d++) t->q[d * n + (size_t)r] = a->q[at + d] * a->scale;
        t->out[r] = a->out + at;
        t->top[r] = -FLT_MAX; /* finite: a difference with minus infinity is a number */
        t->last[r] = a->last + token;
        t->first[r] = phi_first_visible(t->last[r], a->window);
        t->seen_first = phi_min(t->seen_first, t->first[r]);
        t->seen_end = phi_max(t->seen_end, t->last[r] + 1);
        t->all_first = phi_max(t->all_first, t->first[r]);
        t->all_last = phi_min(t->all_last, t->last[r]);
    }
}

static inline bool phi_all_finite(const float *x, int n) {
    uint32_t largest = 0; /* of the magnitudes, which are ordered as their bits are */
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest < 0x7f800000;
}

static inline void phi_finish_row(const phi_attention *a, const phi_tile *t, int r) {
    float total = 0.0f;
    for (int i = 0; i < 16; i++) total += t->totals[r][i];
    const float *sums = t->sums + (size_t)r * t->sums_stride, inverse = 1.0f / total;
    for (int d = 0; d < a->head_dim; d++) t->out[r][d] = sums[d] * inverse;
}

/* Scores of positions from first_page on are there, up to those of the page that holds end - 1. */
static inline void phi_soften_tile(const phi_attention_steps *steps, phi_tile *t, int block, int first_page, int end) {
    const int n = (end - first_page + PHI_PAGE_TOKENS - 1) / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS;
    for (int r = 0; r < t->n_rows; r++)
        steps->soften(t, r, t->weights + r * PHI_ATTENTION_BLOCK + (first_page - block), n);
}

static inline void phi_attend_one(const phi_attention *a, const phi_attention_steps *steps, phi_tile *t) {
    for (int first = t->seen_first; first < t->seen_end;) {
        const int block = first / PHI_ATTENTION_BLOCK * PHI_ATTENTION_BLOCK;
        const int end = phi_min(block + PHI_ATTENTION_BLOCK, t->seen_end);
        const int first_page = first / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS;
        for (int page = first_page; page < end; page += PHI_PAGE_TOKENS)
            steps->score_one(a, t, page, t->weights + (page - block));
        phi_soften_tile(steps, t, block, first_page, end);
        steps->weigh_one(a, t, first, end, t->weights + (first - block));
        first = end;
    }
}

/* Rows first_row .. first_row + n_real - 1 of the call. */
static inline void phi_finish_tile(const phi_attention *a, const phi_attention_steps *steps, const phi_tile *t,
                                   int first_row) {
    for (int r = 0; r < t->n_real; r++) phi_finish_row(a, t, r);
    for (int r = 0; t->n_rows > 1 && r < t->n_real; r++) {
        phi_tile alone;
        if (phi_all_finite(t->out[r], a->head_dim)) continue;
        phi_start_tile(a, first_row + r, 1, 1, t->weights, &alone);
        phi_attend_one(a, steps, &alone);
        phi_finish_row(a, &alone, 0);
    }
}

/* Positions first .. end - 1, which lie in one block. floats: room for converted keys, or values. */
static inline void phi_attend_block(const phi_attention *a, const phi_attention_steps *steps, phi_tile *tiles,
                                    int n_tiles, int first, int end, float *floats) {
    const int block = first / PHI_ATTENTION_BLOCK * PHI_ATTENTION_BLOCK;
    for (int page = first / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS; page < end; page += PHI_PAGE_TOKENS) {
        steps->convert_keys(a, page, floats);
        for (phi_tile *t = tiles; t < tiles + n_tiles; t++) {
            if (t->seen_first < page + PHI_PAGE_TOKENS && page < t->seen_end)
                steps->score(a, t, page, floats, t->weights + (page - block));
        }
    }
    for (phi_tile *t = tiles; t < tiles + n_tiles; t++) {
        const int t_first = phi_max(first, t->seen_first), t_end = phi_min(end, t->seen_end);
        if (t_first < t_end) phi_soften_tile(steps, t, block, t_first / PHI_PAGE_TOKENS * PHI_PAGE_TOKENS, t_end);
    }
    for (size_t d = 0; d < (size_t)a->head_dim; d += PHI_VALUE_DIMS) {
        steps->convert_values(a, first, end, d, floats);
        for (phi_tile *t = tiles; t < tiles + n_tiles; t++) {
            const int t_first = phi_max(first, t->seen_first), t_end = phi_min(end, t->seen_end);
            if (t_first < t_end)
                steps->weigh(t, t->weights + (t_first - block), floats + (t_first - first) * PHI_VALUE_DIMS,
                             t_end - t_first, d);
        }
    }
}

static inline void phi_attend(const phi_attention *a, const phi_attention_steps *steps) {
    const int n_rows = a->n_tokens * a->n_queries;
    float *floats = a->scratch, *memory = floats + phi_attention_converted_floats(a->head_dim);
    for (int row = 0; row < n_rows;) {
        phi_tile tiles[PHI_MAX_TILES];
        const int first_row = row, end_row = phi_min(n_rows, row + PHI_ATTENTION_ROWS);
        int n_tiles = 0, first = a->last + a->n_tokens, end = 0;
        for (float *free = memory; row < end_row; n_tiles++) {
            const int left = end_row - row, n_real = phi_min(left, steps->most_rows);
            const int n = n_tiles == 0 && left == 1 ? 1 : left > 4 ? steps->most_rows : 4;
            phi_tile *t = &tiles[n_tiles];
            phi_start_tile(a, row, n_real, n, free, t);
            free += (size_t)n * phi_attention_row_floats(a->head_dim);
            first = phi_min(first, t->seen_first);
            end = phi_max(end, t->seen_end);
            row += n_real;
        }
        if (tiles[0].n_rows == 1) {
            phi_attend_one(a, steps, &tiles[0]);
        } else {
            for (int next; first < end; first = next) {
                next = phi_min(end, (first / PHI_ATTENTION_BLOCK + 1) * PHI_ATTENTION_BLOCK);
                phi_attend_block(a, steps, tiles, n_tiles, first, next, floats);
            }
        }
        for (int i = 0; i < n_tiles; i++) phi_finish_tile(a, steps, &tiles[i], first_row + i * steps->most_rows);
    }
}

/* The kernel of a cache type, from a tier's steps; those that read pages are inlined with the type as a constant. */
#define PHI_KV_STEPS(TYPE, type, tier)                                                                               \
    static void convert_keys_##type(const phi_attention *a, int page, float *keys) {                                 \
        convert_keys(a, TYPE, page, keys);                                                                           \
    }                                                                                                                \
    static void convert_values_##type(const phi_attention *a, int first, int end, size_t first_dim, float *values) { \
        convert_values(a, TYPE, first, end, first_dim, values);                                                      \
    }                                                                                                                \
    static void score_one_##type(const phi_attention *a, const phi_tile *t, int page, float *scores) {               \
        score_one(a, TYPE, t, page, scores);                                                                         \
    }                                                                                                                \
    static void weigh_one_##type(const phi_attention *a, const phi_tile *t, int first, int end,                      \
                                 const float *weights) {                                                             \
        weigh_one(a, TYPE, t, first, end, weights);                                                                  \
    }                                                                                                                \
    void phi_attention_##type##_##tier(const phi_attention *a) {                                                     \
        static const phi_attention_steps steps =                                                                     \
            {                                                                                                        \
                ROWS,  convert_keys_##type, convert_values_##type, score, soften,                                    \
                weigh, score_one_##type,    weigh_one_##type,                                                        \
        };                                                                                                           \
        phi_attend(a, &steps);                                                                                       \
    }

#endif
