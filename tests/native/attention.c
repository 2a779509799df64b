/* store_kv and attention, over pages in random order whose unused slots hold NaN. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "half.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))
enum { N_QUERIES = 3 };

static const char *const kv_names[PHI_N_KV_TYPES] = {"f16", "q8"};

/* ---- store_kv: the same bytes as the scalar tier ---- */

static void check_store(const phi_kernels *k, phi_kv_type type, int head_dim, int slot, int special) {
    static const float specials[] = {0.0f,     1e-42f, 6e-8f, -2.9e-8f, 6.1e-5f,   65504.0f, 65519.9f,
                                     65520.0f, -1e30f, 1e-9f, INFINITY, -INFINITY, NAN};
    const size_t n = (size_t)head_dim, page_bytes = phi_kv_slice_bytes(type, head_dim);
    const phi_kernels *scalar;
    CHECK(phi_select_kernels("scalar", &scalar) == PHI_OK, "the scalar tier is missing");
    generator g = {(uint64_t)(head_dim * 100 + slot)};
    float *key = floats(n), *value = floats(n);
    uint8_t *page = memory(page_bytes), *expected = memory(page_bytes);
    fill_spiky(&g, 1, n, key);
    fill_spiky(&g, 1, n, value);
    for (size_t i = 0; i < n; i++) {
        if (special == LENGTH(specials)) key[i] = value[i] = specials[i % LENGTH(specials)];
    }
    if (special < LENGTH(specials)) key[0] = value[n - 1] = specials[special];
    memset(page, 0xff, page_bytes);
    memset(expected, 0xff, page_bytes);
    k->store_kv[type](key, value, head_dim, slot, page);
    scalar->store_kv[type](key, value, head_dim, slot, expected);
    for (size_t i = 0; i < page_bytes; i++) {
        CHECK(page[i] == expected[i], "%s: store_kv %s, head_dim %d, slot %d: byte %zu is %d, scalar %d", k->name,
              kv_names[type], head_dim, slot, i, page[i], expected[i]);
    }
    free(key);
    free(value);
    free(page);
    free(expected);
}

static void test_store(const phi_kernels *k, phi_kv_type type) {
    const int head_dims[] = {2, 20, 64, 72, 80, 96, 128}, slots[] = {0, 5, 15, 16, 31};
    for (int d = 0; d < LENGTH(head_dims); d++) {
        for (int s = 0; s < LENGTH(slots); s++) {
            for (int special = 0; special < 14; special++) check_store(k, type, head_dims[d], slots[s], special);
        }
    }
}

/* ---- attention: against double precision, on the keys and values as stored ---- */

typedef struct {
    phi_kv_type type;
    int head_dim, n_positions;
    uint8_t *pages;
    int32_t *page_table;
    double *keys, *values; /* [n_positions, head_dim], as read back from the pages */
} cache;

static void read_back(cache *c, int position) {
    const size_t n = (size_t)c->head_dim, slot = (size_t)(position % PHI_PAGE_TOKENS), at = (size_t)position * n;
    const size_t page_bytes = phi_kv_slice_bytes(c->type, c->head_dim), n_blocks = phi_kv_blocks(c->head_dim);
    uint8_t *bytes = c->pages + (size_t)c->page_table[position / PHI_PAGE_TOKENS] * page_bytes;
    const phi_kv_slice page = phi_kv_slice_of(c->type, c->head_dim, bytes);
    for (size_t d = 0; d < n; d++) {
        const size_t key = (slot / PHI_KV_GROUP * n + d) * PHI_KV_GROUP + slot % PHI_KV_GROUP, value = slot * n + d;
        if (c->type == PHI_KV_F16) {
            c->keys[at + d] = (double)phi_half_to_float(((const uint16_t *)(const void *)page.keys)[key]);
            c->values[at + d] = (double)phi_half_to_float(((const uint16_t *)(const void *)page.values)[value]);
        } else {
            const size_t b = d / PHI_KV_BLOCK;
            c->keys[at + d] = ((const int8_t *)page.keys)[key] *
                              (double)phi_half_to_float(page.key_scales[b * PHI_PAGE_TOKENS + slot]);
            c->values[at + d] = ((const int8_t *)page.values)[value] *
                                (double)phi_half_to_float(page.value_scales[slot * n_blocks + b]);
        }
    }
}

static cache make_cache(const phi_kernels *k, generator *g, phi_kv_type type, int head_dim, int n_positions) {
    const size_t n = (size_t)head_dim, n_floats = (size_t)n_positions * n;
    const int n_pages = (n_positions + PHI_PAGE_TOKENS - 1) / PHI_PAGE_TOKENS;
    const size_t page_bytes = phi_kv_slice_bytes(type, head_dim);
    cache c = {
        .type = type,
        .head_dim = head_dim,
        .n_positions = n_positions,
        .pages = memory((size_t)n_pages * page_bytes),
        .page_table = memory((size_t)n_pages * sizeof(int32_t)),
        .keys = memory(n_floats * sizeof(double)),
        .values = memory(n_floats * sizeof(double)),
    };
    float *key = floats(n), *value = floats(n);
    memset(c.pages, 0xff, (size_t)n_pages * page_bytes);
    for (int i = 0; i < n_pages; i++) c.page_table[i] = i;
    for (int i = n_pages - 1; i > 0; i--) { /* a random order of pages */
        const int j = next_below(g, i + 1);
        const int32_t page = c.page_table[i];
        c.page_table[i] = c.page_table[j];
        c.page_table[j] = page;
    }
    for (int p = 0; p < n_positions; p++) {
        fill_normal(g, n, key);
        fill_normal(g, n, value);
        value[n / 2] *= 30.0f; /* an outlier channel */
        k->store_kv[type](key, value, head_dim, p % PHI_PAGE_TOKENS,
                          c.pages + (size_t)c.page_table[p / PHI_PAGE_TOKENS] * page_bytes);
        read_back(&c, p);
    }
    free(key);
    free(value);
    return c;
}

/* Makes a value infinite, as a store of numbers beyond the range of half precision does. */
static void make_value_infinite(cache *c, int position) {
    const size_t n = (size_t)c->head_dim, slot = (size_t)(position % PHI_PAGE_TOKENS),
                 n_blocks = phi_kv_blocks(c->head_dim);
    uint8_t *bytes =
        c->pages + (size_t)c->page_table[position / PHI_PAGE_TOKENS] * phi_kv_slice_bytes(c->type, c->head_dim);
    const phi_kv_slice page = phi_kv_slice_of(c->type, c->head_dim, bytes);
    uint16_t *halves =
        c->type == PHI_KV_F16 ? (uint16_t *)(void *)page.values + slot * n : page.value_scales + slot * n_blocks;
    for (size_t i = 0; i < (c->type == PHI_KV_F16 ? n : n_blocks); i++) halves[i] = 0x7c00;
}

static void free_cache(cache *c) {
    free(c->pages);
    free(c->page_table);
    free(c->keys);
    free(c->values);
}

/* The output for one query at a position. */
static void attend_exactly(const cache *c, const float *q, int position, int window, double scale, double *out) {
    const size_t n = (size_t)c->head_dim;
    const int first = phi_first_visible(position, window);
    double *scores = memory((size_t)(position + 1) * sizeof *scores), row_max = -INFINITY, row_sum = 0.0;
    for (int p = first; p <= position; p++) {
        scores[p] = 0.0;
        for (size_t d = 0; d < n; d++) scores[p] += (double)q[d] * c->keys[(size_t)p * n + d] * scale;
        row_max = fmax(row_max, scores[p]);
    }
    for (size_t d = 0; d < n; d++) out[d] = 0.0;
    for (int p = first; p <= position; p++) {
        const double weight = exp(scores[p] - row_max);
        for (size_t d = 0; d < n; d++) out[d] += weight * c->values[(size_t)p * n + d];
        row_sum += weight;
    }
    for (size_t d = 0; d < n; d++) out[d] /= row_sum;
    free(scores);
}

/* Tokens at positions query_start, query_start + 1, ..., in one call and one by one. Values after position
 * last_finite are infinite. */
static void check_attention(const phi_kernels *k, phi_kv_type type, int head_dim, int query_start, int n_tokens,
                            int window, int last_finite) {
    generator g = {(uint64_t)(query_start * 1000 + head_dim)};
    const size_t n = (size_t)head_dim, stride = N_QUERIES * n + 4, n_floats = (size_t)n_tokens * stride;
    cache c = make_cache(k, &g, type, head_dim, query_start + n_tokens);
    float *q = floats(n_floats), *out = floats(n_floats), *alone = floats(n_floats);
    float *scratch = floats(phi_attention_scratch_floats(head_dim));
    double *exact = memory(n * sizeof *exact);
    fill_normal(&g, n_floats, q);
    for (int p = last_finite + 1; p < c.n_positions; p++) make_value_infinite(&c, p);
    memset(scratch, 0xff, phi_attention_scratch_floats(head_dim) * sizeof *scratch);
    phi_attention a = {
        .q = q,
        .n_tokens = n_tokens,
        .n_queries = N_QUERIES,
        .head_dim = head_dim,
        .token_stride = stride,
        .pages = c.pages,
        .page_bytes = phi_kv_slice_bytes(type, head_dim),
        .page_table = c.page_table,
        .query_start = query_start,
        .window = window,
        .scale = 1.0f / sqrtf((float)head_dim),
        .scratch = scratch,
        .out = out,
    };
    k->attention[type](&a);
    a.n_tokens = 1;
    a.out = alone;
    for (int t = 0; t < n_tokens; t++) {
        a.q = q + (size_t)t * stride;
        a.query_start = query_start + t;
        k->attention[type](&a);
        for (size_t i = 0; i < N_QUERIES; i++) {
            const size_t at = (size_t)t * stride + i * n;
            attend_exactly(&c, q + at, query_start + t, window, (double)a.scale, exact);
            for (size_t d = 0; d < n && query_start + t <= last_finite; d++) {
                CHECK(near(out[at + d], exact[d], 2e-5, 6e-6),
                      "%s: attention %s, head_dim %d, window %d, token %d of %d at %d, query %zu, dimension %zu is "
                      "%.9g, expected %.9g",
                      k->name, kv_names[type], head_dim, window, t, n_tokens, query_start, i, d, (double)out[at + d],
                      exact[d]);
            }
            CHECK(first_difference(out + at, alone + i * n, n) == n,
                  "%s: attention %s, head_dim %d, window %d, token %d of %d at %d, query %zu differs from the token "
                  "computed alone",
                  k->name, kv_names[type], head_dim, window, t, n_tokens, query_start, i);
        }
    }
    free_cache(&c);
    free(q);
    free(out);
    free(alone);
    free(scratch);
    free(exact);
}

void test_attention(const phi_kernels *k) {
    const int head_dims[] = {2, 20, 64, 80, 96, 128}, windows[] = {0, 1, 40};
    const int tokens[][2] = {{0, 1},   {31, 1},   {32, 3},   {70, 8},
                             {100, 5}, {120, 13}, {150, 64}, {230, 32}}; /* query_start, n_tokens */
    for (phi_kv_type type = 0; type < PHI_N_KV_TYPES; type++) {
        test_store(k, type);
        for (int d = 0; d < LENGTH(head_dims); d++) {
            for (int w = 0; w < LENGTH(windows); w++) {
                for (int t = 0; t < LENGTH(tokens); t++) {
                    const int query_start = tokens[t][0], n_tokens = tokens[t][1];
                    check_attention(k, type, head_dims[d], query_start, n_tokens, windows[w], query_start + n_tokens);
                    check_attention(k, type, head_dims[d], query_start, n_tokens, windows[w],
                                    query_start + n_tokens / 2);
                }
            }
        }
    }
}
