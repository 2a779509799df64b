/* Packing: the bytes of every packed type against a list of its fields, and phi_pack with several matrices, threads and
 * sources. */
#define _DEFAULT_SOURCE /* fileno */
#include "kernels/generic/pack.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "check.h"

/* A field of a block: n_bytes in elements of element_bytes. Element i of row r is stored at byte
 * unit_offset + i * unit_stride + r * element_bytes of a unit. */
typedef struct {
    size_t block_offset, n_bytes, element_bytes, unit_offset, unit_stride;
} field;

enum { MAX_FIELDS = 9 };
#define AT(type, member) offsetof(phi_block_##type, member)
#define TO(type, member) offsetof(phi_panel_##type, member)

static const field fields[PHI_N_TYPES][MAX_FIELDS] = {
    [PHI_TYPE_Q4_0] = {{AT(q4_0, d), 2, 2, TO(q4_0, d), 0}, {AT(q4_0, qs), 16, 4, TO(q4_0, lines), 64}},
    [PHI_TYPE_Q4_1] = {{AT(q4_1, d), 2, 2, TO(q4_1, d), 0},
                       {AT(q4_1, m), 2, 2, TO(q4_1, m), 0},
                       {AT(q4_1, qs), 16, 4, TO(q4_1, lines), 64}},
    [PHI_TYPE_Q8_0] = {{AT(q8_0, d), 2, 2, TO(q8_0, d), 0}, {AT(q8_0, qs), 32, 4, TO(q8_0, lines), 64}},
    [PHI_TYPE_Q4_K] = {{AT(q4_k, d), 2, 2, TO(q4_k, d), 0},
                       {AT(q4_k, dmin), 2, 2, TO(q4_k, dmin), 0},
                       {AT(q4_k, scales), 12, 1, TO(q4_k, scales), 16},
                       {AT(q4_k, qs), 128, 4, TO(q4_k, lines), 64}},
    [PHI_TYPE_Q5_K] = {{AT(q5_k, d), 2, 2, TO(q5_k, d), 0},
                       {AT(q5_k, dmin), 2, 2, TO(q5_k, dmin), 0},
                       {AT(q5_k, scales), 12, 1, TO(q5_k, scales), 16},
                       {AT(q5_k, qh), 32, 4, TO(q5_k, first), 128},
                       {AT(q5_k, qs), 32, 4, TO(q5_k, first) + 64, 128},
                       {AT(q5_k, qs) + 32, 96, 4, TO(q5_k, rest), 64}},
    [PHI_TYPE_Q6_K] = {{AT(q6_k, d), 2, 2, TO(q6_k, d), 0},
                       {AT(q6_k, scales), 16, 1, TO(q6_k, scales), 16},
                       {AT(q6_k, qh), 32, 4, TO(q6_k, halves[0].first), 128},
                       {AT(q6_k, ql), 32, 4, TO(q6_k, halves[0].first) + 64, 128},
                       {AT(q6_k, ql) + 32, 32, 4, TO(q6_k, halves[0].second), 64},
                       {AT(q6_k, qh) + 32, 32, 4, TO(q6_k, halves[1].first), 128},
                       {AT(q6_k, ql) + 64, 32, 4, TO(q6_k, halves[1].first) + 64, 128},
                       {AT(q6_k, ql) + 96, 32, 4, TO(q6_k, halves[1].second), 64}},
};

/* panels [n_rows / 16, 16 * row_bytes], byte by byte; returns the number of bytes written. */
static size_t pack_by_fields(phi_type type, const uint8_t *rows, size_t n_rows, size_t row_bytes, uint8_t *panels) {
    const size_t block_bytes = (size_t)phi_types[type].block_bytes;
    size_t n_written = 0;
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t b = 0; b < row_bytes / block_bytes; b++) {
            const uint8_t *block = rows + r * row_bytes + b * block_bytes;
            uint8_t *unit = panels + r / 16 * 16 * row_bytes + b * 16 * block_bytes;
            for (const field *f = fields[type]; f->n_bytes; f++) {
                for (size_t i = 0; i < f->n_bytes; i++) {
                    const size_t element = i / f->element_bytes, byte = i % f->element_bytes;
                    unit[f->unit_offset + element * f->unit_stride + r % 16 * f->element_bytes + byte] =
                        block[f->block_offset + i];
                }
                n_written += f->n_bytes;
            }
        }
    }
    return n_written;
}

static void check_equal(const char *what, const phi_kernels *k, phi_type type, const uint8_t *got,
                        const uint8_t *expected, size_t n_bytes) {
    size_t i = 0;
    while (i < n_bytes && got[i] == expected[i]) i++;
    CHECK(i == n_bytes, "%s: %s %s: byte %zu of %zu is %d, expected %d", k->name, what, phi_types[type].name, i,
          n_bytes, got[i], expected[i]);
}

static uint8_t *random_bytes(generator *g, size_t n_bytes) {
    uint8_t *bytes = memory(n_bytes);
    for (size_t i = 0; i < n_bytes; i++) bytes[i] = (uint8_t)next_bits(g);
    return bytes;
}

/* Buffers of exact size, rows at even addresses, and any bytes: packing interprets none. */
static void check_panel(const phi_kernels *k, phi_type type, size_t n_blocks) {
    generator g = {(uint64_t)type * 100 + n_blocks};
    const size_t row_bytes = n_blocks * (size_t)phi_types[type].block_bytes, n_bytes = 16 * row_bytes;
    for (size_t offset = 0; offset <= 2; offset += 2) {
        uint8_t *rows = random_bytes(&g, offset + n_bytes);
        uint8_t *got = memory(n_bytes), *expected = memory(n_bytes);
        const size_t n_written = pack_by_fields(type, rows + offset, 16, row_bytes, expected);
        CHECK(n_written == n_bytes, "the fields of %s have %zu bytes, its panel %zu", phi_types[type].name, n_written,
              n_bytes);
        memset(got, 0xa5, n_bytes);
        k->pack[type](rows + offset, row_bytes, got);
        check_equal("panel of", k, type, got, expected, n_bytes);
        free(rows);
        free(got);
        free(expected);
    }
}

/* ---- phi_pack ---- */

enum { N_MATRICES = 6, FILE_OFFSET = 32 };

/* Three jobs of 4 MiB, panels that cross their borders, panels larger than a read of 256 KiB (Q8_0), a matrix that is
 * never packed (F32), and an unset one, as ffn.gate is with GELU. */
static const struct {
    phi_type type;
    int n_rows, n_cols;
} shapes[N_MATRICES] = {
    {PHI_TYPE_Q4_K, 48, 4096},  {PHI_TYPE_F32, 16, 64}, {PHI_TYPE_Q6_K, 2048, 5120},
    {PHI_TYPE_Q8_0, 32, 16384}, {PHI_TYPE_F32, 0, 0},   {PHI_TYPE_Q5_K, 16, 256},
};

typedef struct {
    phi_matrix matrices[N_MATRICES], *pointers[N_MATRICES];
    size_t rows_bytes, packed_bytes;
    uint8_t *rows, *packed, *expected;
} model;

static void make_model(const phi_kernels *k, model *m) {
    generator g = {7};
    *m = (model){0};
    for (int i = 0; i < N_MATRICES; i++)
        m->rows_bytes += (size_t)shapes[i].n_rows * phi_row_bytes(shapes[i].type, (size_t)shapes[i].n_cols);
    m->rows = random_bytes(&g, m->rows_bytes);
    m->expected = memory(m->rows_bytes);
    m->packed = memory(m->rows_bytes);
    size_t at = 0;
    for (int i = 0; i < N_MATRICES; i++) {
        phi_matrix *matrix = m->pointers[i] = &m->matrices[i];
        *matrix = (phi_matrix){
            .type = shapes[i].type, .n_rows = shapes[i].n_rows, .n_cols = shapes[i].n_cols, .data = m->rows + at};
        const size_t row_bytes = phi_row_bytes(matrix->type, (size_t)matrix->n_cols);
        if (phi_packed_bytes(k, matrix)) {
            pack_by_fields(matrix->type, matrix->data, (size_t)matrix->n_rows, row_bytes,
                           m->expected + m->packed_bytes);
            m->packed_bytes += phi_packed_bytes(k, matrix);
        }
        at += (size_t)matrix->n_rows * row_bytes;
    }
}

static void free_model(model *m) {
    free(m->rows);
    free(m->packed);
    free(m->expected);
}

static phi_packing packing_of(const phi_kernels *k, phi_pool *pool, model *m) {
    return (phi_packing){
        .kernels = k, .pool = pool, .matrices = m->pointers, .n_matrices = N_MATRICES, .memory = m->packed};
}

static void check_packing(const phi_kernels *k, model *m, const phi_packing *packing) {
    memset(m->packed, 0xa5, m->rows_bytes);
    CHECK(phi_pack(packing) == PHI_OK, "%s: packing failed", k->name);
    check_equal("matrices from", k, m->matrices[0].type, m->packed, m->expected, m->packed_bytes);
    const uint8_t *next = m->packed;
    for (int i = 0; i < N_MATRICES; i++) {
        const bool is_packed = phi_packed_bytes(k, &m->matrices[i]) > 0;
        CHECK(m->matrices[i].layout == (is_packed ? PHI_LAYOUT_PANELS : PHI_LAYOUT_ROWS), "%s: matrix %d has layout %d",
              k->name, i, (int)m->matrices[i].layout);
        if (is_packed) CHECK(m->matrices[i].data == next, "%s: matrix %d is not at its packed bytes", k->name, i);
        if (is_packed) next += phi_packed_bytes(k, &m->matrices[i]);
    }
}

static void check_threads(const phi_kernels *k, int n_threads) {
    phi_pool *pool;
    model m;
    CHECK(phi_pool_create(n_threads, &pool) == PHI_OK, "no pool of %d threads", n_threads);
    make_model(k, &m);
    const phi_packing packing = packing_of(k, pool, &m);
    check_packing(k, &m, &packing);
    free_model(&m);
    phi_pool_free(pool);
}

static bool cancel(void *context) {
    ++*(int *)context;
    return true;
}

static void check_cancel(const phi_kernels *k) {
    phi_pool *pool;
    model m;
    int n_polls = 0;
    CHECK(phi_pool_create(1, &pool) == PHI_OK, "no pool");
    make_model(k, &m);
    phi_packing packing = packing_of(k, pool, &m);
    packing.poll = cancel, packing.poll_context = &n_polls;
    memset(m.packed, 0xa5, m.rows_bytes);
    const phi_status status = phi_pack(&packing);
    CHECK(status == PHI_CANCELLED && n_polls == 1, "status %d after %d polls", (int)status, n_polls);
    for (int i = 0; i < N_MATRICES; i++)
        CHECK(m.matrices[i].layout == PHI_LAYOUT_ROWS, "matrix %d of a cancelled run has layout %d", i,
              (int)m.matrices[i].layout);
    CHECK(memcmp(m.packed, m.expected, m.packed_bytes) != 0, "a cancelled run packed all matrices");
    free_model(&m);
    phi_pool_free(pool);
}

/* The file's bytes are those that are packed: where it can be read, the mapping may differ. */
static void check_file(const phi_kernels *k) {
#ifndef _WIN32
    phi_pool *pool;
    model m;
    CHECK(phi_pool_create(2, &pool) == PHI_OK, "no pool");
    for (int is_short = 0; is_short < 2; is_short++) {
        make_model(k, &m);
        FILE *file = tmpfile();
        CHECK(file != NULL, "no temporary file");
        fseek(file, FILE_OFFSET, SEEK_SET);
        const size_t n_bytes = is_short ? m.rows_bytes / 2 : m.rows_bytes;
        CHECK(fwrite(m.rows, 1, n_bytes, file) == n_bytes && fflush(file) == 0, "the file was not written");
        phi_packing packing = packing_of(k, pool, &m);
        packing.source = (phi_pack_source){m.rows, m.rows_bytes, FILE_OFFSET, fileno(file)};
        /* A file that ends early is read through the mapping from there on; otherwise the mapping is not read. */
        const size_t first_packed = (size_t)shapes[0].n_rows * phi_row_bytes(shapes[0].type, (size_t)shapes[0].n_cols);
        memset(m.rows, 0, is_short ? first_packed : m.rows_bytes);
        check_packing(k, &m, &packing);
        fclose(file);
        free_model(&m);
    }
    /* A matrix outside the mapping is read from memory. */
    make_model(k, &m);
    phi_packing packing = packing_of(k, pool, &m);
    packing.source = (phi_pack_source){m.packed, 64, 0, -1};
    check_packing(k, &m, &packing);
    free_model(&m);
    phi_pool_free(pool);
#else
    (void)k;
#endif
}

void test_pack(const phi_kernels *k) {
    static const size_t block_counts[] = {1, 2, 3, 5, 32};
    bool packs = false;
    for (phi_type type = 0; type < PHI_N_TYPES; type++) {
        if (!k->pack[type]) continue;
        packs = true;
        for (size_t i = 0; i < sizeof block_counts / sizeof *block_counts; i++) check_panel(k, type, block_counts[i]);
    }
    if (!packs) return;
    check_threads(k, 1);
    check_threads(k, 3);
    check_cancel(k);
    check_file(k);
}
