/* Dequantisation and matrix products of every type, in rows and in panels, with numbers of rows and tokens around the
 * block sizes of the kernels. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "weights.h"

enum { MAX_ROWS = 48, MAX_TOKENS = 33, COLS = 768, FIRST_TOKEN = 3, OUT_STRIDE = MAX_ROWS + 5 };

static const int row_counts[] = {1, 2, 15, 16, 17, 33}, panel_row_counts[] = {16, 48};
static const int token_counts[] = {1, 2, 5, 16, 17, 33};
#define FOR_EACH(value, values) \
    for (const int *value = values; value < (values) + sizeof(values) / sizeof *(values); value++)

/* ---- dequantisation ---- */

/* FNV-1a hashes of 32 dequantised rows of 512 weights, random ones and extreme ones; the same on every platform. */
static const uint64_t dequantized_hashes[PHI_N_TYPES] = {
    [PHI_TYPE_F32] = 0x79c6b133e5a35891,  [PHI_TYPE_F16] = 0xdf85cb17328bdfa0,  [PHI_TYPE_BF16] = 0x6dd4e26912d96e35,
    [PHI_TYPE_Q4_0] = 0x625b8b04046605fe, [PHI_TYPE_Q4_1] = 0x39bcee2378ca694f, [PHI_TYPE_Q5_0] = 0x7b99b0a9a310dda3,
    [PHI_TYPE_Q5_1] = 0x69a7c0b239e70199, [PHI_TYPE_Q8_0] = 0x207221bfd6d6424e, [PHI_TYPE_Q2_K] = 0xbc5b9b5724ba686c,
    [PHI_TYPE_Q3_K] = 0xb9655faa39796eef, [PHI_TYPE_Q4_K] = 0x51ff2412cd61962c, [PHI_TYPE_Q5_K] = 0x235ec548323d0a6c,
    [PHI_TYPE_Q6_K] = 0xb28add13913436ae,
};

void test_dequantize(const phi_kernels *k) {
    enum { N = 512, ROWS = 32 };
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        generator g = {(uint64_t)phi_types[type].gguf_id};
        const size_t row_bytes = phi_row_bytes(type, N);
        uint8_t *row = memory(row_bytes + 2);
        float *y = floats(N);
        uint64_t hash = 0xcbf29ce484222325u;
        for (int r = 0; r < ROWS; r++) {
            uint8_t *at = row + r % 2 * 2; /* rows in a file have any even address */
            fill_rows(&g, type, r % 4 ? WEIGHTS_RANDOM : WEIGHTS_ANY_SIZE, 1, N, at);
            k->dequantize[type](at, N, y);
            for (size_t i = 0; i < N * sizeof *y; i++) hash = (hash ^ ((const uint8_t *)y)[i]) * 0x100000001b3u;
        }
        CHECK(hash == dequantized_hashes[type], "%s: dequantised %s has hash 0x%016llx, expected 0x%016llx", k->name,
              phi_types[type].name, (unsigned long long)hash, (unsigned long long)dequantized_hashes[type]);
        free(row);
        free(y);
    }
}

/* ---- products ---- */

/* Weights and activations of a type, and their exact product. */
typedef struct {
    phi_type type;
    weight_kind kind;
    uint8_t *rows, *panels;    /* [MAX_ROWS, row_bytes] */
    phi_activations x;         /* [FIRST_TOKEN + MAX_TOKENS, COLS] */
    double *exact, *tolerance; /* [MAX_TOKENS, MAX_ROWS] */
} product;

/* The activations in the AMX layout, which prefill products read; padding tokens are 127. */
static void make_tiled(const phi_kernels *k, phi_activations *x, size_t n_tokens) {
    x->tiled = (phi_tiled){
        .tiles = memory(phi_tiled_bytes(n_tokens, COLS)),
        .scales = floats(phi_tiled_n_scales(n_tokens, COLS)),
        .n_tokens = phi_tiled_tokens(n_tokens),
    };
    memset(x->tiled.tiles, 127, phi_tiled_bytes(n_tokens, COLS));
    for (size_t t = 0; t < n_tokens; t++) k->quantize_tiled(x->f32 + t * COLS, COLS, &x->tiled, t);
}

/* The product in double precision with the quantised activations, so that the kernel's error is that of summation in
 * float. The tolerance is relative to the sum of magnitudes, since terms can cancel. Minima and offsets are subtracted
 * as products of their own, so their magnitude is included. */
static void make_exact(product *p) {
    const bool quantised = phi_types[p->type].activation_format == PHI_ACTIVATION_Q8;
    const phi_kernels *scalar;
    CHECK(phi_select_kernels("scalar", &scalar) == PHI_OK, "the scalar tier is missing");
    float *w = floats(COLS);
    for (size_t r = 0; r < MAX_ROWS; r++) {
        double largest = 0.0;
        scalar->dequantize[p->type](p->rows + r * phi_row_bytes(p->type, COLS), COLS, w);
        for (size_t i = 0; i < COLS; i++) largest = fmax(largest, fabs((double)w[i]));
        for (size_t t = 0; t < MAX_TOKENS; t++) {
            double sum = 0.0, magnitude = 0.0, x_magnitude = 0.0;
            for (size_t i = 0; i < COLS; i++) {
                const size_t at = (FIRST_TOKEN + t) * COLS + i;
                const double x =
                    quantised ? (double)p->x.q8.scales[at / PHI_Q8_BLOCK] * p->x.q8.quants[at] : (double)p->x.f32[at];
                sum += (double)w[i] * x;
                magnitude += fabs((double)w[i] * x);
                x_magnitude += fabs(x);
            }
            p->exact[t * MAX_ROWS + r] = sum;
            p->tolerance[t * MAX_ROWS + r] = 2e-6 * (magnitude + (quantised ? x_magnitude * largest : 0.0)) + 1e-12;
        }
    }
    free(w);
}

static void make_activations(const phi_kernels *k, generator *g, weight_kind kind, phi_activations *x) {
    const size_t n_tokens = FIRST_TOKEN + MAX_TOKENS, n = n_tokens * COLS;
    *x = (phi_activations){.n_cols = COLS, .f32 = floats(n), .q8 = make_q8(n)};
    fill_spiky(g, n_tokens, COLS, x->f32);
    /* All quants are +-127: sums of pairs must not saturate. */
    for (size_t i = 0; kind == WEIGHTS_EXTREME && i < n; i++)
        x->f32[i] =
            (i / COLS % 4 == 1 || (i / COLS % 4 == 2 && i % 2) ? -1.0f : 1.0f) * (i / COLS % 4 == 3 ? 1e-30f : 1.0f);
    k->quantize_q8(x->f32, n, x->q8);
    if (k->quantize_tiled) make_tiled(k, x, n_tokens);
}

static product make_product(const phi_kernels *k, phi_type type, weight_kind kind) {
    generator g = {100 * (uint64_t)kind + (uint64_t)type};
    const size_t row_bytes = phi_row_bytes(type, COLS), n_bytes = MAX_ROWS * row_bytes;
    product p = {.type = type, .kind = kind, .rows = memory(n_bytes)};
    fill_rows(&g, type, kind, MAX_ROWS, COLS, p.rows);
    if (k->pack[type]) {
        p.panels = memory(n_bytes);
        for (size_t r = 0; r < MAX_ROWS; r += PHI_PANEL_ROWS)
            k->pack[type](p.rows + r * row_bytes, row_bytes, p.panels + r * row_bytes);
    }
    make_activations(k, &g, kind, &p.x);
    p.exact = memory(MAX_TOKENS * MAX_ROWS * sizeof *p.exact);
    p.tolerance = memory(MAX_TOKENS * MAX_ROWS * sizeof *p.tolerance);
    make_exact(&p);
    return p;
}

static void free_product(product *p) {
    free(p->rows);
    free(p->panels);
    free(p->x.f32);
    free_q8(p->x.q8);
    free(p->x.tiled.tiles);
    free(p->x.tiled.scales);
    free(p->exact);
    free(p->tolerance);
}

static void multiply(const phi_kernels *k, const product *p, bool packed, int first_token, int n_rows, int n_tokens,
                     float *out) {
    const phi_matmul m = {
        .rows = packed ? p->panels : p->rows,
        .row_bytes = phi_row_bytes(p->type, COLS),
        .n_rows = n_rows,
        .n_cols = COLS,
        .x = &p->x,
        .first_token = first_token,
        .n_tokens = n_tokens,
        .out = out,
        .out_stride = OUT_STRIDE,
        .prefetch = phi_default_tuning().prefetch[p->type][phi_batch_class_of(n_tokens)],
        .max_small_batch = PHI_MAX_SMALL_BATCH,
    };
    for (int i = 0; i < MAX_TOKENS * OUT_STRIDE; i++) out[i] = 12345.0f;
    (packed ? k->matmul_packed : k->matmul)[p->type](&m);
}

/* Tiled products, which round weights and activations differently: only their NMSE is checked. */
static void check_tiled(const phi_kernels *k, const product *p, int n_rows, int n_tokens, const float *out) {
    double error = 0.0, signal = 0.0;
    for (int t = 0; t < n_tokens; t++) {
        for (int r = 0; r < n_rows; r++) {
            const double exact = p->exact[t * MAX_ROWS + r], difference = (double)out[t * OUT_STRIDE + r] - exact;
            error += difference * difference;
            signal += exact * exact;
        }
    }
    CHECK(error <= 1e-3 * signal,
          "%s: packed %s, %s weights, %d rows, %d tokens: the squared error is %g, the squared signal %g", k->name,
          phi_types[p->type].name, weight_kind_names[p->kind], n_rows, n_tokens, error, signal);
}

/* alone [MAX_TOKENS, OUT_STRIDE]: products of single tokens with all rows. */
static void check_shape(const phi_kernels *k, const product *p, bool packed, int n_rows, int n_tokens,
                        const float *alone) {
    const char *layout = packed ? "packed" : "row-major", *type = phi_types[p->type].name,
               *kind = weight_kind_names[p->kind];
    const bool is_tiled = packed && k->max_exact_batch && n_tokens > k->max_exact_batch && k->quantize_tiled &&
                          strcmp(phi_matmul_tier(k->name, p->type), k->name) == 0;
    float *out = floats(MAX_TOKENS * OUT_STRIDE);
    multiply(k, p, packed, FIRST_TOKEN, n_rows, n_tokens, out);
    for (int t = 0; t < MAX_TOKENS; t++) {
        for (int r = 0; r < OUT_STRIDE; r++) {
            const float got = out[t * OUT_STRIDE + r];
            if (t >= n_tokens || r >= n_rows) {
                CHECK(got == 12345.0f, "%s: %s %s wrote outside its %d rows and %d tokens: row %d, token %d", k->name,
                      layout, type, n_rows, n_tokens, r, t);
                continue;
            }
            if (is_tiled) continue;
            const double exact = p->exact[t * MAX_ROWS + r], tolerance = p->tolerance[t * MAX_ROWS + r];
            CHECK(fabs((double)got - exact) <= tolerance,
                  "%s: %s %s, %s weights, %d rows, %d tokens: row %d, token %d is %.9g, expected %.9g +- %.3g", k->name,
                  layout, type, kind, n_rows, n_tokens, r, t, (double)got, exact, tolerance);
            CHECK(same_float(got, alone[t * OUT_STRIDE + r]),
                  "%s: %s %s, %s weights, %d rows, %d tokens: row %d, token %d is %.9g in the batch, %.9g alone",
                  k->name, layout, type, kind, n_rows, n_tokens, r, t, (double)got, (double)alone[t * OUT_STRIDE + r]);
        }
    }
    if (is_tiled) check_tiled(k, p, n_rows, n_tokens, out);
    free(out);
}

static void check_layout(const phi_kernels *k, const product *p, bool packed) {
    float *alone = floats(MAX_TOKENS * OUT_STRIDE), *one = floats(MAX_TOKENS * OUT_STRIDE);
    for (int t = 0; t < MAX_TOKENS; t++) {
        multiply(k, p, packed, FIRST_TOKEN + t, MAX_ROWS, 1, one);
        memcpy(alone + t * OUT_STRIDE, one, OUT_STRIDE * sizeof *one);
    }
    FOR_EACH(n_tokens, token_counts) {
        if (packed) {
            FOR_EACH(n_rows, panel_row_counts) check_shape(k, p, packed, *n_rows, *n_tokens, alone);
        } else {
            FOR_EACH(n_rows, row_counts) check_shape(k, p, packed, *n_rows, *n_tokens, alone);
        }
    }
    free(alone);
    free(one);
}

void test_products(const phi_kernels *k) {
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        for (weight_kind kind = 0; kind < N_WEIGHT_KINDS; kind++) {
            product p = make_product(k, type, kind);
            check_layout(k, &p, false);
            if (k->pack[type]) check_layout(k, &p, true);
            free_product(&p);
        }
    }
}
