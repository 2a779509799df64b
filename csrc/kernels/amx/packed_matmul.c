/* Prefill products: packed weights by tiled int8 activations, in AMX tiles.
 * Layout: 64 bytes of a panel are four columns of 16 rows (kernels/generic/pack.h), which is one row of a right tile.
 * Idea: 256 columns of a weight row are requantised to int8 with one scale, max |scale * q - min| / 127. The maximum is
 * reached at an end of the range of q, so weights need not be scanned. Minima and sub-block scales are then gone, and
 * 256 columns are summed in int32, in four tile products. The error of a weight is at most
 * 1/2 + (half its quants + 1) / 512 of the scale: from its own rounding, and from rounding its factors to 1/256.
 * Panels are unpacked once for all tokens. Two panels by the high and low parts of 16 tokens fill four accumulator
 * tiles, which are scaled and added to the output while the next block is multiplied. A (row, token) pair is summed in
 * the same order in every call.
 * Bound: 16 tile products of 16 cycles per 32 rows x 16 tokens x 256 columns, 1650 GMAC/s at 3.2 GHz, overlapped with
 * 64 conversions and FMAs. Unpacking, about 800 instructions per 256 columns of a panel, is not overlapped. */
#include "amx.h"

#include "../avx512/avx512.h"
#include "../avx512/panel_units.h"
#include "tiles.h"

enum {
    ROWS = PHI_PANEL_ROWS,
    SUB_BLOCKS = PHI_TILED_BLOCK / PHI_Q8_BLOCK,
    STEPS = PHI_TILED_BLOCK / PHI_TILE_COLS, /* tile products per block */
    TILE_BYTES = PHI_TILE_TOKENS * PHI_TILE_COLS,
    PANELS = 4, /* unpacked at a time: 16 KiB, so that both pairs of panels find the activations in L1 */
};

/* 256 columns of a panel, requantised: weight = scale * byte of lines. */
typedef struct {
    __m512i lines[SUB_BLOCKS * LINES]; /* STEPS right tiles */
    __m512 scale;
} block;

typedef void (*requantise_fn)(const uint8_t *unit, block *w);

/* The low 16 bits of each dword, in both halves of the dword. */
INLINE __m512i duplicate_low_words(__m512i dwords) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, dwords, _mm512_slli_epi32(dwords, 16));
}

/* (q * factor + offset) / 256 for unsigned bytes q. The result fits a signed byte, so an overflow of the intermediate
 * 16-bit values does no harm. */
INLINE __m512i scale_bytes(__m512i q, __m512i factor, __m512i offset) {
    const __m512i even = _mm512_and_si512(q, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(q, 8);
    const __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(even, factor), offset);
    const __m512i high = _mm512_add_epi16(_mm512_mullo_epi16(odd, factor), offset);
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(low, 8), high);
}

/* Quants range from 0 to 2 * half_quant - 1. */
INLINE void requantise(const format f, int half_quant, const uint8_t *unit, block *w) {
    __m512 scale[MAX_GROUPS], min[MAX_GROUPS];
    const int n_groups = SUB_BLOCKS * f.groups_per_block, unit_groups = f.sub_blocks * f.groups_per_block;
    for (int first = 0; first < n_groups; first += unit_groups) {
        const uint8_t *start = unit + (size_t)(first / unit_groups) * f.unit_bytes;
        unit_scales s;
        f.unpack_scales(start, &s);
        for (int i = 0; i < unit_groups; i++) {
            scale[first + i] = _mm512_mul_ps(f.scale_of(&s, i), _mm512_set1_ps((float)(1 << f.shift)));
            min[first + i] =
                f.centred ? _mm512_mul_ps(scale[first + i], _mm512_set1_ps((float)half_quant)) : f.min_of(&s, i);
        }
    }
    const __m512 zero = _mm512_setzero_ps(), max_quant = _mm512_set1_ps(2.0f * (float)half_quant - 1.0f);
    __m512 bound = zero, nan_or_zero = zero;
    for (int i = 0; i < n_groups; i++) {
        const __m512 max_weight = _mm512_fmsub_ps(scale[i], max_quant, min[i]);
        bound = _mm512_max_ps(bound, _mm512_max_ps(_mm512_abs_ps(max_weight), _mm512_abs_ps(min[i])));
        nan_or_zero = _mm512_fmadd_ps(max_weight, zero, nan_or_zero);
    }
    /* Integers cannot represent the weights of a row whose scale is not finite: the row's new scale is NaN. */
    w->scale = _mm512_fmadd_ps(bound, _mm512_set1_ps(1.0f / 127.0f), nan_or_zero);
    const __mmask16 is_nonzero = _mm512_cmp_ps_mask(bound, zero, _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(is_nonzero, _mm512_set1_ps(127.0f * 256.0f), bound);
    const size_t sub_block_bytes = f.unit_bytes / (size_t)f.sub_blocks;
    const __m128i shift = _mm_cvtsi32_si128(f.shift);
    UNROLL for (int j = 0; j < SUB_BLOCKS; j++) {
        __m512i q[LINES];
        /* Prefetches the next 256 columns, one sub-block at a time: bursts stall. The last columns of a panel are
         * followed by the next panel. */
        prefetch_l1(unit + (size_t)(SUB_BLOCKS + j) * sub_block_bytes, sub_block_bytes);
        f.unpack_lines(unit + (size_t)(j / f.sub_blocks) * f.unit_bytes, j % f.sub_blocks, q);
        UNROLL for (int k = 0; k < f.groups_per_block; k++) {
            const int group = j * f.groups_per_block + k, n_lines = LINES / f.groups_per_block;
            const __m512i factor = _mm512_cvtps_epi32(_mm512_mul_ps(scale[group], inverse));
            /* The offset is exact for the middle quant, which halves the largest error of the rounded factor. */
            const __m512 middle = _mm512_fmsub_ps(scale[group], _mm512_set1_ps((float)half_quant), min[group]);
            const __m512i middle_value = _mm512_cvtps_epi32(_mm512_mul_ps(middle, inverse));
            const __m512i half_range = _mm512_mullo_epi32(factor, _mm512_set1_epi32(half_quant));
            const __m512i offset = _mm512_sub_epi32(_mm512_add_epi32(middle_value, _mm512_set1_epi32(128)), half_range);
            const __m512i factors = duplicate_low_words(factor), offsets = duplicate_low_words(offset);
            UNROLL for (int i = k * n_lines; i < (k + 1) * n_lines; i++) {
                /* Quants shifted left have zeros below: the shift moves no bit into the neighbouring byte. */
                w->lines[j * LINES + i] = scale_bytes(_mm512_srl_epi16(q[i], shift), factors, offsets);
            }
        }
    }
}

/* Integer sums of two panels by 16 tokens that are still to be scaled and added to the output. */
typedef struct {
    const __m512i *sums; /* [2 parts, 2 panels, 16 tokens] vectors of 16 rows */
    __m512 scale[2];     /* per panel */
    int n_panels, n_tokens;
    const float *x_scales; /* [n_tokens] */
    float *out;            /* [n_tokens, out_stride] */
    size_t out_stride;
    __mmask16 accumulate; /* rows to add to the output; 0 for the first 256 columns, which overwrite it */
} pending_output;

/* Double buffer: the sums of the current block and those of the previous one, which are being added to the output. */
typedef struct {
    __m512i sums[2][4 * PHI_TILE_TOKENS];
    pending_output previous;
    int current; /* index into sums */
} double_buffer;

INLINE void add_to_output(const pending_output *p, int token) {
    if (token >= p->n_tokens) return;
    const __m512 x_scale = _mm512_set1_ps(p->x_scales[token]);
    float *out = p->out + (size_t)token * p->out_stride;
    for (int i = 0; i < p->n_panels; i++) {
        const __m512 scale = _mm512_mul_ps(p->scale[i], x_scale);
        const __m512 total = _mm512_maskz_loadu_ps(p->accumulate, out + i * ROWS);
        const __m512 high = _mm512_cvtepi32_ps(p->sums[i * PHI_TILE_TOKENS + token]);
        const __m512 low = _mm512_cvtepi32_ps(p->sums[(2 + i) * PHI_TILE_TOKENS + token]);
        const __m512 sum = _mm512_fmadd_ps(low, _mm512_set1_ps(1.0f / (float)PHI_TILED_LOW_STEPS), high);
        _mm512_storeu_ps(out + i * ROWS, _mm512_fmadd_ps(sum, scale, total));
    }
}

/* sums = both parts of 16 tokens times n_panels of w. Interleaved with it, the previous sums are added to the output.
 * n_panels is a constant after inlining. to_prefetch: STEPS tiles, or NULL.
 * Tiles 0 to 3 accumulate, 4 and 5 hold activations, 6 and 7 weights. */
INLINE void multiply_block(const int8_t *high, const int8_t *low, const block *w, int n_panels, __m512i *sums,
                           const pending_output *previous, const int8_t *to_prefetch) {
    phi_tile_zero(0);
    phi_tile_zero(1);
    phi_tile_zero(2);
    phi_tile_zero(3);
    UNROLL for (int i = 0; i < STEPS; i++) {
        if (to_prefetch) phi_prefetch_tile(to_prefetch + i * TILE_BYTES);
        phi_tile_load(4, high + i * TILE_BYTES, PHI_TILE_COLS);
        phi_tile_load(6, w[0].lines + i * ROWS, PHI_TILE_COLS);
        phi_tile_multiply(0, 4, 6);
        add_to_output(previous, 4 * i);
        if (n_panels > 1) {
            phi_tile_load(7, w[1].lines + i * ROWS, PHI_TILE_COLS);
            phi_tile_multiply(1, 4, 7);
        }
        add_to_output(previous, 4 * i + 1);
        phi_tile_load(5, low + i * TILE_BYTES, PHI_TILE_COLS);
        phi_tile_multiply(2, 5, 6);
        add_to_output(previous, 4 * i + 2);
        if (n_panels > 1) phi_tile_multiply(3, 5, 7);
        add_to_output(previous, 4 * i + 3);
    }
    phi_tile_store(0, sums, 64);
    phi_tile_store(2, sums + 2 * PHI_TILE_TOKENS, 64);
    if (n_panels > 1) {
        phi_tile_store(1, sums + PHI_TILE_TOKENS, 64);
        phi_tile_store(3, sums + 3 * PHI_TILE_TOKENS, 64);
    }
}

/* Multiplies block b (256 columns) of n_panels panels, starting at `row`, by all tokens. is_last: these are the last
 * rows, so the activations of the next block are prefetched. */
static void multiply_tokens(const phi_matmul *m, const block *w, size_t b, int row, int n_panels, double_buffer *buffer,
                            bool is_last) {
    const phi_tiled *x = &m->x->tiled;
    for (int t = 0; t < m->n_tokens; t += PHI_TILE_TOKENS) {
        const size_t token = (size_t)(m->first_token + t);
        const int8_t *high = phi_tiled_row(x, b, token), *low = high + STEPS * TILE_BYTES;
        const int8_t *next = is_last ? phi_tiled_row(x, (b + 1) % ((size_t)m->n_cols / PHI_TILED_BLOCK), token) : NULL;
        for (int i = 0; i < n_panels; i += 2, buffer->current ^= 1) {
            const bool is_pair = i + 1 < n_panels;
            const int8_t *to_prefetch = next ? next + i / 2 * STEPS * TILE_BYTES : NULL;
            __m512i *sums = buffer->sums[buffer->current];
            if (is_pair)
                multiply_block(high, low, &w[i], 2, sums, &buffer->previous, to_prefetch);
            else
                multiply_block(high, low, &w[i], 1, sums, &buffer->previous, to_prefetch);
            buffer->previous = (pending_output){
                .sums = sums,
                .scale = {w[i].scale, w[is_pair ? i + 1 : i].scale},
                .n_panels = is_pair ? 2 : 1,
                .n_tokens = m->n_tokens - t < PHI_TILE_TOKENS ? m->n_tokens - t : PHI_TILE_TOKENS,
                .x_scales = x->scales + b * x->n_tokens + token,
                .out = m->out + (size_t)t * m->out_stride + row + i * ROWS,
                .out_stride = m->out_stride,
                .accumulate = b ? 0xffff : 0,
            };
        }
    }
}

/* Multiplies 256 columns of all rows before the next 256: 512 tokens' activations of these columns, 256 KiB, then come
 * from L2 for all rows but the first. */
static void multiply_rows(requantise_fn requantise_block, const phi_matmul *m, int first, int end) {
    const size_t n_blocks = (size_t)m->n_cols / PHI_TILED_BLOCK, panel_bytes = ROWS * m->row_bytes;
    const size_t block_bytes = panel_bytes / n_blocks;
    block w[PANELS];
    double_buffer buffer;
    buffer.previous = (pending_output){.n_tokens = 0};
    buffer.current = 0;
    for (size_t b = 0; b < n_blocks; b++) {
        for (int row = first; row < end; row += PANELS * ROWS) {
            const int n_left = (end - row) / ROWS, n_panels = n_left < PANELS ? n_left : PANELS;
            const uint8_t *panels = m->rows + (size_t)row * m->row_bytes + b * block_bytes;
            for (int i = 0; i < n_panels; i++) requantise_block(panels + (size_t)i * panel_bytes, &w[i]);
            phi_tiles_fence(w);
            multiply_tokens(m, w, b, row, n_panels, &buffer, row + PANELS * ROWS >= end);
        }
    }
    for (int t = 0; t < PHI_TILE_TOKENS; t++) add_to_output(&buffer.previous, t);
}

/* small_batch: the AVX-512 kernel, for batches of up to PHI_AMX_MAX_EXACT_BATCH tokens and activations without tiles.
 */
static void matmul(requantise_fn requantise_block, void (*small_batch)(const phi_matmul *), const phi_matmul *m) {
    if (m->n_tokens <= PHI_AMX_MAX_EXACT_BATCH || !m->x->tiled.tiles || m->first_token % PHI_TILE_TOKENS != 0) {
        small_batch(m);
        return;
    }
    /* Configured in every call: other libraries in the process may configure tiles too. */
    phi_tiles_configure();
    for (int row = 0; row < m->n_rows; row += PHI_TILED_TASK_ROWS) {
        const int end = row + PHI_TILED_TASK_ROWS;
        multiply_rows(requantise_block, m, row, end < m->n_rows ? end : m->n_rows);
    }
    phi_tiles_release();
}

#define PHI_DEFINE(type, half_quant)                                     \
    static void requantise_##type(const uint8_t *unit, block *w) {       \
        requantise(PHI_FORMAT_##type, half_quant, unit, w);              \
    }                                                                    \
    void phi_matmul_packed_##type##_amx(const phi_matmul *m) {           \
        matmul(requantise_##type, phi_matmul_packed_##type##_avx512, m); \
    }
PHI_DEFINE(q4_k, 8)
PHI_DEFINE(q5_k, 16)
PHI_DEFINE(q6_k, 32)
