/* phi-c's C API: a model, its KV cache, and one call that runs a batch of tokens through the model.
 *
 * Shapes are written [slowest, ..., fastest]; matrices are row-major with quantised blocks along the columns.
 * Everything is validated by the caller (the Python edge): what this API returns is a status, and an assert that
 * fails in it is our bug. Nothing here is freed behind the caller's back: a model borrows its weights. */
#ifndef PHI_H
#define PHI_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    PHI_OK = 0,
    PHI_CANCELLED,     /* the batch's poll function asked to stop; the KV cache rows of the batch are undefined */
    PHI_OUT_OF_MEMORY, /* an allocation failed */
    PHI_NO_SUCH_TIER,  /* the instruction-set tier is unknown, or this machine lacks it */
} phi_status;

/* ---- tensor types ---- */

typedef enum {
    PHI_ACTIVATION_F32, /* products with this type take float activations */
    PHI_ACTIVATION_Q8,  /* ... int8 activations with a float scale per 32 */
} phi_activation_format;

typedef enum {
#define PHI_TYPE(name, gguf_id, block_elements, block_bytes, activation) PHI_TYPE_##name,
#include "tensor_types.def"
#undef PHI_TYPE
    PHI_N_TYPES
} phi_type;

typedef struct {
    const char *name;
    int gguf_id;        /* the number that stands for the type in a GGUF file */
    int block_elements; /* elements a block */
    int block_bytes;
    phi_activation_format activation;
} phi_type_traits;

extern const phi_type_traits phi_types[PHI_N_TYPES];

static inline size_t phi_row_bytes(phi_type type, size_t n_cols) {
    return n_cols / (size_t)phi_types[type].block_elements * (size_t)phi_types[type].block_bytes;
}

/* ---- machine ---- */

typedef struct phi_kernels phi_kernels;

/* The tiers that this build knows, worst first, NULL-terminated; available: this CPU and system can run it, which for
 * tile registers the process must ask the system. */
const char *const *phi_tier_names(void);
bool phi_tier_available(const char *tier);
/* The table of a tier; for NULL the best available one of those that are chosen without being asked for. */
phi_status phi_select_kernels(const char *tier, const phi_kernels **kernels);
/* Comma-separated instruction sets that detection found. */
const char *phi_cpu_features(void);

typedef struct phi_pool phi_pool;
/* A pool of n_threads, the calling thread among them: n_threads - 1 workers are started, asleep between runs. */
phi_status phi_pool_create(int n_threads, phi_pool **pool);
void phi_pool_free(phi_pool *pool);

/* Seconds on the system's clock. */
double phi_seconds(void);
/* Reads a buffer of n_bytes with every thread of the pool; bytes per second, the best of n_runs. 0 when out of memory.
 */
double phi_read_bandwidth(phi_pool *pool, size_t n_bytes, int n_runs);

/* ---- model ---- */

typedef enum {
    PHI_LAYOUT_ROWS,   /* rows of blocks, as in the file */
    PHI_LAYOUT_PANELS, /* 16 rows interleaved (kernels/generic/pack.h) */
} phi_layout;

enum { PHI_PANEL_ROWS = 16 };
enum { PHI_EXPERTS_USED = 2 }; /* experts that run for a token: what SparseMixer is made for */

typedef struct {
    phi_type type;
    phi_layout layout;
    int n_rows, n_cols;
    int row_unit;      /* products take multiples of so many rows, those of a head; 0: of as many as they like */
    const void *data;  /* n_rows * phi_row_bytes(type, n_cols) bytes, borrowed; may be unaligned in the file layout */
    const float *bias; /* [n_rows], added to what the product gives; NULL: none */
} phi_matrix;

typedef enum {
    PHI_RMS_NORM,
    PHI_LAYER_NORM, /* takes the mean away, and adds a bias */
} phi_norm_kind;

typedef struct {
    const float *weight; /* [n_embd] */
    const float *bias;   /* [n_embd] of PHI_LAYER_NORM, else NULL */
} phi_norm;

typedef enum {
    PHI_FFN_SWIGLU, /* silu(gate) * up */
    PHI_FFN_GELU,   /* gelu(up), in the form with tanh: there is no gate */
} phi_ffn_activation;

typedef struct {
    phi_matrix gate, up; /* [n_ffn, n_embd] */
    phi_matrix down;     /* [n_embd, n_ffn] */
} phi_feed_forward;

typedef struct {
    phi_norm attn_norm;
    phi_matrix wq;               /* [n_heads * head_dim, n_embd] */
    phi_matrix wk, wv;           /* [n_kv_heads * head_dim, n_embd] */
    phi_matrix wo;               /* [n_embd, n_heads * head_dim] */
    phi_norm ffn_norm;           /* unused where attention and feed-forward are parallel */
    phi_matrix router;           /* [n_experts, n_embd], of models with experts */
    const phi_feed_forward *ffn; /* [n_experts], or the one there is */
} phi_layer;

typedef enum {
    PHI_ROPE_NEOX, /* rotates dimension i with i + rope_dims / 2 (Hugging Face) */
    PHI_ROPE_INTERLEAVED, /* rotates dimension 2i with 2i + 1 (GGUF `llama` files, whose q and k rows are permuted) */
} phi_rope_style;

typedef struct {
    int n_layers, n_embd, n_ffn, n_heads, n_kv_heads, head_dim, n_vocab;
    int rope_dims; /* the first rope_dims of head_dim are rotated */
    phi_rope_style rope_style;
    const float *rope_inv_freq;      /* [rope_dims / 2] radians per position */
    const float *rope_inv_freq_long; /* the same beyond the original context (LongRoPE) */
    float rope_attn_factor;          /* multiplies cos and sin (LongRoPE) */
    phi_norm_kind norm_kind;
    float norm_eps;
    phi_ffn_activation activation;
    bool parallel;         /* attention and feed-forward read the same normed input (GPT-J) */
    int n_experts;         /* of which PHI_EXPERTS_USED run for a token; 0: none, one feed-forward for all */
    int window;            /* positions that a token sees, itself included; 0: all */
    phi_matrix token_embd; /* [n_vocab, n_embd] */
    phi_norm output_norm;
    phi_matrix output;       /* [n_vocab, n_embd] */
    const phi_layer *layers; /* [n_layers] */
    const phi_kernels *kernels;
    phi_pool *pool;
} phi_model;

/* Repacks matrices, in place, from the file layout into the one that the model's kernels like best.
 * phi_packed_bytes is what a matrix takes: 0 where it stays as it is. memory [that many bytes], aligned to 64. */
size_t phi_packed_bytes(const phi_kernels *kernels, const phi_matrix *matrix);
phi_status phi_pack(const phi_kernels *kernels, phi_pool *pool, phi_matrix *matrix, uint8_t *memory);

/* Writes rows of a type, out [n_rows * phi_row_bytes(type, n_cols)] bytes, that are near to finite x [n_rows, n_cols]:
 * the squares of their errors, weighted by importance [n_cols] (not negative; NULL: all alike), are small. The bytes
 * do not depend on the number of threads. */
phi_status phi_quantize_rows(phi_pool *pool, phi_type type, const float *x, size_t n_rows, size_t n_cols,
                             const float *importance, void *out);

/* ---- KV cache ---- */

enum { PHI_PAGE_TOKENS = 32 };    /* positions a page */
enum { PHI_KV_PAGE_VERSION = 1 }; /* of what lies where in a page; pages are kept in files */

typedef enum {
    PHI_KV_F16, /* half precision */
    PHI_KV_Q8,  /* int8, with a half precision scale for each 32 dimensions of a position */
    PHI_N_KV_TYPES
} phi_kv_type;

/* Pages of keys and values. Which page belongs to whom is the caller's business. */
typedef struct phi_kv phi_kv;
size_t phi_kv_page_bytes(const phi_model *model, phi_kv_type type);
phi_status phi_kv_create(const phi_model *model, phi_kv_type type, int n_pages, phi_kv **kv);
void phi_kv_free(phi_kv *kv);
/* All that a page holds: [phi_kv_page_bytes], whatever the positions in it. */
uint8_t *phi_kv_page(const phi_model *model, const phi_kv *kv, int page);

/* ---- forward ---- */

typedef struct {
    const int32_t *pages; /* [pages in use]: position p lies in page pages[p / PHI_PAGE_TOKENS] */
    bool long_rope;       /* rotate with rope_inv_freq_long */
} phi_sequence;

/* What products are fed: for each column of a matrix, the sum over tokens of the input's square before it is rounded.
 * Matrices that share an input share its sums. A batch adds its tokens in their order, in double, so the bits depend
 * neither on the number of threads nor, where products do not, on how a text is cut into batches. */
typedef struct {
    double *attn_in;        /* [n_layers, n_embd]: of wq, wk, wv */
    double *attn_out;       /* [n_layers, n_heads * head_dim]: of wo */
    double *ffn_in;         /* [n_layers, n_embd]: of gate, up, or the router */
    double *ffn_inner;      /* [n_layers, n_ffn]: of down; unused with experts */
    double *expert_in;      /* [n_layers, n_experts, n_embd]: of the experts' gate, up */
    double *expert_inner;   /* [n_layers, n_experts, n_ffn]: of the experts' down */
    int64_t *expert_tokens; /* [n_layers, n_experts]: tokens that they ran for */
    double *output; /* [n_embd]: of output, of all tokens whether or not their logits are wanted; NULL: not summed */
} phi_observer;

typedef struct {
    int n_tokens;
    const int32_t *tokens;    /* [n_tokens] vocabulary ids */
    const int32_t *positions; /* [n_tokens] ascending within a sequence */
    const int32_t *sequences; /* [n_tokens] index into seqs */
    const phi_sequence *seqs;
    int n_logit_rows;
    const int32_t *logit_rows; /* [n_logit_rows] tokens of the batch whose logits are wanted */
    float *logits;             /* out [n_logit_rows, n_vocab], or NULL */
    float *hidden_states;         /* out [n_logit_rows, n_embd], what the head takes: after the final norm; or NULL */
    bool (*poll)(void *);      /* asked between layers; true: stop. NULL: never */
    void *poll_context;
    const phi_observer *observer; /* NULL: nobody looks, at no cost. What a cancelled batch has added stays added */
} phi_batch;

/* Runs the batch: appends its keys and values to the cache and writes the logits asked for. A token sees the
 * positions before it in its sequence, those of this batch included. A token's result does not depend on what else
 * is in the batch: the bits are the same alone, in a chunk, or among other sequences. (On the tiers amx and amxbf16 in
 * batches of at most 16 tokens; larger ones take products that round otherwise.) */
phi_status phi_forward(const phi_model *model, phi_kv *kv, const phi_batch *batch);

/* The head alone: logits [n_rows, n_vocab] of hidden_states [n_rows, n_embd] that phi_forward gave, the same bits that it
 * would have given. So logits of many positions are had a few rows at a time. kv lends its working memory. */
phi_status phi_lm_head(const phi_model *model, phi_kv *kv, int n_rows, const float *rows, float *logits);

#endif
