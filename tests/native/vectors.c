/* Kernels other than products and attention: quantisation, norms, activations, residual and RoPE. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

static const phi_kernels *scalar_tier(void) {
    const phi_kernels *scalar;
    CHECK(phi_select_kernels("scalar", &scalar) == PHI_OK, "the scalar tier is missing");
    return scalar;
}

/* ---- quantisation ---- */

static void check_q8_equals_scalar(const phi_kernels *k, const float *x, size_t n, const char *what) {
    const phi_q8 got = make_q8(n), expected = make_q8(n);
    k->quantize_q8(x, n, got);
    scalar_tier()->quantize_q8(x, n, expected);
    for (size_t i = 0; i < n; i++) {
        const size_t b = i / PHI_Q8_BLOCK, s = i / PHI_SUM_BLOCK;
        CHECK(got.quants[i] == expected.quants[i], "%s: quantize_q8 of %s: quant %zu is %d, scalar %d", k->name, what,
              i, got.quants[i], expected.quants[i]);
        CHECK(same_float(got.scales[b], expected.scales[b]) && same_float(got.sums[s], expected.sums[s]) &&
                  same_float(got.block_sums[b], expected.block_sums[b]),
              "%s: quantize_q8 of %s: scale or sums of block %zu differ from scalar", k->name, what, b);
        CHECK(got.offsets[s] == expected.offsets[s] && got.block_offsets[b] == expected.block_offsets[b],
              "%s: quantize_q8 of %s: offsets of block %zu differ from scalar", k->name, what, b);
    }
    free_q8(got);
    free_q8(expected);
}

/* Against the definition: the largest magnitude of a block becomes 127, and quants are rounded to nearest. */
static void check_q8_error(const phi_kernels *k, const float *x, size_t n) {
    const phi_q8 q8 = make_q8(n);
    k->quantize_q8(x, n, q8);
    for (size_t b = 0; b < n / PHI_Q8_BLOCK; b++) {
        int sum = 0;
        float largest = 0.0f;
        for (size_t i = b * PHI_Q8_BLOCK; i < (b + 1) * PHI_Q8_BLOCK; i++) {
            const double error = fabs((double)q8.scales[b] * q8.quants[i] - (double)x[i]);
            CHECK(error <= 0.5001 * (double)q8.scales[b] + 1e-40, "%s: quantize_q8: %g became %d * %g", k->name,
                  (double)x[i], q8.quants[i], (double)q8.scales[b]);
            largest = fmaxf(largest, fabsf(x[i]));
            sum += q8.quants[i];
        }
        CHECK(q8.scales[b] == largest / 127.0f, "%s: quantize_q8: the scale of block %zu is %g", k->name, b,
              (double)q8.scales[b]);
        CHECK(q8.block_offsets[b] == -128 * sum && q8.block_sums[b] == q8.scales[b] * (float)sum,
              "%s: quantize_q8: the sums of block %zu are wrong", k->name, b);
    }
    free_q8(q8);
}

static void test_quantize_q8(const phi_kernels *k) {
    enum { N = 512 };
    generator g = {5};
    float *x = floats(N);
    fill_spiky(&g, 1, N, x);
    check_q8_error(k, x, N);
    check_q8_equals_scalar(k, x, N, "activations with outliers");
    const float fills[] = {0.0f, -0.0f, 1e-42f, 1e-36f, 1e37f, -FLT_MAX, FLT_MIN, INFINITY, NAN};
    for (int i = 0; i < LENGTH(fills); i++) {
        for (int j = 0; j < N; j++) x[j] = j % 3 ? fills[i] : -fills[i];
        check_q8_equals_scalar(k, x, N, "numbers of equal magnitude");
        fill_spiky(&g, 1, N, x);
        for (int j = 0; j < N; j += 37) x[j] = fills[i];
        check_q8_equals_scalar(k, x, N, "activations with extreme values");
    }
    for (int i = 0; i < 2; i++) { /* NaN or infinity in a block must make its products NaN or infinite */
        const phi_q8 q8 = make_q8(N);
        fill_spiky(&g, 1, N, x);
        x[70] = i ? NAN : -INFINITY;
        k->quantize_q8(x, N, q8);
        for (int b = 0; b < N / PHI_Q8_BLOCK; b++)
            CHECK(isfinite(q8.scales[b]) == (b != 2), "%s: quantize_q8: the scale of block %d is %g", k->name, b,
                  (double)q8.scales[b]);
        free_q8(q8);
    }
    for (int i = 0; i < N; i++) x[i] = i % 32 ? ((float)(i % 32) + 0.5f) / 127.0f : 1.0f; /* ties round to even */
    check_q8_equals_scalar(k, x, N, "ties");
    free(x);
}

/* ---- norms, SiLU, GELU, residual ---- */

static void test_rms_norm(const phi_kernels *k) {
    const int sizes[] = {2, 7, 8, 15, 17, 64, 100, 3072};
    for (int i = 0; i < LENGTH(sizes); i++) {
        const size_t n = (size_t)sizes[i];
        generator g = {n};
        float *x = floats(n), *weight = floats(n), *y = floats(n);
        fill_spiky(&g, 1, n, x);
        fill_normal(&g, n, weight);
        k->rms_norm(x, weight, n, 1e-5f, y);
        double squares = 0.0;
        for (size_t j = 0; j < n; j++) squares += (double)x[j] * (double)x[j];
        const double inverse = 1.0 / sqrt(squares / (double)n + (double)1e-5f);
        for (size_t j = 0; j < n; j++) {
            const double exact = (double)x[j] * inverse * (double)weight[j];
            CHECK(near(y[j], exact, 1e-6, 0.0), "%s: rms_norm, n %zu: element %zu is %.9g, expected %.9g", k->name, n,
                  j, (double)y[j], exact);
        }
        free(x);
        free(weight);
        free(y);
    }
}

/* mean: added to all elements. A large mean must not reduce the precision of the result. */
static void check_layer_norm(const phi_kernels *k, size_t n, float mean) {
    generator g = {n};
    float *x = floats(n), *weight = floats(n), *bias = floats(n), *y = floats(n);
    double sum = 0.0, squares = 0.0;
    fill_spiky(&g, 1, n, x);
    fill_normal(&g, n, weight);
    fill_normal(&g, n, bias);
    for (size_t j = 0; j < n; j++) sum += (double)(x[j] += mean);
    for (size_t j = 0; j < n; j++) squares += ((double)x[j] - sum / (double)n) * ((double)x[j] - sum / (double)n);
    const double inverse = 1.0 / sqrt(squares / (double)n + (double)1e-5f);
    /* The mean is rounded to a float before it is subtracted. */
    const double mean_error = fabs(sum / (double)n) * (double)FLT_EPSILON * inverse;
    k->layer_norm(x, weight, bias, n, 1e-5f, y);
    for (size_t j = 0; j < n; j++) {
        const double scaled = ((double)x[j] - sum / (double)n) * inverse, w = fabs((double)weight[j]);
        const double exact = scaled * (double)weight[j] + (double)bias[j];
        const double limit = 1e-6 * (fabs(scaled) * w + fabs((double)bias[j])) + mean_error * w;
        CHECK(near(y[j], exact, 0.0, limit), "%s: layer_norm, n %zu, mean %g: element %zu is %.9g, expected %.9g",
              k->name, n, (double)mean, j, (double)y[j], exact);
    }
    free(x);
    free(weight);
    free(bias);
    free(y);
}

static void test_layer_norm(const phi_kernels *k) {
    const int sizes[] = {1, 2, 3, 4, 7, 8, 15, 17, 64, 100, 2560};
    for (int i = 0; i < LENGTH(sizes); i++) {
        check_layer_norm(k, (size_t)sizes[i], 3.0f);
        check_layer_norm(k, (size_t)sizes[i], 1000.0f);
    }
    const float zeros[9] = {0}, bias[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    float y[9];
    k->layer_norm(zeros, bias, bias, 9, 1e-5f, y);
    CHECK(first_difference(y, bias, 9) == 9, "%s: layer_norm of zeros is not the bias", k->name);
}

static void test_gelu(const phi_kernels *k) {
    const int sizes[] = {1, 3, 4, 8, 13, 1000};
    for (int i = 0; i < LENGTH(sizes); i++) {
        const size_t n = (size_t)sizes[i];
        generator g = {n};
        float *x = floats(n), *y = floats(n);
        for (size_t j = 0; j < n; j++) x[j] = 3.0f * next_normal(&g);
        k->gelu(x, n, y);
        for (size_t j = 0; j < n; j++) {
            const double v = (double)x[j], u = 0.7978845608028654 * (v + 0.044715 * v * v * v);
            CHECK(near(y[j], v / (1.0 + exp(-2.0 * u)), 2e-5, 1e-30), "%s: gelu, n %zu: gelu(%.9g) is %.9g", k->name, n,
                  v, (double)y[j]);
        }
        k->gelu(x, n, x); /* in place */
        CHECK(first_difference(x, y, n) == n, "%s: gelu, n %zu: the result in place differs", k->name, n);
        free(x);
        free(y);
    }
    const float x[] = {0.0f, -0.0f, 1e-42f, 200.0f, -200.0f, 3e38f, -3e38f, INFINITY, NAN};
    float y[9];
    k->gelu(x, 9, y);
    CHECK(y[0] == 0.0f && y[1] == 0.0f && y[3] == 200.0f && y[5] == 3e38f && y[7] == INFINITY && isnan(y[8]) &&
              fabsf(y[4]) <= 1e-30f && fabsf(y[2]) <= 1e-42f && fabsf(y[6]) <= 1e-30f,
          "%s: gelu of extreme values is %g %g %g %g %g %g %g %g %g", k->name, (double)y[0], (double)y[1], (double)y[2],
          (double)y[3], (double)y[4], (double)y[5], (double)y[6], (double)y[7], (double)y[8]);
}

static void test_silu_mul(const phi_kernels *k) {
    const int sizes[] = {1, 3, 4, 8, 13, 100};
    for (int i = 0; i < LENGTH(sizes); i++) {
        const size_t n = (size_t)sizes[i];
        generator g = {n};
        float *gate = floats(n), *up = floats(n), *y = floats(n);
        fill_normal(&g, n, up);
        for (size_t j = 0; j < n; j++) gate[j] = j ? 20.0f * next_normal(&g) : -85.0f;
        k->silu_mul(gate, up, n, y);
        for (size_t j = 0; j < n; j++) {
            const double exact = (double)gate[j] / (1.0 + exp(-(double)gate[j])) * (double)up[j];
            CHECK(near(y[j], exact, 2e-6, 0.0), "%s: silu_mul, n %zu: element %zu is %.9g, expected %.9g", k->name, n,
                  j, (double)y[j], exact);
        }
        k->silu_mul(gate, up, n, gate); /* in place */
        CHECK(first_difference(gate, y, n) == n, "%s: silu_mul, n %zu: the result in place differs", k->name, n);
        free(gate);
        free(up);
        free(y);
    }
    const float gate[] = {0.0f, -0.0f, 1e-42f, 200.0f, -200.0f, 3e38f, INFINITY, NAN}, up[] = {1, 1, 1, 1, 1, 1, 1, 1};
    float y[8];
    k->silu_mul(gate, up, 8, y);
    CHECK(y[0] == 0.0f && y[1] == 0.0f && y[3] == 200.0f && y[5] == 3e38f && y[6] == INFINITY && isnan(y[7]) &&
              fabsf(y[4]) <= 1e-30f && fabsf(y[2]) <= 1e-42f,
          "%s: silu_mul of extreme values is %g %g %g %g %g %g %g %g", k->name, (double)y[0], (double)y[1],
          (double)y[2], (double)y[3], (double)y[4], (double)y[5], (double)y[6], (double)y[7]);
}

static void test_add(const phi_kernels *k) {
    const int sizes[] = {1, 3, 4, 7, 8, 15, 16, 17, 33, 100};
    for (int i = 0; i < LENGTH(sizes); i++) {
        const size_t n = (size_t)sizes[i];
        generator g = {n};
        float *x = floats(n), *y = floats(n), *expected = floats(n);
        fill_normal(&g, n, x);
        fill_normal(&g, n, y);
        x[0] = 1e-42f;
        x[n / 2] = INFINITY;
        y[n - 1] = NAN;
        for (size_t j = 0; j < n; j++) expected[j] = x[j] + y[j];
        k->add(x, n, y);
        CHECK(first_difference(y, expected, n) == n, "%s: add, n %zu: element %zu differs", k->name, n,
              first_difference(y, expected, n));
        free(x);
        free(y);
        free(expected);
    }
}

/* ---- RoPE: the bits of the scalar tier ---- */

static void check_rope(const phi_kernels *k, phi_rope_style style, int head_dim, int rope_dims) {
    generator g = {(uint64_t)(head_dim * 1000 + rope_dims)};
    const size_t n = (size_t)head_dim, n_freqs = (size_t)rope_dims / 2;
    float *x = floats(n), *before = floats(n), *expected = floats(n), *cos = floats(n_freqs), *sin = floats(n_freqs);
    fill_normal(&g, n, x);
    fill_normal(&g, n_freqs, cos);
    fill_normal(&g, n_freqs, sin);
    for (int special = 0; special < 2; special++) {
        memcpy(before, x, n * sizeof *x);
        memcpy(expected, x, n * sizeof *x);
        k->rope[style](x, rope_dims, cos, sin);
        scalar_tier()->rope[style](expected, rope_dims, cos, sin);
        CHECK(first_difference(x, expected, n) == n,
              "%s: rope, style %d, rope_dims %d, head_dim %d: element %zu differs from scalar", k->name, (int)style,
              rope_dims, head_dim, first_difference(x, expected, n));
        for (size_t i = 0; special == 0 && i < n_freqs; i++) {
            const size_t a = style == PHI_ROPE_NEOX ? i : 2 * i, b = style == PHI_ROPE_NEOX ? i + n_freqs : 2 * i + 1;
            const double exact_a = (double)before[a] * (double)cos[i] - (double)before[b] * (double)sin[i];
            const double exact_b = (double)before[b] * (double)cos[i] + (double)before[a] * (double)sin[i];
            CHECK(near(x[a], exact_a, 1e-5, 2e-6) && near(x[b], exact_b, 1e-5, 2e-6),
                  "%s: rope, style %d, rope_dims %d, head_dim %d: pair %zu is wrong", k->name, (int)style, rope_dims,
                  head_dim, i);
        }
        x[0] = NAN;
        x[rope_dims - 1] = INFINITY;
    }
    free(x);
    free(before);
    free(expected);
    free(cos);
    free(sin);
}

static void test_rope(const phi_kernels *k) {
    const int shapes[][2] = {{2, 2}, {20, 14}, {64, 64}, {80, 32}, {80, 40}, {96, 96}, {128, 98}};
    for (int i = 0; i < LENGTH(shapes); i++) {
        check_rope(k, PHI_ROPE_NEOX, shapes[i][0], shapes[i][1]);
        check_rope(k, PHI_ROPE_INTERLEAVED, shapes[i][0], shapes[i][1]);
    }
}

void test_vectors(const phi_kernels *k) {
    test_quantize_q8(k);
    test_rms_norm(k);
    test_layer_norm(k);
    test_silu_mul(k);
    test_gelu(k);
    test_add(k);
    test_rope(k);
}
