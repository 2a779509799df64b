/* Fuzzes weights. A matrix of arbitrary bytes, infinite and NaN scales included, is dequantised, packed, multiplied and
 * requantised, on one tier or on all available ones.
 *
 * Checked:
 * - Dequantised values have the scalar tier's bits.
 * - A batch has the bits of its tokens one by one.
 * - With finite weights, a product is exact within float rounding. If the exact product is infinite or NaN, the result
 * is infinite or NaN.
 * - Quantising finite numbers gives finite weights. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "input.h"
#include "kernels/generic/unpack.h"

enum { MAX_TOKENS = 20 };

typedef struct {
    phi_type type;
    int n_rows, n_cols, n_tokens;
    size_t row_bytes;
    uint8_t *memory, *rows; /* rows [n_rows, row_bytes], in memory, at any even address */
    float *x;               /* [n_tokens, n_cols], finite */
    float *values;          /* [n_rows, n_cols]: the dequantised weights */
    double *magnitudes;     /* [n_rows, n_cols]: of the terms that a weight is computed from */
} matrix;

typedef void (*unpack_fn)(const void *block, phi_unpacked *u);

/* range: the number of values of a quant before its offset is subtracted. */
static const struct {
    unpack_fn unpack;
    double range;
} unpackers[PHI_N_TYPES] = {
    [PHI_TYPE_Q4_0] = {phi_unpack_q4_0, 16},  [PHI_TYPE_Q4_1] = {phi_unpack_q4_1, 16},
    [PHI_TYPE_Q5_0] = {phi_unpack_q5_0, 32},  [PHI_TYPE_Q5_1] = {phi_unpack_q5_1, 32},
    [PHI_TYPE_Q8_0] = {phi_unpack_q8_0, 256}, [PHI_TYPE_Q2_K] = {phi_unpack_q2_k, 4},
    [PHI_TYPE_Q3_K] = {phi_unpack_q3_k, 8},   [PHI_TYPE_Q4_K] = {phi_unpack_q4_k, 16},
    [PHI_TYPE_Q5_K] = {phi_unpack_q5_k, 32},  [PHI_TYPE_Q6_K] = {phi_unpack_q6_k, 64},
};

static void compute_magnitudes(const matrix *m) {
    const size_t n = (size_t)m->n_rows * (size_t)m->n_cols, block = (size_t)phi_types[m->type].block_elements;
    phi_unpacked u;
    for (size_t i = 0; i < n; i++) {
        if (!unpackers[m->type].unpack) {
            m->magnitudes[i] = fabs((double)m->values[i]);
            continue;
        }
        if (i % block == 0) unpackers[m->type].unpack(m->rows + i / block * (size_t)phi_types[m->type].block_bytes, &u);
        const size_t group = i % block / PHI_SUM_BLOCK;
        m->magnitudes[i] = unpackers[m->type].range * fabs((double)u.scale[group]) + fabs((double)u.min[group]);
    }
}

static matrix read_matrix(input *in, const phi_kernels *scalar) {
    static const float steps[] = {0.0f, 1.0f, -1.0f, 0.5f, 1e-20f, 1e-38f, 100.0f, -3e4f};
    matrix m = {.type = (phi_type)pick(in, 0, PHI_N_TYPES - 1)};
    const int block = phi_types[m.type].block_elements;
    m.n_rows = pick(in, 1, 33);
    m.n_cols = block * pick(in, 1, block == 1 ? 256 : block == 32 ? 9 : 3);
    m.n_tokens = pick(in, 1, MAX_TOKENS);
    const size_t offset = 2 * (size_t)pick(in, 0, 3), first = in->at;
    const size_t n_rows = (size_t)m.n_rows, n_cols = (size_t)m.n_cols, n_tokens = (size_t)m.n_tokens;
    m.row_bytes = phi_row_bytes(m.type, n_cols);
    m.memory = memory(n_rows * m.row_bytes + offset);
    m.rows = m.memory + offset;
    fill(in, first, n_rows * m.row_bytes, m.rows);
    generator g = {(uint64_t)m.n_rows};
    m.x = floats(n_tokens * n_cols);
    fill_spiky(&g, n_tokens, n_cols, m.x);
    for (size_t i = 0; i < n_tokens * n_cols; i++) {
        uint8_t byte;
        fill(in, first, 1, &byte);
        if (byte < 128) m.x[i] *= steps[byte % 8];
    }
    m.values = floats(n_rows * n_cols);
    m.magnitudes = memory(n_rows * n_cols * sizeof *m.magnitudes);
    for (size_t r = 0; r < n_rows; r++)
        scalar->dequantize[m.type](m.rows + r * m.row_bytes, n_cols, m.values + r * n_cols);
    compute_magnitudes(&m);
    return m;
}

static void check_dequantized(const phi_kernels *k, const matrix *m) {
    float *y = floats((size_t)m->n_cols);
    for (size_t r = 0; r < (size_t)m->n_rows; r++) {
        k->dequantize[m->type](m->rows + r * m->row_bytes, (size_t)m->n_cols, y);
        const size_t at = first_difference(y, m->values + r * (size_t)m->n_cols, (size_t)m->n_cols);
        CHECK(at == (size_t)m->n_cols, "%s: dequantised %s: row %zu, column %zu differs from scalar", k->name,
              phi_types[m->type].name, r, at);
    }
    free(y);
}

/* Compares a product with the exact one, computed in double precision. */
static void check_product(const phi_kernels *k, const matrix *m, const phi_activations *x, bool packed, size_t r,
                          size_t t, float got) {
    const bool quantised = phi_types[m->type].activation_format == PHI_ACTIVATION_Q8;
    double sum = 0.0, magnitude = 0.0;
    for (size_t i = 0; i < (size_t)m->n_cols; i++) {
        const size_t at = t * (size_t)m->n_cols + i, w = r * (size_t)m->n_cols + i;
        const double value =
            quantised ? (double)x->q8.scales[at / PHI_Q8_BLOCK] * x->q8.quants[at] : (double)x->f32[at];
        sum += (double)m->values[w] * value;
        /* Sums of quants, which minima and offsets are multiplied with, are rounded too. */
        magnitude += m->magnitudes[w] * (quantised ? 127.0 * (double)x->q8.scales[at / PHI_Q8_BLOCK] : fabs(value));
    }
    if (!(magnitude <= DBL_MAX)) { /* not isfinite: MinGW's header warns about it */
        CHECK(fabs(sum) <= DBL_MAX || !isfinite(got), "%s: %s %s: row %zu, token %zu is %g, expected %g", k->name,
              packed ? "packed" : "row-major", phi_types[m->type].name, r, t, (double)got, sum);
    } else if (magnitude < 1e37) { /* else a partial sum may be infinite */
        CHECK(fabs((double)got - sum) <= 2e-6 * magnitude + 1e-12,
              "%s: %s %s: row %zu, token %zu is %.9g, expected %.9g +- %.3g", k->name, packed ? "packed" : "row-major",
              phi_types[m->type].name, r, t, (double)got, sum, 2e-6 * magnitude + 1e-12);
    }
}

static void check_products(const phi_kernels *k, const matrix *m, const phi_activations *x, const uint8_t *panels) {
    const bool packed = panels != NULL;
    const bool is_tiled = packed && x->tiled.tiles && strcmp(phi_matmul_tier(k->name, m->type), k->name) == 0;
    const size_t n_rows = (size_t)m->n_rows, n_tokens = (size_t)m->n_tokens;
    float *together = floats(n_tokens * n_rows), *alone = floats(n_rows);
    phi_matmul product = {.rows = packed ? panels : m->rows,
                          .row_bytes = m->row_bytes,
                          .n_rows = m->n_rows,
                          .n_cols = m->n_cols,
                          .x = x,
                          .n_tokens = m->n_tokens,
                          .out = together,
                          .out_stride = n_rows,
                          .prefetch = phi_default_tuning().prefetch[m->type][PHI_BATCH_16],
                          .max_small_batch = PHI_MAX_SMALL_BATCH};
    void (*multiply)(const phi_matmul *) = (packed ? k->matmul_packed : k->matmul)[m->type];
    multiply(&product);
    product.n_tokens = 1;
    product.out = alone;
    for (size_t t = 0; t < n_tokens; t++) {
        product.first_token = (int)t;
        multiply(&product);
        for (size_t r = 0; r < n_rows; r++) {
            check_product(k, m, x, packed, r, t, alone[r]);
            if (is_tiled) continue; /* rounds differently in a batch */
            CHECK(same_float(together[t * n_rows + r], alone[r]),
                  "%s: %s %s: row %zu, token %zu is %.9g in a batch of %zu, %.9g alone", k->name,
                  packed ? "packed" : "row-major", phi_types[m->type].name, r, t, (double)together[t * n_rows + r],
                  n_tokens, (double)alone[r]);
        }
    }
    free(together);
    free(alone);
}

static void check_tier(const phi_kernels *k, const matrix *m) {
    const size_t n_tokens = (size_t)m->n_tokens, n_cols = (size_t)m->n_cols, n = n_tokens * n_cols;
    phi_activations x = {.n_cols = m->n_cols, .f32 = m->x};
    if (n_cols % PHI_Q8_BLOCK == 0) {
        x.q8 = make_q8(n);
        k->quantize_q8(m->x, n, x.q8);
    }
    if (k->quantize_tiled && n_cols % PHI_TILED_BLOCK == 0 && m->n_tokens > k->max_exact_batch) {
        x.tiled = (phi_tiled){
            .tiles = memory(phi_tiled_bytes(n_tokens, n_cols)),
            .scales = floats(phi_tiled_n_scales(n_tokens, n_cols)),
            .n_tokens = phi_tiled_tokens(n_tokens),
        };
        memset(x.tiled.tiles, 127, phi_tiled_bytes(n_tokens, n_cols));
        for (size_t t = 0; t < n_tokens; t++) k->quantize_tiled(m->x + t * n_cols, n_cols, &x.tiled, t);
    }
    check_dequantized(k, m);
    check_products(k, m, &x, NULL);
    if (k->pack[m->type] && m->n_rows % PHI_PANEL_ROWS == 0) {
        uint8_t *panels = memory((size_t)m->n_rows * m->row_bytes);
        for (size_t r = 0; r < (size_t)m->n_rows; r += PHI_PANEL_ROWS)
            k->pack[m->type](m->rows + r * m->row_bytes, m->row_bytes, panels + r * m->row_bytes);
        check_products(k, m, &x, panels);
        free(panels);
    }
    if (x.q8.quants) free_q8(x.q8);
    free(x.tiled.tiles);
    free(x.tiled.scales);
}

/* Requantises rows, finite ones only, as `phi-c quantize` does. At most two, since it is slow. */
static void check_quantized(const phi_kernels *scalar, const matrix *m, phi_pool *pool, phi_type target) {
    const size_t n_rows = m->n_rows < 2 ? 1 : 2, n_cols = (size_t)m->n_cols;
    if (n_cols % (size_t)phi_types[target].block_elements != 0) return;
    for (size_t i = 0; i < n_rows * n_cols; i++) {
        if (!isfinite(m->values[i])) return;
    }
    uint8_t *rows = memory(n_rows * phi_row_bytes(target, n_cols));
    float *importance = floats(n_cols), *y = floats(n_cols);
    for (size_t i = 0; i < n_cols; i++) importance[i] = fabsf(m->x[i]);
    for (int weighted = 0; weighted < 2; weighted++) {
        CHECK(phi_quantize_rows(pool, target, m->values, n_rows, n_cols, weighted ? importance : NULL, rows) == PHI_OK,
              "phi_quantize_rows failed");
        for (size_t r = 0; r < n_rows; r++) {
            scalar->dequantize[target](rows + r * phi_row_bytes(target, n_cols), n_cols, y);
            for (size_t i = 0; i < n_cols; i++)
                CHECK(isfinite(y[i]), "%g in %s became %g in %s", (double)m->values[r * n_cols + i],
                      phi_types[m->type].name, (double)y[i], phi_types[target].name);
        }
    }
    free(rows);
    free(importance);
    free(y);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes) {
    static phi_pool *pool;
    const phi_kernels *scalar, *k;
    if (!pool) CHECK(phi_pool_create(1, &pool) == PHI_OK, "phi_pool_create failed");
    CHECK(phi_select_kernels("scalar", &scalar) == PHI_OK, "the scalar tier is missing");
    input in = {bytes, n_bytes, 0};
    const int only = pick(&in, 0, 11); /* tier number, from 1; 0 or too large: all tiers */
    const bool quantises = pick(&in, 0, 3) == 0;
    const phi_type target = (phi_type)pick(&in, 0, PHI_N_TYPES - 1);
    matrix m = read_matrix(&in, scalar);
    int n_tiers = 0;
    while (phi_tier_names()[n_tiers]) n_tiers++;
    for (int i = 0; i < n_tiers; i++) {
        const bool wanted = only == 0 || only > n_tiers || only == i + 1;
        if (wanted && phi_select_kernels(phi_tier_names()[i], &k) == PHI_OK) check_tier(k, &m);
    }
    if (quantises) check_quantized(scalar, &m, pool, target);
    free(m.memory);
    free(m.x);
    free(m.values);
    free(m.magnitudes);
    return 0;
}
