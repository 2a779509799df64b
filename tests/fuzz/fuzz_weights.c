/* Rows of weights of any bytes, on every tier of the machine: nothing is read or written outside of them, every tier
 * dequantises to the bits of the scalar one, and a token's product does not depend on what is computed with it.
 *
 * An input: type, rows, blocks of 256 columns, tokens, seed of the activations, a byte each; then the rows, repeated
 * until they are whole. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { N_FIELDS = 5, MOST_ROWS = 48, MOST_BLOCKS = 4, MOST_TOKENS = 20 };

typedef struct {
    phi_type type;
    int n_rows, n_cols, n_tokens;
    size_t row_bytes;
    uint8_t *rows, *panels; /* [n_rows, row_bytes]; panels: NULL where the type or the number of rows has none */
    phi_activations x;
} input;

static void multiply(const phi_kernels *k, const input *in, bool packed, int first_token, int n_tokens, float *out) {
    const phi_matmul m = {
        .rows = packed ? in->panels : in->rows,
        .row_bytes = in->row_bytes,
        .n_rows = in->n_rows,
        .n_cols = in->n_cols,
        .x = &in->x,
        .first_token = first_token,
        .n_tokens = n_tokens,
        .out = out,
        .out_stride = (size_t)in->n_rows,
        .prefetch = k->prefetch,
    };
    (packed ? k->matmul_packed : k->matmul)[in->type](&m);
}

static void check_product(const phi_kernels *k, const input *in, bool packed) {
    const size_t n_rows = (size_t)in->n_rows, n = (size_t)in->n_tokens * n_rows;
    float *together = floats(n), *alone = floats(n);
    multiply(k, in, packed, 0, in->n_tokens, together);
    for (int t = 0; t < in->n_tokens; t++) multiply(k, in, packed, t, 1, alone + (size_t)t * n_rows);
    if (!k->few_tokens || in->n_tokens <= k->few_tokens) {
        for (size_t i = 0; i < n; i++)
            CHECK(same_float(together[i], alone[i]), "%s: %s, row %zu, token %zu is %g, and alone %g", k->name,
                  phi_types[in->type].name, i % n_rows, i / n_rows, (double)together[i], (double)alone[i]);
    }
    free(together);
    free(alone);
}

static void check_tier(const phi_kernels *k, const phi_kernels *scalar, input *in) {
    const size_t n = (size_t)in->n_cols, n_bytes = (size_t)in->n_rows * in->row_bytes;
    float *y = floats(n), *expected = floats(n);
    for (int r = 0; r < in->n_rows; r++) {
        k->dequantize[in->type](in->rows + (size_t)r * in->row_bytes, n, y);
        scalar->dequantize[in->type](in->rows + (size_t)r * in->row_bytes, n, expected);
        for (size_t i = 0; i < n; i++)
            CHECK(same_float(y[i], expected[i]), "%s: %s, row %d, element %zu is %g, expected %g", k->name,
                  phi_types[in->type].name, r, i, (double)y[i], (double)expected[i]);
    }
    free(y);
    free(expected);
    k->quantize_q8(in->x.f32, n * (size_t)in->n_tokens, in->x.q8);
    check_product(k, in, false);
    if (k->pack[in->type] && in->n_rows % PHI_PANEL_ROWS == 0) {
        in->panels = memory(n_bytes);
        for (size_t r = 0; r < (size_t)in->n_rows; r += PHI_PANEL_ROWS)
            k->pack[in->type](in->rows + r * in->row_bytes, in->row_bytes, in->panels + r * in->row_bytes);
        check_product(k, in, true);
        free(in->panels);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes); /* libFuzzer's name for it */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes) {
    const phi_kernels *scalar = NULL, *k = NULL;
    if (n_bytes <= N_FIELDS) return 0;
    input in = {.type = (phi_type)(data[0] % PHI_N_TYPES),
                .n_rows = 1 + data[1] % MOST_ROWS,
                .n_cols = 256 * (1 + data[2] % MOST_BLOCKS),
                .n_tokens = 1 + data[3] % MOST_TOKENS};
    generator g = {data[4]};
    const size_t n_given = n_bytes - N_FIELDS, n_activations = (size_t)in.n_tokens * (size_t)in.n_cols;
    in.row_bytes = phi_row_bytes(in.type, (size_t)in.n_cols);
    const size_t n_needed = (size_t)in.n_rows * in.row_bytes;
    in.rows = memory(n_needed);
    for (size_t at = 0; at < n_needed; at += n_given)
        memcpy(in.rows + at, data + N_FIELDS, n_needed - at < n_given ? n_needed - at : n_given);
    in.x = (phi_activations){.n_cols = in.n_cols, .f32 = floats(n_activations), .q8 = allot_q8(n_activations)};
    fill_spiky(&g, (size_t)in.n_tokens, (size_t)in.n_cols, in.x.f32);
    CHECK(phi_select_kernels("scalar", &scalar) == PHI_OK, "no scalar tier");
    for (const char *const *tier = phi_tier_names(); *tier; tier++) {
        if (phi_select_kernels(*tier, &k) == PHI_OK) check_tier(k, scalar, &in);
    }
    free(in.rows);
    free(in.x.f32);
    free_q8(in.x.q8);
    return 0;
}
