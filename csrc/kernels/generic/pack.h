/* The packed layout: panels of 16 rows, interleaved block by block, in the same number of bytes as row-major.
 *
 * A panel is a sequence of units (phi_panel_<type>), one for each block of a row. A unit holds the scales of the 16
 * rows contiguously. Its quants are interleaved as dwords: line i holds dword i of each row, so 64 bytes are the same
 * four columns of 16 rows, and a dot product needs one broadcast of four activations and no horizontal sum. */
#ifndef PHI_GENERIC_PACK_H
#define PHI_GENERIC_PACK_H

#include "../../kernels.h"

/* Part of the key of a packed-weight cache. Increment it when the bytes of a panel, or the order in which a model's
 * matrices are packed, change. */
enum { PHI_PANEL_VERSION = 2 };

/* X(type, name) for every type with a packed layout. */
#define PHI_PACKED_TYPES(X) X(Q4_0, q4_0) X(Q4_1, q4_1) X(Q8_0, q8_0) X(Q4_K, q4_k) X(Q5_K, q5_k) X(Q6_K, q6_k)

typedef struct {
    uint16_t d[16];
    uint8_t lines[4][64];
} phi_panel_q4_0;

typedef struct {
    uint16_t d[16], m[16];
    uint8_t lines[4][64];
} phi_panel_q4_1;

typedef struct {
    uint16_t d[16];
    uint8_t lines[8][64];
} phi_panel_q8_0;

typedef struct {
    uint16_t d[16], dmin[16];
    uint8_t scales[12][16]; /* byte i of each row */
    uint8_t lines[32][64];
} phi_panel_q4_k;

/* phi_panel_q5_k and phi_panel_q6_k are stored in the order in which a product reads them: hardware prefetchers follow
 * one ascending stream, but not two. */
typedef struct {
    uint16_t d[16], dmin[16];
    uint8_t scales[12][16];
    struct {
        uint8_t high[64], low[64]; /* line i of qh, and of the first 32 bytes of qs */
    } first[8];
    uint8_t rest[24][64]; /* the other lines of qs */
} phi_panel_q5_k;

/* Line i of qs. */
static inline const uint8_t *phi_panel_q5_k_line(const phi_panel_q5_k *u, int i) {
    return i < 8 ? u->first[i].low : u->rest[i - 8];
}

typedef struct {
    uint16_t d[16];
    int8_t scales[16][16];
    struct {
        struct {
            uint8_t high[64], low[64]; /* line i of the half's qh, and of its first 32 bytes of ql */
        } first[8];
        uint8_t second[8][64]; /* lines of its other 32 bytes of ql */
    } halves[2];
} phi_panel_q6_k;

#define PHI_DECLARE(UPPER, lower) void phi_pack_##lower(const uint8_t *rows, size_t row_bytes, uint8_t *panel);
PHI_PACKED_TYPES(PHI_DECLARE)
#undef PHI_DECLARE

#endif
