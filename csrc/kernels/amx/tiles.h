/* Tile operations: AMX intrinsics, or the same operations in plain C on any machine (PHI_EMULATE_AMX).
 * All eight tiles have 16 rows of 64 bytes. Contents: int8 [16, 64], as the right factor [16, 16, 4]; bf16 [16, 32], as
 * the right factor [16, 16, 2]; int32 or float accumulators [16, 16].
 * Tile numbers must be literals: the compiler puts them into register names. */
#ifndef PHI_AMX_TILES_H
#define PHI_AMX_TILES_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "../generic/unroll.h"

typedef struct { /* palette 1 of LDTILECFG (Intel SDM volume 1, chapter 18) */
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
} phi_tile_config;

/* The configuration of eight tiles of 16 rows of 64 bytes. */
static inline phi_tile_config phi_full_tile_config(void) {
    phi_tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.n_rows[i] = 16;
    }
    return config;
}

#ifndef PHI_EMULATE_AMX

/* Stores to memory that a tile operation reads need a fence before it: gcc does not know that tile operations read
 * memory, and gcc 12 takes a tile configuration for 8 bytes. */
#ifdef _MSC_VER
#define phi_tiles_fence(memory) _ReadWriteBarrier()
#else
#define phi_tiles_fence(memory) __asm__ volatile("" ::"r"(memory) : "memory")
#endif

static inline void phi_tiles_configure(void) {
    const phi_tile_config config = phi_full_tile_config();
    phi_tiles_fence(&config);
    _tile_loadconfig(&config);
}

#define phi_tiles_release() _tile_release()
#define phi_tile_zero(tile) _tile_zero(tile)
#define phi_tile_load(tile, rows, stride_bytes) _tile_loadd(tile, rows, stride_bytes)
#define phi_tile_store(tile, rows, stride_bytes) _tile_stored(tile, rows, stride_bytes)
/* int8: sums[m, n] += sum over k of left[m, k] * right[k / 4, n, k % 4] */
#define phi_tile_multiply(sums, left, right) _tile_dpbssd(sums, left, right)
/* bf16: sums[m, n] += sum over k of left[m, k] * right[k / 2, n, k % 2] */
#define phi_tile_multiply_bf16(sums, left, right) _tile_dpbf16ps(sums, left, right)

#else

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../half.h"

typedef union {
    int8_t bytes[16][64];
    uint16_t words[16][32];
    int32_t dwords[16][16];
    float floats[16][16];
} phi_tile;

static _Thread_local struct {
    phi_tile_config config;
    phi_tile tiles[8];
} phi_tile_state;

#define phi_tiles_fence(memory) ((void)(memory))

static inline void phi_tiles_configure(void) {
    memset(&phi_tile_state, 0, sizeof phi_tile_state);
    phi_tile_state.config = phi_full_tile_config();
}

static inline void phi_tiles_release(void) { memset(&phi_tile_state, 0, sizeof phi_tile_state); }

/* Aborts when no configuration is loaded, where the hardware raises an exception. */
static inline phi_tile *phi_emulated_tile(int tile) {
    if (phi_tile_state.config.palette != 1) abort();
    return &phi_tile_state.tiles[tile];
}

static inline void phi_tile_zero(int tile) { memset(phi_emulated_tile(tile), 0, sizeof(phi_tile)); }

static inline void phi_tile_load(int tile, const void *rows, size_t stride_bytes) {
    for (size_t i = 0; i < 16; i++) {
        memcpy(phi_emulated_tile(tile)->bytes[i], (const uint8_t *)rows + i * stride_bytes, 64);
    }
}

static inline void phi_tile_store(int tile, void *rows, size_t stride_bytes) {
    for (size_t i = 0; i < 16; i++) memcpy((uint8_t *)rows + i * stride_bytes, phi_emulated_tile(tile)->bytes[i], 64);
}

static inline void phi_tile_multiply(int sums, int left, int right) {
    const phi_tile *a = phi_emulated_tile(left), *b = phi_emulated_tile(right);
    phi_tile *c = phi_emulated_tile(sums);
    for (int m = 0; m < 16; m++) {
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < 16; n++) {
                int32_t dot = 0;
                for (int i = 0; i < 4; i++) dot += a->bytes[m][4 * k + i] * b->bytes[k][4 * n + i];
                c->dwords[m][n] += dot;
            }
        }
    }
}

/* TDPBF16PS flushes denormal inputs and results to 0. */
static inline float phi_flush_denormal(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }
static inline float phi_flushed_bf16(uint16_t b) { return phi_flush_denormal(phi_bf16_to_float(b)); }

/* Order of the additions as in the instruction's description (Intel SDM volume 2): the first and the second elements of
 * the pairs are summed separately, the two sums are added, and the result is added to the accumulator. */
static inline void phi_tile_multiply_bf16(int sums, int left, int right) {
    const phi_tile *a = phi_emulated_tile(left), *b = phi_emulated_tile(right);
    phi_tile *c = phi_emulated_tile(sums);
    for (int m = 0; m < 16; m++) {
        float dots[32] = {0};
        for (int k = 0; k < 16; k++) {
            for (int i = 0; i < 32; i++) {
                const float x = phi_flushed_bf16(a->words[m][2 * k + i % 2]), w = phi_flushed_bf16(b->words[k][i]);
                dots[i] = phi_flush_denormal(fmaf(x, w, dots[i]));
            }
        }
        for (int n = 0; n < 16; n++) {
            const float dot = phi_flush_denormal(dots[2 * n] + dots[2 * n + 1]);
            c->floats[m][n] = phi_flush_denormal(phi_flush_denormal(c->floats[m][n]) + dot);
        }
    }
}

#endif

/* Prefetches 16 contiguous rows of 64 bytes into L2. Must be inlined: gcc drops calls of a function that only
 * prefetches. */
PHI_INLINE void phi_prefetch_tile(const int8_t *rows) {
    UNROLL for (int i = 0; i < 16; i++) _mm_prefetch((const char *)rows + 64 * i, _MM_HINT_T1);
}

#endif
