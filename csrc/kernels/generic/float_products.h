/* Products of float rows with float activations: what AVX2, AVX-512 and NEON have in common.
 * Layout: rows as in the file, at any address.
 * Idea: a (row, token) pair has one vector of sums, each of every STEPth column; after BLOCK columns it is added up and
 * joins the pair's total. So a tile of ROWS x TOKENS pairs reads a weight and an activation once for all its products,
 * and gives a pair the bits that any other tile would. Few tokens take whole rows; many take BLOCK columns of all rows
 * at a time, so that the activations of a tile stay in the first-level cache and the rows in the second.
 * Bound: reading the rows for few tokens; for many the FMAs, beside which loads and adding up nearly vanish.
 * A tier defines, before it includes this: TOKENS, STEP, `vector` and the functions on it, `four` floats, one a row,
 * and ask_for, which has a line come to the second-level cache. */
#ifndef PHI_GENERIC_FLOAT_PRODUCTS_H
#define PHI_GENERIC_FLOAT_PRODUCTS_H

#include "unroll.h"

enum {
    ROWS = 4,     /* add_up's vectors, and the floats of its result */
    BLOCK = 1024, /* columns */
};

/* What a type is made of: constants where they are inlined. */
typedef struct {
    size_t bytes;
    vector (*load)(const uint8_t *w);                /* STEP weights */
    vector (*load_some)(const uint8_t *w, size_t n); /* n < STEP of them, then zeros */
} format;

INLINE int min_int(int a, int b) { return a < b ? a : b; }

/* Adds the products of columns first .. end - 1, where first is a multiple of BLOCK, to the output; n_tokens is a
 * constant where this is inlined. Rows that are missing at the end of the matrix are its last one once more. What lies
 * `ahead` bytes behind the weights is asked for, 0: nothing. */
INLINE void multiply_tile(const format f, const phi_matmul *m, int row, int token, int n_tokens, size_t first,
                          size_t end, size_t ahead) {
    const size_t stride = (size_t)m->n_cols;
    const int n_rows = min_int(m->n_rows - row, ROWS);
    const float *x = m->x->f32 + (size_t)(m->first_token + token) * stride;
    float *out = m->out + (size_t)token * m->out_stride + row;
    const uint8_t *w[ROWS];
    four total[TOKENS];
    UNROLL for (int r = 0; r < ROWS; r++) w[r] = m->rows + (size_t)(row + min_int(r, n_rows - 1)) * m->row_bytes;
    UNROLL for (int t = 0; t < n_tokens; t++) {
        total[t] = load_first(out + (size_t)t * m->out_stride, first ? n_rows : 0);
    }
    for (size_t i = first, block_end; i < end; i = block_end) {
        vector sum[ROWS][TOKENS], a[TOKENS];
        UNROLL for (int r = 0; r < ROWS; r++) { UNROLL for (int t = 0; t < n_tokens; t++) sum[r][t] = zeros(); }
        block_end = end - i < BLOCK ? end : i + BLOCK;
        for (; i + STEP <= block_end; i += STEP) {
            UNROLL for (int t = 0; t < n_tokens; t++) a[t] = load_f32((const uint8_t *)(x + (size_t)t * stride + i));
            UNROLL for (int r = 0; r < ROWS; r++) {
                const vector weights = f.load(w[r] + i * f.bytes);
                if (ahead) ask_for(w[r] + i * f.bytes + ahead);
                UNROLL for (int t = 0; t < n_tokens; t++) sum[r][t] = multiply_add(weights, a[t], sum[r][t]);
            }
        }
        if (i < block_end) {
            const size_t n = block_end - i;
            UNROLL for (int t = 0; t < n_tokens; t++) {
                a[t] = load_some_f32((const uint8_t *)(x + (size_t)t * stride + i), n);
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                const vector weights = f.load_some(w[r] + i * f.bytes, n);
                UNROLL for (int t = 0; t < n_tokens; t++) sum[r][t] = multiply_add(weights, a[t], sum[r][t]);
            }
        }
        UNROLL for (int t = 0; t < n_tokens; t++) {
            total[t] = add_four(total[t], add_up(sum[0][t], sum[1][t], sum[2][t], sum[3][t]));
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) store_first(out + (size_t)t * m->out_stride, n_rows, total[t]);
}

/* The same for any number of tokens up to TOKENS. */
INLINE void multiply_rows(const format f, const phi_matmul *m, int row, int token, int n_tokens, size_t first,
                          size_t end, size_t ahead) {
    switch (n_tokens) {
    case 1:
        multiply_tile(f, m, row, token, 1, first, end, ahead);
        break;
    case 2:
        multiply_tile(f, m, row, token, 2, first, end, ahead);
        break;
#if TOKENS > 3
    case 3:
        multiply_tile(f, m, row, token, 3, first, end, ahead);
        break;
    case 4:
        multiply_tile(f, m, row, token, 4, first, end, ahead);
        break;
    case 5:
        multiply_tile(f, m, row, token, 5, first, end, ahead);
        break;
#endif
    default:
        multiply_tile(f, m, row, token, TOKENS, first, end, ahead);
        break;
    }
}

INLINE void matmul(const format f, const phi_matmul *m) {
    const size_t n_cols = (size_t)m->n_cols;
    const size_t step = m->n_tokens <= TOKENS ? n_cols : BLOCK, next_rows = ROWS * m->row_bytes;
    for (size_t i = 0; i < n_cols; i += step) {
        const size_t end = n_cols - i < step ? n_cols : i + step;
        for (int t = 0; t < m->n_tokens; t += TOKENS) {
            const int n_tokens = min_int(m->n_tokens - t, TOKENS);
            for (int r = 0; r < m->n_rows; r += ROWS) {
                /* The first to see the rows has the next ones come to the second-level cache: without, reading and
                 * computing do not overlap. */
                if (t == 0)
                    multiply_rows(f, m, r, t, n_tokens, i, end, next_rows);
                else
                    multiply_rows(f, m, r, t, n_tokens, i, end, 0);
            }
        }
    }
}

#endif
