/* Packs rows of blocks into panels (pack.h): transposes dwords of quants and bytes of scales, 16 bytes at a time. The
 * same code serves every tier: reading and writing memory takes longer than wider vectors could save. */
#include "pack.h"

#include <string.h>

#include "../../blocks.h"
#include "bytes16.h"

/* Line i = dwords i of 16 rows. n_lines is a multiple of 4; strides are in bytes. */
static inline void pack_lines(const uint8_t *quants, size_t row_bytes, size_t n_lines, uint8_t *lines,
                              size_t line_bytes) {
    for (size_t i = 0; i < n_lines; i += 4) {
        for (size_t r = 0; r < PHI_PANEL_ROWS; r += 4) {
            const uint8_t *from = quants + r * row_bytes + 4 * i;
            uint8_t *to = lines + i * line_bytes + 4 * r;
            const phi_bytes16 a = phi_load16(from), b = phi_load16(from + row_bytes);
            const phi_bytes16 c = phi_load16(from + 2 * row_bytes), d = phi_load16(from + 3 * row_bytes);
            const phi_bytes16 ab_low = phi_zip_low_32(a, b), ab_high = phi_zip_high_32(a, b);
            const phi_bytes16 cd_low = phi_zip_low_32(c, d), cd_high = phi_zip_high_32(c, d);
            phi_store16(to, phi_zip_low_64(ab_low, cd_low));
            phi_store16(to + line_bytes, phi_zip_high_64(ab_low, cd_low));
            phi_store16(to + 2 * line_bytes, phi_zip_low_64(ab_high, cd_high));
            phi_store16(to + 3 * line_bytes, phi_zip_high_64(ab_high, cd_high));
        }
    }
}

/* columns[i] = bytes i of 16 rows. */
static inline void load_columns(const uint8_t *bytes, size_t row_bytes, phi_bytes16 columns[16]) {
    phi_bytes16 zipped[16];
    for (size_t r = 0; r < 16; r++) columns[r] = phi_load16(bytes + r * row_bytes);
    for (int round = 0; round < 4; round++) {
        for (size_t i = 0; i < 8; i++) {
            zipped[2 * i] = phi_zip_low_8(columns[i], columns[i + 8]);
            zipped[2 * i + 1] = phi_zip_high_8(columns[i], columns[i + 8]);
        }
        memcpy(columns, zipped, sizeof zipped);
    }
}

/* Halves of 16 rows, whose bytes are two columns. */
static inline void store_halves(const phi_bytes16 columns[2], uint16_t halves[16]) {
    phi_store16(halves, phi_zip_low_8(columns[0], columns[1]));
    phi_store16(halves + 8, phi_zip_high_8(columns[0], columns[1]));
}

static inline void store_columns(const phi_bytes16 *columns, size_t n, void *to) {
    for (size_t i = 0; i < n; i++) phi_store16((uint8_t *)to + 16 * i, columns[i]);
}

/* Without vectors, since the first 16 bytes of these blocks hold quants as well. */
static inline void pack_halves(const uint16_t *half, size_t row_bytes, uint16_t halves[16]) {
    for (size_t r = 0; r < PHI_PANEL_ROWS; r++) memcpy(&halves[r], (const uint8_t *)half + r * row_bytes, 2);
}

/* Packs the blocks of 16 rows, which start row_bytes apart, into a unit. */

static inline void pack_unit_q4_0(const phi_block_q4_0 *b, size_t row_bytes, phi_panel_q4_0 *u) {
    pack_halves(&b->d, row_bytes, u->d);
    pack_lines(b->qs, row_bytes, 4, u->lines[0], 64);
}

static inline void pack_unit_q4_1(const phi_block_q4_1 *b, size_t row_bytes, phi_panel_q4_1 *u) {
    pack_halves(&b->d, row_bytes, u->d);
    pack_halves(&b->m, row_bytes, u->m);
    pack_lines(b->qs, row_bytes, 4, u->lines[0], 64);
}

static inline void pack_unit_q8_0(const phi_block_q8_0 *b, size_t row_bytes, phi_panel_q8_0 *u) {
    pack_halves(&b->d, row_bytes, u->d);
    pack_lines((const uint8_t *)b->qs, row_bytes, 8, u->lines[0], 64);
}

/* The scales with which the blocks of Q4_K and Q5_K begin. */
static inline void pack_k4_scales(const void *block, size_t row_bytes, uint16_t *d, uint16_t *dmin,
                                  uint8_t (*scales)[16]) {
    phi_bytes16 columns[16]; /* d, dmin, scales */
    load_columns((const uint8_t *)block, row_bytes, columns);
    store_halves(columns, d);
    store_halves(columns + 2, dmin);
    store_columns(columns + 4, 12, scales);
}

static inline void pack_unit_q4_k(const phi_block_q4_k *b, size_t row_bytes, phi_panel_q4_k *u) {
    pack_k4_scales(b, row_bytes, u->d, u->dmin, u->scales);
    pack_lines(b->qs, row_bytes, 32, u->lines[0], 64);
}

static inline void pack_unit_q5_k(const phi_block_q5_k *b, size_t row_bytes, phi_panel_q5_k *u) {
    pack_k4_scales(b, row_bytes, u->d, u->dmin, u->scales);
    pack_lines(b->qh, row_bytes, 8, u->first[0].high, sizeof u->first[0]);
    pack_lines(b->qs, row_bytes, 8, u->first[0].low, sizeof u->first[0]);
    pack_lines(b->qs + 32, row_bytes, 24, u->rest[0], 64);
}

static inline void pack_unit_q6_k(const phi_block_q6_k *b, size_t row_bytes, phi_panel_q6_k *u) {
    phi_bytes16 columns[16];
    load_columns((const uint8_t *)b->scales, row_bytes, columns);
    pack_halves(&b->d, row_bytes, u->d);
    store_columns(columns, 16, u->scales);
    for (size_t h = 0; h < 2; h++) {
        pack_lines(b->qh + 32 * h, row_bytes, 8, u->halves[h].first[0].high, sizeof u->halves[h].first[0]);
        pack_lines(b->ql + 64 * h, row_bytes, 8, u->halves[h].first[0].low, sizeof u->halves[h].first[0]);
        pack_lines(b->ql + 64 * h + 32, row_bytes, 8, u->halves[h].second[0], 64);
    }
}

#define PHI_DEFINE(UPPER, type)                                                                                     \
    static_assert(sizeof(phi_panel_##type) == PHI_PANEL_ROWS * sizeof(phi_block_##type),                            \
                  "a panel has the size of its rows");                                                              \
    void phi_pack_##type(const uint8_t *rows, size_t row_bytes, uint8_t *panel) {                                   \
        phi_panel_##type *units = (void *)panel;                                                                    \
        const phi_block_##type *blocks = (const void *)rows;                                                        \
        for (size_t i = 0; i < row_bytes / sizeof *blocks; i++) pack_unit_##type(&blocks[i], row_bytes, &units[i]); \
    }
PHI_PACKED_TYPES(PHI_DEFINE)
