/* Rows of weights of every type: random ones, and extreme values of every field. */
#ifndef PHI_TESTS_WEIGHTS_H
#define PHI_TESTS_WEIGHTS_H

#include "check.h"

typedef enum {
    WEIGHTS_RANDOM,   /* random quants and sub-block scales, moderate block scales */
    WEIGHTS_EXTREME,  /* all bytes of a row equal, scales of both signs */
    WEIGHTS_ANY_SIZE, /* block scales from the smallest subnormal half to the largest half */
    WEIGHTS_TRAINED,  /* about 1/16 each: a product over 256 columns keeps the magnitude of its input */
    N_WEIGHT_KINDS
} weight_kind;

extern const char *const weight_kind_names[N_WEIGHT_KINDS];

/* rows [n_rows, phi_row_bytes] */
void fill_rows(generator *g, phi_type type, weight_kind kind, size_t n_rows, size_t n_cols, uint8_t *rows);

#endif
