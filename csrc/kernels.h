/* The kernel table: what one instruction-set tier offers.
 *
 * A tier fills the slots that it does better and leaves the rest NULL; dispatch.c inherits those from a tier below.
 * Kernels take const inputs and caller-owned outputs; they neither allocate, start threads, nor fail.
 * Every kernel computes one (row, token) pair with the same operations in the same order however many rows and tokens
 * it is given: a batch gives the same bits as its tokens one by one, up to the tier's max_exact_batch. */
#ifndef PHI_KERNELS_H
#define PHI_KERNELS_H

#include "phi.h"

enum {
    PHI_Q8_BLOCK = 32,    /* activations that share a scale */
    PHI_SUM_BLOCK = 16,   /* activations whose sum is kept: the smallest sub-block of a weight type */
    PHI_TILED_BLOCK = 256, /* tiled activations that share a scale */
    PHI_TILED_LOW_STEPS = 254, /* steps of the low part of a tiled activation in one of the high part */
    PHI_TILE_TOKENS = 16, /* tokens of a tile of tiled activations, and bytes of each: columns in int8 */
    PHI_TILE_COLS = 64,
    PHI_TILED_TASK_ROWS = 256,      /* rows that products of tiled activations like best */
    PHI_KV_BLOCK = 32,        /* dimensions that share a scale in an int8 page */
    PHI_KV_GROUP = 16,        /* positions that lie side by side in a key page */
    PHI_ATTENTION_ROWS = 64,  /* (token, query head) pairs that share a walk through the pages; tokens a call */
    PHI_ATTENTION_BLOCK = 64, /* positions between two looks at the largest score; a multiple of PHI_PAGE_TOKENS */
    PHI_ALIGN_BYTES = 64,
};

/* n numbers as int8 with a scale for each PHI_Q8_BLOCK, and what products want to know of them. */
typedef struct {
    int8_t *quants;    /* [n], -127..127 */
    float *scales;     /* [n / PHI_Q8_BLOCK]: x = scale * quant */
    float *sums;       /* [n / PHI_SUM_BLOCK]: scale * sum of the sub-block's quants */
    float *block_sums; /* [n / PHI_Q8_BLOCK]: the same of the block */
    int32_t *offsets;  /* [n / PHI_SUM_BLOCK]: -128 * sum of the sub-block's quants, which takes 128 off the other */
    int32_t *block_offsets; /* [n / PHI_Q8_BLOCK]   factor of an integer product; the same of the block */
} phi_q8;

/* From an element on that begins a block. */
static inline phi_q8 phi_q8_at(phi_q8 q, size_t element) {
    return (phi_q8){q.quants + element,
                    q.scales + element / PHI_Q8_BLOCK,
                    q.sums + element / PHI_SUM_BLOCK,
                    q.block_sums + element / PHI_Q8_BLOCK,
                    q.offsets + element / PHI_SUM_BLOCK,
                    q.block_offsets + element / PHI_Q8_BLOCK};
}

/* Activations as products of many tokens take them, in tiles of [PHI_TILE_TOKENS, PHI_TILE_COLS] bytes: by 256 columns,
 * so that what these need of all tokens lies together, then by 16 tokens.
 * amx: int8 in two parts, x = scale * (high + low / PHI_TILED_LOW_STEPS), four tiles of the high one, then of the low one;
 * amxbf16: eight tiles of bf16, which have half as many columns, and no scales. */
typedef struct {
    int8_t *tiles;   /* [n_cols / PHI_TILED_BLOCK, n_tokens / PHI_TILE_TOKENS, 8] */
    float *scales;   /* [n_cols / PHI_TILED_BLOCK, n_tokens] */
    size_t n_tokens; /* whole tiles of them; those that fill up may hold anything */
} phi_tiled;

static inline size_t phi_tiled_tokens(size_t n_tokens) {
    return (n_tokens + PHI_TILE_TOKENS - 1) / PHI_TILE_TOKENS * PHI_TILE_TOKENS;
}
static inline size_t phi_tiled_bytes(size_t n_tokens, size_t n_cols) { return phi_tiled_tokens(n_tokens) * 2 * n_cols; }
static inline size_t phi_tiled_n_scales(size_t n_tokens, size_t n_cols) {
    return phi_tiled_tokens(n_tokens) * n_cols / PHI_TILED_BLOCK;
}

/* A token's row in the first tile of 256 columns. */
static inline int8_t *phi_tiled_row(const phi_tiled *w, size_t block, size_t token) {
    const size_t row = token % PHI_TILE_TOKENS;
    return w->tiles + phi_tiled_bytes(block * w->n_tokens + token - row, PHI_TILED_BLOCK) + row * PHI_TILE_COLS;
}

/* Activations of n_tokens tokens. */
typedef struct {
    int n_cols;
    float *f32; /* [n_tokens, n_cols] */
    phi_q8 q8;  /* of n_tokens * n_cols; for PHI_ACTIVATION_Q8 products only */
    /* The same once more, as the tier's quantize_tiled writes them. Tiles are NULL where it has none, n_cols is no
     * multiple of PHI_TILED_BLOCK, or the tokens are few. */
    phi_tiled tiled;
} phi_activations;

/* Prefetch distances ahead of the weights being multiplied, in bytes; 0: no prefetch. */
typedef struct {
    size_t l1_bytes;        /* into L1, for batches of any size */
    size_t l2_bytes;        /* into L2, for two or more tokens */
    size_t decode_l2_bytes; /* into L2, for a single token */
} phi_prefetch;

/* out[t, r] = dot(row r of the weights, activations of token t) */
typedef struct {
    const uint8_t *rows; /* [n_rows, row_bytes]; [n_rows / 16, 16 * row_bytes] when packed */
    size_t row_bytes;
    int n_rows, n_cols;
    const phi_activations *x; /* of tokens first_token .. first_token + n_tokens - 1 */
    int first_token, n_tokens;
    float *out;            /* [n_tokens, out_stride], row r in column r */
    size_t out_stride;     /* floats */
    phi_prefetch prefetch; /* by products of few tokens with packed rows */
} phi_matmul;

/* Attention of the query heads that share a key/value head, for tokens at consecutive positions of one sequence. */
typedef struct {
    const float *q; /* [n_tokens, n_queries, head_dim], token_stride floats from a token to the next */
    int n_tokens, n_queries, head_dim;
    size_t token_stride;
    const uint8_t *pages; /* the head's keys and values in page 0 */
    size_t page_bytes;    /* from a page to the next */
    const int32_t *page_table;
    int last;       /* position of the first token, which is the last one that it sees */
    int window;     /* positions that a token sees, itself included; 0: all */
    float scale;    /* multiplies the scores */
    float *scratch; /* [phi_attention_scratch_floats] */
    float *out;     /* as q */
} phi_attention;

static inline int phi_first_visible(int position, int window) {
    return window > 0 && position >= window ? position + 1 - window : 0;
}

/* Scratch of attention: of each row, in tiles of up to eight, its weights in a block, its weighted values and its
 * query; of all rows a page's keys, or 32 dimensions of a block's values, as floats. */
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

/* 16 rows of the file layout to a panel of 16 * row_bytes */
typedef void (*phi_pack_fn)(const uint8_t *rows, size_t row_bytes, uint8_t *panel);

struct phi_kernels {
    const char *name;
    phi_prefetch prefetch; /* for phi_matmul; dispatch.c sets it, since it depends on who made the CPU */
    /* Products of more tokens than these may round otherwise than those of one token do; 0: none does. */
    int max_exact_batch;
    /* y[i] = element i of a row of blocks */
    void (*dequantize[PHI_N_TYPES])(const void *row, size_t n, float *y);
    void (*matmul[PHI_N_TYPES])(const phi_matmul *m);
    /* NULL for types that are run from the file layout. */
    phi_pack_fn pack[PHI_N_TYPES];
    void (*matmul_packed[PHI_N_TYPES])(const phi_matmul *m);  /* n_rows is a multiple of 16 */
    void (*quantize_q8)(const float *x, size_t n, phi_q8 q8); /* n is a multiple of PHI_Q8_BLOCK */
    /* Whether matmul_packed takes tiled activations, of more than max_exact_batch tokens, and no others then. */
    bool takes_tiled[PHI_N_TYPES];
    /* x [n_cols] -> tiled activations of a token. NULL: no product takes them. */
    void (*quantize_tiled)(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token);
    /* y = x / rms(x) * weight */
    void (*rms_norm)(const float *x, const float *weight, size_t n, float eps, float *y);
    /* y = (x - mean(x)) / deviation(x) * weight + bias */
    void (*layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float eps, float *y);
    /* x [head_dim] in place; cos, sin [rope_dims / 2] */
    void (*rope[2])(float *x, int rope_dims, const float *cos, const float *sin); /* by phi_rope_style */
    /* y = silu(gate) * up; y may be gate */
    void (*silu_mul)(const float *gate, const float *up, size_t n, float *y);
    /* y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))); y may be x */
    void (*gelu)(const float *x, size_t n, float *y);
    void (*add)(const float *x, size_t n, float *y); /* y += x */
    /* one position's key and value into a page's head */
    void (*store_kv[PHI_N_KV_TYPES])(const float *k, const float *v, int head_dim, int slot, uint8_t *slice);
    void (*attention[PHI_N_KV_TYPES])(const phi_attention *a);
};

extern const phi_kernels phi_kernels_scalar;
#ifdef PHI_HAVE_AVX2
extern const phi_kernels phi_kernels_avx2;
extern const phi_kernels phi_kernels_avxvnni; /* where the compiler knows it: PHI_HAVE_AVXVNNI */
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

/* One head in a page: keys [PHI_PAGE_TOKENS / 16, head_dim, 16], then values [PHI_PAGE_TOKENS, head_dim]. In int8 these
 * are followed by half precision scales, of keys [n_blocks, PHI_PAGE_TOKENS] and of values [PHI_PAGE_TOKENS, n_blocks].
 */
static inline size_t phi_kv_blocks(int head_dim) { return ((size_t)head_dim + PHI_KV_BLOCK - 1) / PHI_KV_BLOCK; }
static inline size_t phi_kv_slice_bytes(phi_kv_type type, int head_dim) {
    const size_t n = (size_t)PHI_PAGE_TOKENS * (size_t)head_dim * 2;
    if (type == PHI_KV_F16) return n * sizeof(uint16_t);
    return n + PHI_PAGE_TOKENS * phi_kv_blocks(head_dim) * 2 * sizeof(uint16_t);
}

/* Where a head's parts lie in a page. */
typedef struct {
    uint8_t *keys, *values;
    uint16_t *key_scales, *value_scales; /* NULL in half precision */
} phi_kv_slice;

static inline phi_kv_slice phi_kv_slice_of(phi_kv_type type, int head_dim, uint8_t *slice) {
    const size_t n = (size_t)PHI_PAGE_TOKENS * (size_t)head_dim;
    if (type == PHI_KV_F16) return (phi_kv_slice){slice, slice + n * sizeof(uint16_t), NULL, NULL};
    uint16_t *scales = (uint16_t *)(void *)(slice + 2 * n);
    return (phi_kv_slice){slice, slice + n, scales, scales + PHI_PAGE_TOKENS * phi_kv_blocks(head_dim)};
}

#endif
