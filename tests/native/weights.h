/* Rows of weights of every type: random ones, and such as stretch a field to its end. */
#ifndef PHI_TESTS_WEIGHTS_H
#define PHI_TESTS_WEIGHTS_H

#include "check.h"

typedef enum {
    WEIGHTS_RANDOM,   /* any quants and sub-block scales, block scales of a sane size */
    WEIGHTS_EXTREME,  /* every byte of a row the same, scales of both signs */
    WEIGHTS_ANY_SIZE, /* block scales from the smallest subnormal number to the largest half */
    WEIGHTS_TRAINED,  /* about 1/16 each: a product with 256 columns gives about what it is given */
    N_WEIGHT_KINDS
} weight_kind;

extern const char *const weight_kind_names[N_WEIGHT_KINDS];

/* rows [n_rows, phi_row_bytes] */
void fill_rows(generator *g, phi_type type, weight_kind kind, size_t n_rows, size_t n_cols, uint8_t *rows);

#endif
