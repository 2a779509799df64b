/* Quantisation of float32 rows: one function per tensor type. */
#ifndef PHI_QUANTIZE_H
#define PHI_QUANTIZE_H

#include <stddef.h>

/* x [n_cols]: finite weights. importance [n_cols]: factors of the squared errors, NULL: all 1. out: the blocks. */
typedef void (*phi_quantize_row)(const float *x, const float *importance, size_t n_cols, void *out);

void phi_quantize_row_q4_0(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q4_1(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q5_0(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q5_1(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q8_0(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q2_k(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q3_k(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q4_k(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q5_k(const float *x, const float *importance, size_t n_cols, void *out);
void phi_quantize_row_q6_k(const float *x, const float *importance, size_t n_cols, void *out);

#endif
