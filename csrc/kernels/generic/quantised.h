/* The quantised types as X(type, elements per block), and their scalar kernels. */
#ifndef PHI_GENERIC_QUANTISED_H
#define PHI_GENERIC_QUANTISED_H

#include <float.h>
#include <math.h>

#include "../../kernels.h"

#define PHI_QUANTISED_TYPES(X) \
    X(q4_0, 32)                \
    X(q4_1, 32)                \
    X(q5_0, 32)                \
    X(q5_1, 32)                \
    X(q8_0, 32)                \
    X(q2_k, 256)               \
    X(q3_k, 256)               \
    X(q4_k, 256)               \
    X(q5_k, 256)               \
    X(q6_k, 256)

#define PHI_DECLARE(type, block)                                              \
    void phi_dequantize_##type##_scalar(const void *row, size_t n, float *y); \
    void phi_matmul_##type##_scalar(const phi_matmul *m);
PHI_QUANTISED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

void phi_quantize_q8_scalar(const float *x, size_t n, phi_q8 q8);

#endif
