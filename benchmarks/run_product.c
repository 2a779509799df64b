/* Runs one matrix product on zeros, for instruction_counts.py:
 *   run_product TIER TYPE packed|mmap N_ROWS N_TOKENS N_COLS */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static phi_type find_type(const char *name) {
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        if (strcmp(phi_types[type].name, name) == 0) return type;
    }
    fprintf(stderr, "unknown tensor type %s\n", name);
    exit(2);
}

int main(int n_arguments, char **arguments) {
    const phi_kernels *k;
    if (n_arguments != 7 || phi_select_kernels(arguments[1], &k) != PHI_OK) return 2;
    const phi_type type = find_type(arguments[2]);
    const int n_rows = atoi(arguments[4]), n_tokens = atoi(arguments[5]), n_cols = atoi(arguments[6]);
    const size_t row_bytes = phi_row_bytes(type, (size_t)n_cols), n = (size_t)n_tokens * (size_t)n_cols;
    phi_activations x = {
        .n_cols = n_cols,
        .f32 = calloc(n, sizeof(float)),
        .q8 = {calloc(n, 1), calloc(n, sizeof(float)), calloc(n, sizeof(float)), calloc(n, sizeof(float)),
               calloc(n, sizeof(int32_t)), calloc(n, sizeof(int32_t))},
    };
    const phi_matmul m = {
        .rows = calloc((size_t)n_rows + 1, row_bytes),
        .row_bytes = row_bytes,
        .n_rows = n_rows,
        .n_cols = n_cols,
        .x = &x,
        .n_tokens = n_tokens,
        .out = calloc((size_t)n_tokens * (size_t)n_rows, sizeof(float)),
        .out_stride = (size_t)n_rows,
        .prefetch = phi_default_tuning().prefetch[type][phi_batch_class_of(n_tokens)],
        .max_small_batch = PHI_MAX_SMALL_BATCH,
    };
    (strcmp(arguments[3], "packed") == 0 ? k->matmul_packed : k->matmul)[type](&m);
    return 0;
}
