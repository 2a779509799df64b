/* Packs rows of blocks into panels (pack.h): transposes dwords of quants and bytes of scales. Plain C, since it runs
 * once, when a model is loaded. */
#include "pack.h"

#include <string.h>

#include "../../blocks.h"

static void pack_lines(const uint8_t *quants, size_t n_bytes, int row, uint8_t (*lines)[64]) {
    for (size_t i = 0; i < n_bytes / 4; i++) memcpy(&lines[i][4 * row], quants + 4 * i, 4);
}

static void pack_bytes(const void *bytes, size_t n_bytes, int row, void *columns) {
    for (size_t i = 0; i < n_bytes; i++) ((uint8_t *)columns)[16 * i + (size_t)row] = ((const uint8_t *)bytes)[i];
}

/* Writes one row's block to its place in a unit. */
typedef void (*pack_block_fn)(const void *block, int row, void *unit);

static void pack(pack_block_fn pack_block, size_t block_bytes, const uint8_t *rows, size_t row_bytes, uint8_t *panel) {
    for (size_t i = 0; i < row_bytes / block_bytes; i++) {
        uint8_t *unit = panel + i * block_bytes * PHI_PANEL_ROWS;
        for (int r = 0; r < PHI_PANEL_ROWS; r++) pack_block(rows + (size_t)r * row_bytes + i * block_bytes, r, unit);
    }
}

static void pack_block_q4_0(const void *block, int row, void *unit) {
    const phi_block_q4_0 *b = block;
    phi_panel_q4_0 *u = unit;
    u->d[row] = b->d;
    pack_lines(b->qs, sizeof b->qs, row, u->lines);
}

static void pack_block_q4_1(const void *block, int row, void *unit) {
    const phi_block_q4_1 *b = block;
    phi_panel_q4_1 *u = unit;
    u->d[row] = b->d;
    u->m[row] = b->m;
    pack_lines(b->qs, sizeof b->qs, row, u->lines);
}

static void pack_block_q8_0(const void *block, int row, void *unit) {
    const phi_block_q8_0 *b = block;
    phi_panel_q8_0 *u = unit;
    u->d[row] = b->d;
    pack_lines((const uint8_t *)b->qs, sizeof b->qs, row, u->lines);
}

static void pack_block_q4_k(const void *block, int row, void *unit) {
    const phi_block_q4_k *b = block;
    phi_panel_q4_k *u = unit;
    u->d[row] = b->d;
    u->dmin[row] = b->dmin;
    pack_bytes(b->scales, sizeof b->scales, row, u->scales);
    pack_lines(b->qs, sizeof b->qs, row, u->lines);
}

static void pack_block_q5_k(const void *block, int row, void *unit) {
    const phi_block_q5_k *b = block;
    phi_panel_q5_k *u = unit;
    u->d[row] = b->d;
    u->dmin[row] = b->dmin;
    pack_bytes(b->scales, sizeof b->scales, row, u->scales);
    for (size_t i = 0; i < 8; i++) {
        memcpy(&u->first[i].high[4 * row], b->qh + 4 * i, 4);
        memcpy(&u->first[i].low[4 * row], b->qs + 4 * i, 4);
    }
    pack_lines(b->qs + 32, sizeof b->qs - 32, row, u->rest);
}

static void pack_block_q6_k(const void *block, int row, void *unit) {
    const phi_block_q6_k *b = block;
    phi_panel_q6_k *u = unit;
    u->d[row] = b->d;
    pack_bytes(b->scales, sizeof b->scales, row, u->scales);
    for (size_t h = 0; h < 2; h++) {
        for (size_t i = 0; i < 8; i++) {
            memcpy(&u->halves[h].first[i].high[4 * row], b->qh + 32 * h + 4 * i, 4);
            memcpy(&u->halves[h].first[i].low[4 * row], b->ql + 64 * h + 4 * i, 4);
        }
        pack_lines(b->ql + 64 * h + 32, 32, row, u->halves[h].second);
    }
}

#define PHI_DEFINE(UPPER, type)                                                          \
    static_assert(sizeof(phi_panel_##type) == PHI_PANEL_ROWS * sizeof(phi_block_##type), \
                  "a panel has the size of its rows");                                   \
    void phi_pack_##type(const uint8_t *rows, size_t row_bytes, uint8_t *panel) {        \
        pack(pack_block_##type, sizeof(phi_block_##type), rows, row_bytes, panel);       \
    }
PHI_PACKED_TYPES(PHI_DEFINE)
