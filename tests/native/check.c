#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"

size_t n_checks;

_Noreturn void fail_at(const char *file, int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fprintf(stderr, "FAILED %s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

void *memory(size_t n_bytes) {
    void *p = malloc(n_bytes ? n_bytes : 1);
    if (!p) fail_at(__FILE__, __LINE__, "malloc of %zu bytes failed", n_bytes);
    return p;
}

float *floats(size_t n) { return memory(n * sizeof(float)); }

/* splitmix64 (Steele, Lea and Flood, 2014) */
uint64_t next_bits(generator *g) {
    uint64_t z = g->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int next_below(generator *g, int n) { return (int)(next_bits(g) >> 33) % n; }
float next_uniform(generator *g) { return (float)(next_bits(g) >> 40) * 0x1p-24f; }

float next_normal(generator *g) {
    float sum = -6.0f;
    for (int i = 0; i < 12; i++) sum += next_uniform(g);
    return sum;
}

void fill_normal(generator *g, size_t n, float *x) {
    for (size_t i = 0; i < n; i++) x[i] = next_normal(g);
}

void fill_spiky(generator *g, size_t n_tokens, size_t n_cols, float *x) {
    fill_normal(g, n_tokens * n_cols, x);
    for (size_t i = 0; i < n_cols / 100 + 1; i++) {
        const size_t channel = (size_t)next_below(g, (int)n_cols);
        for (size_t t = 0; t < n_tokens; t++) x[t * n_cols + channel] *= 100.0f;
    }
}

bool same_float(float a, float b) { return phi_bits_from_float(a) == phi_bits_from_float(b) || (isnan(a) && isnan(b)); }

size_t first_difference(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (!same_float(a[i], b[i])) return i;
    }
    return n;
}

bool near(float got, double expected, double relative, double absolute) {
    return fabs((double)got - expected) <= relative * fabs(expected) + absolute;
}

phi_q8 make_q8(size_t n) {
    return (phi_q8){
        .quants = memory(n),
        .scales = floats(n / PHI_Q8_BLOCK),
        .sums = floats(n / PHI_SUM_BLOCK),
        .block_sums = floats(n / PHI_Q8_BLOCK),
        .offsets = memory(n / PHI_SUM_BLOCK * sizeof(int32_t)),
        .block_offsets = memory(n / PHI_Q8_BLOCK * sizeof(int32_t)),
    };
}

void free_q8(phi_q8 q8) {
    free(q8.quants);
    free(q8.scales);
    free(q8.sums);
    free(q8.block_sums);
    free(q8.offsets);
    free(q8.block_offsets);
}
