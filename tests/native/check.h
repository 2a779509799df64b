/* Helpers of the C tests: checks that end the program, a random generator with the same numbers on every platform, and
 * buffers of exact size, so that a sanitizer detects an access that is off by one. */
#ifndef PHI_TESTS_CHECK_H
#define PHI_TESTS_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

#ifdef __MINGW32__
#include <stdio.h>
#define PHI_PRINTF(text, first) __attribute__((format(__MINGW_PRINTF_FORMAT, text, first)))
#elif defined(__GNUC__)
#define PHI_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define PHI_PRINTF(text, first)
#endif

/* Prints the message and ends the program with status 1. */
_Noreturn void fail_at(const char *file, int line, const char *format, ...) PHI_PRINTF(3, 4);

/* The other arguments are a printf format and its values, evaluated on failure only: what was expected and found. */
#define CHECK(condition, ...) ((condition) ? (void)n_checks++ : fail_at(__FILE__, __LINE__, __VA_ARGS__))
extern size_t n_checks;

/* Allocates memory, never NULL, to be freed by `free`. */
void *memory(size_t n_bytes);
float *floats(size_t n);

typedef struct {
    uint64_t state;
} generator;

uint64_t next_bits(generator *g);
int next_below(generator *g, int n);
float next_uniform(generator *g); /* [0, 1) */
float next_normal(generator *g);  /* approximately: the sum of twelve uniform numbers */

void fill_normal(generator *g, size_t n, float *x);
/* Activations with outlier channels, as models have them: 1 % of the columns are 100 times larger. */
void fill_spiky(generator *g, size_t n_tokens, size_t n_cols, float *x);

/* Whether two floats have the same bits, or both are NaN. */
bool same_float(float a, float b);
/* The first index at which a and b differ; n if they are equal. */
size_t first_difference(const float *a, const float *b, size_t n);
/* |got - expected| <= relative * |expected| + absolute */
bool near(float got, double expected, double relative, double absolute);

phi_q8 make_q8(size_t n);
void free_q8(phi_q8 q8);

/* A test group; it checks the kernels of one tier. */
typedef void (*test_fn)(const phi_kernels *k);
void test_dequantize(const phi_kernels *k);
void test_products(const phi_kernels *k);
void test_vectors(const phi_kernels *k);
void test_attention(const phi_kernels *k);
void test_forward(const phi_kernels *k);
void test_pack(const phi_kernels *k);
/* Not specific to a tier; k is NULL. */
void test_threads(const phi_kernels *k);
void test_fork(const phi_kernels *k);
void test_dispatch(const phi_kernels *k);

#endif
