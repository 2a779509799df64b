/* Products of float rows with float activations, shared by the AVX2, AVX-512 and NEON tiers.
 * Layout: row-major weights as in the file, at any alignment.
 * Idea: each (row, token) pair has one vector of partial sums, which is reduced and added to the pair's total after
 * every BLOCK columns. A tile of ROWS x TOKENS pairs loads each weight and activation once, and a pair gets the same
 * bits in a tile of any size. Up to TOKENS tokens (decode, small batch) run over whole rows. More (prefill) run over
 * BLOCK columns of all rows at a time, so that a tile's activations stay in L1 and the rows in L2.
 * Bound: decode: reading the rows; prefill: the FMAs.
 * Before it includes this file a tier defines TOKENS; `vector` and STEP, the floats in one; set_zero, multiply_add,
 * load_f32, load_partial_f32 and sum_each for vectors; float4 with float4_load, float4_store and float4_add; and
 * prefetch_weights, which prefetches a cache line. */
#ifndef PHI_GENERIC_FLOAT_PRODUCTS_H
#define PHI_GENERIC_FLOAT_PRODUCTS_H

#include "unroll.h"

enum {
    ROWS = 4,     /* of a tile, and the floats of a float4 */
    BLOCK = 1024, /* columns between two reductions */
};

/* Traits of a weight type; compile-time constants once inlined. */
typedef struct {
    size_t bytes;                                       /* of a weight */
    vector (*load)(const uint8_t *w);                   /* STEP weights */
    vector (*load_partial)(const uint8_t *w, size_t n); /* n < STEP weights, then zeros */
} format;

PHI_INLINE int min_int(int a, int b) { return a < b ? a : b; }

/* Adds the products of columns first .. end - 1 to the output; first is a multiple of BLOCK, and 0 overwrites the
 * output. n_tokens is a compile-time constant once inlined. A tile that reaches past the last row repeats that row.
 * prefetch_bytes: prefetch distance ahead of the weights in bytes; 0: no prefetch. */
PHI_INLINE void multiply_tile(const format f, const phi_matmul *m, int row, int token, int n_tokens, size_t first,
                              size_t end, size_t prefetch_bytes) {
    const size_t stride = (size_t)m->n_cols;
    const int n_rows = min_int(m->n_rows - row, ROWS);
    const float *x = m->x->f32 + (size_t)(m->first_token + token) * stride;
    float *out = m->out + (size_t)token * m->out_stride + row;
    const uint8_t *w[ROWS];
    float4 total[TOKENS];
    UNROLL for (int r = 0; r < ROWS; r++) w[r] = m->rows + (size_t)(row + min_int(r, n_rows - 1)) * m->row_bytes;
    UNROLL for (int t = 0; t < n_tokens; t++) {
        total[t] = float4_load(out + (size_t)t * m->out_stride, first ? n_rows : 0);
    }
    for (size_t i = first, block_end; i < end; i = block_end) {
        vector sum[ROWS][TOKENS], a[TOKENS];
        UNROLL for (int r = 0; r < ROWS; r++) { UNROLL for (int t = 0; t < n_tokens; t++) sum[r][t] = set_zero(); }
        block_end = end - i < BLOCK ? end : i + BLOCK;
        for (; i + STEP <= block_end; i += STEP) {
            UNROLL for (int t = 0; t < n_tokens; t++) a[t] = load_f32((const uint8_t *)(x + (size_t)t * stride + i));
            UNROLL for (int r = 0; r < ROWS; r++) {
                const vector weights = f.load(w[r] + i * f.bytes);
                if (prefetch_bytes) prefetch_weights(w[r] + i * f.bytes + prefetch_bytes);
                UNROLL for (int t = 0; t < n_tokens; t++) sum[r][t] = multiply_add(weights, a[t], sum[r][t]);
            }
        }
        if (i < block_end) {
            const size_t n = block_end - i;
            UNROLL for (int t = 0; t < n_tokens; t++) {
                a[t] = load_partial_f32((const uint8_t *)(x + (size_t)t * stride + i), n);
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                const vector weights = f.load_partial(w[r] + i * f.bytes, n);
                UNROLL for (int t = 0; t < n_tokens; t++) sum[r][t] = multiply_add(weights, a[t], sum[r][t]);
            }
        }
        UNROLL for (int t = 0; t < n_tokens; t++) {
            total[t] = float4_add(total[t], sum_each(sum[0][t], sum[1][t], sum[2][t], sum[3][t]));
        }
    }
    UNROLL for (int t = 0; t < n_tokens; t++) float4_store(out + (size_t)t * m->out_stride, n_rows, total[t]);
}

/* multiply_tile for any n_tokens up to TOKENS. */
PHI_INLINE void multiply_rows(const format f, const phi_matmul *m, int row, int token, int n_tokens, size_t first,
                              size_t end, size_t prefetch_bytes) {
    switch (n_tokens) {
    case 1:
        multiply_tile(f, m, row, token, 1, first, end, prefetch_bytes);
        break;
    case 2:
        multiply_tile(f, m, row, token, 2, first, end, prefetch_bytes);
        break;
#if TOKENS > 3
    case 3:
        multiply_tile(f, m, row, token, 3, first, end, prefetch_bytes);
        break;
    case 4:
        multiply_tile(f, m, row, token, 4, first, end, prefetch_bytes);
        break;
    case 5:
        multiply_tile(f, m, row, token, 5, first, end, prefetch_bytes);
        break;
#endif
    default:
        multiply_tile(f, m, row, token, TOKENS, first, end, prefetch_bytes);
        break;
    }
}

PHI_INLINE void matmul(const format f, const phi_matmul *m) {
    const size_t n_cols = (size_t)m->n_cols;
    const size_t step = m->n_tokens <= TOKENS ? n_cols : BLOCK, next_rows = ROWS * m->row_bytes;
    for (size_t i = 0; i < n_cols; i += step) {
        const size_t end = n_cols - i < step ? n_cols : i + step;
        for (int t = 0; t < m->n_tokens; t += TOKENS) {
            const int n_tokens = min_int(m->n_tokens - t, TOKENS);
            for (int r = 0; r < m->n_rows; r += ROWS) {
                /* The first tokens prefetch the next ROWS rows, so that memory reads overlap with the FMAs. Later
                 * tokens find the rows in cache. */
                if (t == 0)
                    multiply_rows(f, m, r, t, n_tokens, i, end, next_rows);
                else
                    multiply_rows(f, m, r, t, n_tokens, i, end, 0);
            }
        }
    }
}

#endif
