/* The quantised blocks of a GGUF file, byte for byte (GGUF specification; ggml's block structs). A comment gives a
 * weight w from its quant q. d, dmin and m are the bits of half-precision numbers. */
#ifndef PHI_BLOCKS_H
#define PHI_BLOCKS_H

#include <assert.h>
#include <stdint.h>

typedef struct { /* w = d * (q - 8) */
    uint16_t d;
    uint8_t qs[16]; /* low nibbles: elements 0-15, high nibbles: 16-31 */
} phi_block_q4_0;

typedef struct { /* w = d * q + m */
    uint16_t d, m;
    uint8_t qs[16];
} phi_block_q4_1;

typedef struct { /* w = d * (q - 16) */
    uint16_t d;
    uint8_t qh[4]; /* bit i: fifth bit of element i */
    uint8_t qs[16];
} phi_block_q5_0;

typedef struct { /* w = d * q + m */
    uint16_t d, m;
    uint8_t qh[4];
    uint8_t qs[16];
} phi_block_q5_1;

typedef struct { /* w = d * q */
    uint16_t d;
    int8_t qs[32];
} phi_block_q8_0;

typedef struct { /* 16 sub-blocks of 16: w = d * (scale & 15) * q - dmin * (scale >> 4) */
    uint8_t scales[16];
    uint8_t qs[64]; /* half h, bits 2j: elements 128h + 32j + 0..31 from bytes 32h..32h+31 */
    uint16_t d, dmin;
} phi_block_q2_k;

typedef struct {       /* 16 sub-blocks of 16: w = d * (scale - 32) * (q - 4) */
    uint8_t hmask[32]; /* bit 4h + j: third bit of elements 128h + 32j + 0..31 */
    uint8_t qs[64];
    uint8_t scales[12]; /* 6-bit scales */
    uint16_t d;
} phi_block_q3_k;

typedef struct { /* 8 sub-blocks of 32: w = d * scale * q - dmin * min */
    uint16_t d, dmin;
    uint8_t scales[12]; /* 6-bit scales and mins */
    uint8_t qs[128];    /* 32 bytes per pair p of sub-blocks: low nibbles sub-block 2p, high nibbles 2p + 1 */
} phi_block_q4_k;

typedef struct { /* Q4_K with a fifth bit */
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32]; /* bit j: fifth bit of sub-block j */
    uint8_t qs[128];
} phi_block_q5_k;

typedef struct {     /* 16 sub-blocks of 16: w = d * scale * (q - 32) */
    uint8_t ql[128]; /* half h: 64 bytes, low nibbles 128h + 0..63, high nibbles 128h + 64..127 */
    uint8_t qh[64];  /* half h: 32 bytes, bits 2j: elements 128h + 32j + 0..31 */
    int8_t scales[16];
    uint16_t d;
} phi_block_q6_k;

static_assert(sizeof(phi_block_q4_0) == 18, "Q4_0");
static_assert(sizeof(phi_block_q4_1) == 20, "Q4_1");
static_assert(sizeof(phi_block_q5_0) == 22, "Q5_0");
static_assert(sizeof(phi_block_q5_1) == 24, "Q5_1");
static_assert(sizeof(phi_block_q8_0) == 34, "Q8_0");
static_assert(sizeof(phi_block_q2_k) == 84, "Q2_K");
static_assert(sizeof(phi_block_q3_k) == 110, "Q3_K");
static_assert(sizeof(phi_block_q4_k) == 144, "Q4_K");
static_assert(sizeof(phi_block_q5_k) == 176, "Q5_K");
static_assert(sizeof(phi_block_q6_k) == 210, "Q6_K");

#endif
