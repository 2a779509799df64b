/* The kernel table: the functions that one instruction-set tier (scalar, avx2, neon, ...) provides.
 *
 * A tier sets the slots that it implements and leaves the others NULL; dispatch.c fills those from the tiers below.
 *
 * Every kernel follows these rules:
 * - Inputs are const, outputs belong to the caller. A kernel does not allocate, start threads, or fail.
 * - A result is computed by the same operations in the same order however many rows and tokens a call has. A batch thus
 *   has the same bits as its tokens one by one, up to the tier's max_exact_batch.
 * - Names are phi_<op>_<type>_<tier>. */
#ifndef PHI_KERNELS_H
#define PHI_KERNELS_H

#include "phi.h"

enum {
    PHI_Q8_BLOCK = 32,         /* activations per scale of phi_q8 */
    PHI_SUM_BLOCK = 16,        /* activations per sum of phi_q8: the smallest sub-block of a weight type */
    PHI_TILED_BLOCK = 256,     /* activations per scale of phi_tiled */
    PHI_TILED_LOW_STEPS = 254, /* phi_tiled: the low part counts in 1 / 254 of a step of the high part */
    PHI_TILE_TOKENS = 16,      /* rows of a tile: tokens */
    PHI_TILE_COLS = 64,        /* bytes per row of a tile: 64 int8 or 32 bf16 columns */
    PHI_TILED_TASK_ROWS = 256, /* weight rows per task for products with tiled activations */
    PHI_KV_BLOCK = 32,         /* dimensions per scale in an int8 page */
    PHI_KV_GROUP = 16,         /* positions that are interleaved in the keys of a page */
    PHI_ATTENTION_ROWS = 64,   /* maximum number of tokens per attention call, and of rows per pass over the pages */
    PHI_ATTENTION_BLOCK = 64,  /* positions per step of the online softmax; a multiple of PHI_PAGE_TOKENS */
    PHI_ALIGN_BYTES = 64,
};

/* n activations quantised to int8 with one scale per PHI_Q8_BLOCK (32), and the sums that matrix products use. */
typedef struct {
    int8_t *quants;    /* [n], -127..127 */
    float *scales;     /* [n / PHI_Q8_BLOCK]: x = scale * quant */
    float *sums;       /* [n / PHI_SUM_BLOCK]: scale * sum of the quants; times a weight type's minimum or offset */
    float *block_sums; /* [n / PHI_Q8_BLOCK]: the same per block */
    /* Corrections for integer products of unsigned and signed bytes, which add 128 to the weights: */
    int32_t *offsets;       /* [n / PHI_SUM_BLOCK]: -128 * sum of the quants */
    int32_t *block_offsets; /* [n / PHI_Q8_BLOCK]: the same per block */
} phi_q8;

/* The part of q that starts at `element`, a multiple of PHI_Q8_BLOCK. */
static inline phi_q8 phi_q8_at(phi_q8 q, size_t element) {
    return (phi_q8){q.quants + element,
                    q.scales + element / PHI_Q8_BLOCK,
                    q.sums + element / PHI_SUM_BLOCK,
                    q.block_sums + element / PHI_Q8_BLOCK,
                    q.offsets + element / PHI_SUM_BLOCK,
                    q.block_offsets + element / PHI_Q8_BLOCK};
}

/* Activations in the AMX layout, for prefill: tiles of [PHI_TILE_TOKENS, PHI_TILE_COLS] bytes. Eight tiles hold 256
 * columns of 16 tokens. Tiles of the same columns are adjacent, since a product needs them together.
 * - amx: int8 in two parts, x = scale * (high + low / PHI_TILED_LOW_STEPS): four tiles of high, then four of low.
 * - amxbf16: eight tiles of bf16 and no scales. */
typedef struct {
    int8_t *tiles;   /* [n_cols / PHI_TILED_BLOCK, n_tokens / PHI_TILE_TOKENS, 8] tiles */
    float *scales;   /* [n_cols / PHI_TILED_BLOCK, n_tokens] */
    size_t n_tokens; /* a multiple of PHI_TILE_TOKENS; padding tokens have undefined values */
} phi_tiled;

/* n_tokens, rounded up to whole tiles. */
static inline size_t phi_tiled_tokens(size_t n_tokens) {
    return (n_tokens + PHI_TILE_TOKENS - 1) / PHI_TILE_TOKENS * PHI_TILE_TOKENS;
}
static inline size_t phi_tiled_bytes(size_t n_tokens, size_t n_cols) { return phi_tiled_tokens(n_tokens) * 2 * n_cols; }
static inline size_t phi_tiled_n_scales(size_t n_tokens, size_t n_cols) {
    return phi_tiled_tokens(n_tokens) * n_cols / PHI_TILED_BLOCK;
}

/* A token's row in the first of the eight tiles of a block of 256 columns. */
static inline int8_t *phi_tiled_row(const phi_tiled *x, size_t block, size_t token) {
    const size_t row = token % PHI_TILE_TOKENS;
    return x->tiles + phi_tiled_bytes(block * x->n_tokens + token - row, PHI_TILED_BLOCK) + row * PHI_TILE_COLS;
}

/* The activations of n_tokens tokens in every format that the products of a batch read. */
typedef struct {
    int n_cols;
    float *f32; /* [n_tokens, n_cols] */
    phi_q8 q8;  /* [n_tokens * n_cols]; unset if no product of the batch reads it */
    /* The AMX layout, written by quantize_tiled. tiles is NULL if the tier has no quantize_tiled, n_cols is not a
     * multiple of PHI_TILED_BLOCK, or n_tokens is at most max_exact_batch. */
    phi_tiled tiled;
} phi_activations;

/* A matrix product: out[t, r] = dot(weight row r, activations of token first_token + t). */
typedef struct {
    const uint8_t *rows; /* [n_rows, row_bytes]; packed: [n_rows / 16, 16 * row_bytes] */
    size_t row_bytes;
    int n_rows, n_cols;
    const phi_activations *x;
    int first_token, n_tokens; /* tokens of x to multiply */
    float *out;                /* [n_tokens, out_stride]; columns from n_rows on are left unchanged */
    size_t out_stride;         /* floats from one token to the next */
    phi_prefetch prefetch;     /* used by packed products in decode and small batches */
    int max_small_batch;       /* largest n_tokens that takes the small-batch path of packed products */
} phi_matmul;

/* Attention of the query heads that share one KV head, for tokens at consecutive positions of one sequence. */
typedef struct {
    const float *q; /* [n_tokens, n_queries, head_dim], token_stride floats from one token to the next */
    int n_tokens, n_queries, head_dim;
    size_t token_stride;
    const uint8_t *pages;      /* the head's phi_kv_slice of page 0 */
    size_t page_bytes;         /* bytes from one page to the next */
    const int32_t *page_table; /* of the sequence: position p is in page page_table[p / PHI_PAGE_TOKENS] */
    int query_start;           /* position of the first token; token t attends to positions up to query_start + t */
    int window;                /* positions a token attends to, itself included; 0: unlimited */
    float scale;               /* multiplies q @ k.T */
    float *scratch;            /* [phi_attention_scratch_floats] */
    float *out;                /* [n_tokens, n_queries, head_dim], strided as q */
} phi_attention;

/* The first position that a token at `position` attends to. */
static inline int phi_first_visible(int position, int window) {
    return window > 0 && position >= window ? position + 1 - window : 0;
}

/* Sizes of attention's scratch buffer, in floats. Each row (one query head of one token) has the probabilities of a
 * block, its weighted sum of values, and its query. All rows share one buffer of converted floats: the keys of a page,
 * or 32 dimensions of the values of a block. */
static inline size_t phi_attention_sums_stride(int head_dim) { return ((size_t)head_dim + 31) / 32 * 32; }
static inline size_t phi_attention_row_floats(int head_dim) {
    return PHI_ATTENTION_BLOCK + 2 * phi_attention_sums_stride(head_dim);
}
static inline size_t phi_attention_converted_floats(int head_dim) {
    const size_t keys = PHI_PAGE_TOKENS * phi_attention_sums_stride(head_dim);
    return keys > 32 * PHI_ATTENTION_BLOCK ? keys : 32 * PHI_ATTENTION_BLOCK;
}
static inline size_t phi_attention_scratch_floats(int head_dim) {
    return phi_attention_converted_floats(head_dim) + (PHI_ATTENTION_ROWS + 8) * phi_attention_row_floats(head_dim);
}

/* Packs PHI_PANEL_ROWS rows of PHI_LAYOUT_ROWS into a panel of PHI_PANEL_ROWS * row_bytes bytes. */
typedef void (*phi_pack_fn)(const uint8_t *rows, size_t row_bytes, uint8_t *panel);

/* A loop of one multiply instruction, for benchmarks. run computes n_steps steps and returns the sum of their products
 * (if the instruction accumulates); macs: multiply-accumulates per step. */
typedef struct {
    double (*run)(size_t n_steps);
    int macs;
} phi_peak;

struct phi_kernels {
    const char *name; /* of the tier */
    /* Largest batch whose products have the same bits as those of single tokens. 0: unlimited. */
    int max_exact_batch;

    /* y [n] = n consecutive weights, whole blocks */
    void (*dequantize[PHI_N_TYPES])(const void *row, size_t n, float *y);
    /* Product with weights in PHI_LAYOUT_ROWS. */
    void (*matmul[PHI_N_TYPES])(const phi_matmul *m);
    /* Packing for matmul_packed; NULL: the type is always multiplied in PHI_LAYOUT_ROWS. */
    phi_pack_fn pack[PHI_N_TYPES];
    /* Product with weights in PHI_LAYOUT_PANELS; n_rows is a multiple of PHI_PANEL_ROWS. */
    void (*matmul_packed[PHI_N_TYPES])(const phi_matmul *m);

    /* x [n] -> q8 [n]; n is a multiple of PHI_Q8_BLOCK */
    void (*quantize_q8)(const float *x, size_t n, phi_q8 q8);
    /* Whether matmul_packed reads only tiled activations for more than max_exact_batch tokens. */
    bool takes_tiled[PHI_N_TYPES];
    /* x [n_cols] -> row `token` of the tiled activations; NULL: the tier has no tiled products */
    void (*quantize_tiled)(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token);

    /* y = x / sqrt(mean(x^2) + eps) * weight */
    void (*rms_norm)(const float *x, const float *weight, size_t n, float eps, float *y);
    /* y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias */
    void (*layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y);
    /* Rotates x [head_dim] in place by cos, sin [rope_dims / 2]; indexed by phi_rope_style. */
    void (*rope[2])(float *x, int rope_dims, const float *cos, const float *sin);
    /* y = silu(gate) * up; y may be gate */
    void (*silu_mul)(const float *gate, const float *up, size_t n, float *y);
    /* y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))); y may be x */
    void (*gelu)(const float *x, size_t n, float *y);
    /* y += x */
    void (*add)(const float *x, size_t n, float *y);

    /* Stores k, v [head_dim] of one position in a slice of a page: slot = position % PHI_PAGE_TOKENS. */
    void (*store_kv[PHI_N_KV_TYPES])(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
    /* out = softmax(scale * q @ k.T) @ v over the positions that each token attends to */
    void (*attention[PHI_N_KV_TYPES])(const phi_attention *a);

    /* The rate of the multipliers, indexed by phi_activation_format; NULL for scalar. */
    phi_peak peak[2];
};

/* The slots that each tier implements itself. Only the scalar table is complete. */
extern const phi_kernels phi_kernels_scalar;
#ifdef PHI_HAVE_AVX2
extern const phi_kernels phi_kernels_avx2;
extern const phi_kernels phi_kernels_avxvnni; /* only with PHI_HAVE_AVXVNNI: some compilers lack it */
extern const phi_kernels phi_kernels_avx512;
#endif
#ifdef PHI_HAVE_AMX
extern const phi_kernels phi_kernels_amx;
extern const phi_kernels phi_kernels_amxbf16;
#endif
#ifdef PHI_HAVE_NEON
extern const phi_kernels phi_kernels_neon;
extern const phi_kernels phi_kernels_dotprod;
extern const phi_kernels phi_kernels_i8mm;
#endif

/* A KV slice: the keys and values of one layer and KV head in one page.
 * - f16: keys [PHI_PAGE_TOKENS / PHI_KV_GROUP, head_dim, PHI_KV_GROUP], then values [PHI_PAGE_TOKENS, head_dim].
 * - q8: the same in int8, then half-precision scales: of keys [n_blocks, PHI_PAGE_TOKENS], of values [PHI_PAGE_TOKENS,
 *   n_blocks], where n_blocks = phi_kv_blocks(head_dim). */
static inline size_t phi_kv_blocks(int head_dim) { return ((size_t)head_dim + PHI_KV_BLOCK - 1) / PHI_KV_BLOCK; }
static inline size_t phi_kv_slice_bytes(phi_kv_type type, int head_dim) {
    const size_t n = (size_t)PHI_PAGE_TOKENS * (size_t)head_dim * 2;
    if (type == PHI_KV_F16) return n * sizeof(uint16_t);
    return n + PHI_PAGE_TOKENS * phi_kv_blocks(head_dim) * 2 * sizeof(uint16_t);
}

typedef struct {
    uint8_t *keys, *values;
    uint16_t *key_scales, *value_scales; /* NULL for f16 */
} phi_kv_slice;

/* Pointers to the parts of a slice. */
static inline phi_kv_slice phi_kv_slice_of(phi_kv_type type, int head_dim, uint8_t *slice) {
    const size_t n = (size_t)PHI_PAGE_TOKENS * (size_t)head_dim;
    if (type == PHI_KV_F16) return (phi_kv_slice){slice, slice + n * sizeof(uint16_t), NULL, NULL};
    uint16_t *scales = (uint16_t *)(void *)(slice + 2 * n);
    return (phi_kv_slice){slice, slice + n, scales, scales + PHI_PAGE_TOKENS * phi_kv_blocks(head_dim)};
}

#endif
