/* phi-c's C API: load weights into a phi_model, create a KV cache, and run batches of tokens with phi_forward.
 *
 * Conventions
 * - Shapes are written [slowest, ..., fastest]. Matrices are row-major, with quantised blocks along the columns.
 * - Sizes and offsets in bytes are size_t; counts and indices are int or int32_t.
 * - The caller validates all arguments (in phi-c, the Cython layer). A phi_status reports what can fail at run time; an
 *   invalid argument is undefined behaviour.
 * - A model borrows its weights and its thread pool: they must outlive it, and phi-c never frees them.
 * - A thread pool runs one call at a time. Calls that use the same pool or the same KV cache must not overlap. */
#ifndef PHI_H
#define PHI_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    PHI_OK = 0,
    PHI_CANCELLED,        /* poll returned true; the batch's positions in the KV cache are undefined */
    PHI_OUT_OF_MEMORY,    /* an allocation failed */
    PHI_NO_THREADS,       /* a thread could not be started */
    PHI_TIER_UNAVAILABLE, /* the instruction-set tier is unknown, or this machine cannot run it */
} phi_status;

/* ---- tensor types ---- */

/* Format of the activations that a matrix multiplication reads (vec_dot_type in ggml). */
typedef enum {
    PHI_ACTIVATION_F32, /* float32 */
    PHI_ACTIVATION_Q8,  /* int8, with one float32 scale per 32 activations */
} phi_activation_format;

/* PHI_TYPE_F32, PHI_TYPE_Q4_K, ...: one per row of tensor_types.def */
typedef enum {
#define PHI_TYPE(name, gguf_id, block_elements, block_bytes, activation_format) PHI_TYPE_##name,
#include "tensor_types.def"
#undef PHI_TYPE
    PHI_N_TYPES
} phi_type;

typedef struct {
    const char *name;   /* "Q4_K" */
    int gguf_id;        /* the type's number in a GGUF file (enum ggml_type) */
    int block_elements; /* weights per block */
    int block_bytes;    /* bytes per block */
    phi_activation_format activation_format;
} phi_type_traits;

extern const phi_type_traits phi_types[PHI_N_TYPES];

/* Bytes of one row of n_cols weights; n_cols is a multiple of the type's block_elements. */
static inline size_t phi_row_bytes(phi_type type, size_t n_cols) {
    return n_cols / (size_t)phi_types[type].block_elements * (size_t)phi_types[type].block_bytes;
}

/* ---- machine ---- */

/* The kernels of one instruction-set tier, such as "avx2" (kernels.h). */
typedef struct phi_kernels phi_kernels;

/* Names of all tiers in this build, slowest first, NULL-terminated. */
const char *const *phi_tier_names(void);
/* Whether this CPU and operating system can run the tier. For AMX it requests the use of tile registers. */
bool phi_tier_available(const char *tier);
/* Selects a tier's kernels by name. NULL selects the fastest available tier whose results do not depend on the batch
 * size, which excludes amx and amxbf16. The table is static. Not thread-safe: the first call for a tier fills its
 * table. Returns PHI_OK or PHI_TIER_UNAVAILABLE. */
phi_status phi_select_kernels(const char *tier, const phi_kernels **kernels);
/* The instruction sets that this CPU has and the operating system enables, comma-separated; a static string. */
const char *phi_cpu_features(void);

typedef struct phi_pool phi_pool;
/* Creates a pool of n_threads threads: the calling thread and n_threads - 1 workers, which sleep between calls. */
phi_status phi_pool_create(int n_threads, phi_pool **pool);
void phi_pool_free(phi_pool *pool);
/* Sets how often a waiting thread checks before it sleeps; a check takes 40 to 140 cycles. */
void phi_pool_set_spins(phi_pool *pool, int spins);

/* Monotonic clock in seconds, where the platform has one; only differences are meaningful. */
double phi_seconds(void);
/* Measures memory read bandwidth: all threads of the pool read a buffer of n_bytes together, n_runs times with software
 * prefetch and n_runs times without. Returns the highest rate in bytes per second, or 0 if the buffer cannot be
 * allocated. */
double phi_read_bandwidth(phi_pool *pool, size_t n_bytes, int n_runs);

/* ---- tuning ---- */

/* Software prefetch of weights, ahead of those being multiplied; zeros: none. */
typedef struct {
    size_t l1_bytes; /* distance of the prefetch into L1, in bytes */
    size_t l2_bytes; /* distance of the prefetch into L2, in bytes */
    bool next_page;  /* the first two lines of the next 4 KiB page, where hardware prefetchers stop */
} phi_prefetch;

enum {
    PHI_MAX_SMALL_BATCH = 16,     /* tokens; larger batches always take the prefill path of packed products */
    PHI_DEFAULT_SMALL_BATCH = 10, /* phi_tuning.max_small_batch without measurement */
};

/* Batch sizes that have a prefetch of their own. */
typedef enum {
    PHI_BATCH_1,  /* decode of one sequence */
    PHI_BATCH_4,  /* 2 to 4 tokens */
    PHI_BATCH_8,  /* 5 to 8 tokens */
    PHI_BATCH_16, /* 9 to PHI_MAX_SMALL_BATCH tokens */
    PHI_N_BATCH_CLASSES
} phi_batch_class;

static inline phi_batch_class phi_batch_class_of(int n_tokens) {
    return n_tokens == 1 ? PHI_BATCH_1 : n_tokens <= 4 ? PHI_BATCH_4 : n_tokens <= 8 ? PHI_BATCH_8 : PHI_BATCH_16;
}

/* Settings that change the speed of a model, never its results. */
typedef struct {
    phi_prefetch prefetch[PHI_N_TYPES][PHI_N_BATCH_CLASSES]; /* of packed products */
    /* Largest batch that takes the small-batch path of packed products, 1 to PHI_MAX_SMALL_BATCH tokens. A tier may
     * have a lower limit. */
    int max_small_batch[PHI_N_TYPES];
    int max_task_rows;    /* weight rows per task: 32, 64, 128 or 256; small batches and tiled products have more */
    int tasks_per_thread; /* that a phase is divided into, as far as tasks have 32 rows */
    int spins;            /* of a waiting thread before it sleeps, set by phi_pool_set_spins */
} phi_tuning;

/* The settings without measurement, the same on every CPU. */
phi_tuning phi_default_tuning(void);

/* ---- model ---- */

typedef enum {
    PHI_LAYOUT_ROWS,   /* rows of blocks, as stored in the GGUF file */
    PHI_LAYOUT_PANELS, /* packed: panels of PHI_PANEL_ROWS interleaved rows (kernels/generic/pack.h) */
} phi_layout;

enum { PHI_PANEL_ROWS = 16 };  /* rows per panel of packed weights */
enum { PHI_EXPERTS_USED = 2 }; /* experts per token; SparseMixer is defined for two */

/* A weight matrix [n_rows, n_cols]; a product is x @ matrix.T + bias. */
typedef struct {
    phi_type type;
    phi_layout layout;
    int n_rows, n_cols;
    int row_unit;      /* rows are computed in multiples of row_unit (head_dim for wq, wk, wv); 0: in any number */
    const void *data;  /* n_rows * phi_row_bytes(type, n_cols) bytes, borrowed; unaligned in PHI_LAYOUT_ROWS */
    const float *bias; /* [n_rows]; NULL: no bias */
} phi_matrix;

typedef enum {
    PHI_RMS_NORM,
    PHI_LAYER_NORM,
} phi_norm_kind;

typedef struct {
    const float *weight; /* [n_embd] */
    const float *bias;   /* [n_embd] for PHI_LAYER_NORM, else NULL */
} phi_norm;

typedef enum {
    PHI_FFN_SWIGLU, /* silu(gate) * up */
    PHI_FFN_GELU,   /* gelu(up), tanh approximation; there is no gate */
} phi_ffn_activation;

/* One feed-forward network, or one expert. */
typedef struct {
    phi_matrix gate, up; /* [n_ffn, n_embd] */
    phi_matrix down;     /* [n_embd, n_ffn] */
} phi_feed_forward;

typedef struct {
    phi_norm attn_norm;
    phi_matrix wq;               /* [n_heads * head_dim, n_embd] */
    phi_matrix wk, wv;           /* [n_kv_heads * head_dim, n_embd] */
    phi_matrix wo;               /* [n_embd, n_heads * head_dim] */
    phi_norm ffn_norm;           /* unused if phi_model.parallel */
    phi_matrix router;           /* [n_experts, n_embd]; unused without experts */
    const phi_feed_forward *ffn; /* [n_experts], or [1] without experts */
} phi_layer;

typedef enum {
    PHI_ROPE_NEOX,        /* rotates dimensions i and i + rope_dims / 2 (GPT-NeoX, Hugging Face) */
    PHI_ROPE_INTERLEAVED, /* rotates dimensions 2i and 2i + 1 (GPT-J; GGUF `llama` files, whose q and k are permuted) */
} phi_rope_style;

typedef struct {
    int n_layers, n_embd, n_ffn, n_heads, n_kv_heads, head_dim, n_vocab;
    int rope_dims; /* the first rope_dims of the head_dim dimensions are rotated */
    phi_rope_style rope_style;
    const float *rope_inv_freq;      /* [rope_dims / 2] radians per position */
    const float *rope_inv_freq_long; /* [rope_dims / 2] for phi_sequence.long_rope (LongRoPE) */
    float rope_attn_factor;          /* multiplies cos and sin (LongRoPE); 1: none */
    phi_norm_kind norm_kind;
    float norm_eps;
    phi_ffn_activation ffn_activation;
    bool parallel;         /* parallel residual (GPT-J, Phi-2): attention and feed-forward read the same normed input */
    int n_experts;         /* experts per layer; 0: a single feed-forward */
    int window;            /* sliding window: positions a token attends to, itself included; 0: unlimited */
    phi_matrix token_embd; /* [n_vocab, n_embd], PHI_LAYOUT_ROWS */
    phi_norm output_norm;
    phi_matrix output;       /* [n_vocab, n_embd]: the LM head */
    const phi_layer *layers; /* [n_layers] */
    const phi_kernels *kernels;
    phi_pool *pool;
    phi_tuning tuning;
} phi_model;

/* What phi_tune measured for one tensor type and batch class. */
typedef struct {
    bool measured;          /* else the fields below are 0 */
    phi_prefetch chosen;    /* the fastest candidate, or the default setting if none is clearly faster */
    double default_seconds; /* with the default setting, per byte of weights; median */
    double chosen_seconds;  /* with the choice: default_seconds times the median of the ratios of each round */
    int n_samples;          /* of each */
    bool is_clear;          /* false: another candidate may be faster, but the measurements vary too much to tell */
} phi_tune_result;

typedef struct {
    double seconds;             /* budget */
    bool is_known[PHI_N_TYPES]; /* types whose settings in `tuning` are kept */
    bool (*poll)(void *);       /* called between measurements by the calling thread; true cancels. NULL: never */
    void *poll_context;
    phi_tune_result results[PHI_N_TYPES][PHI_N_BATCH_CLASSES]; /* out */
} phi_tune_call;

/* Chooses the prefetch of each type and batch class by measuring products with the model's own packed weights, which
 * continue where the last measurement ended, so that they come from memory as in decode. Single tokens and the types
 * with the most bytes come first; what the budget does not reach keeps its setting. Types with less than 2 % of the
 * bytes take the setting of the most similar type. Writes to `tuning`; the model's own tuning is not changed.
 *
 * Returns PHI_OK, PHI_CANCELLED, PHI_OUT_OF_MEMORY or PHI_NO_THREADS. */
phi_status phi_tune(const phi_model *model, phi_tune_call *call, phi_tuning *tuning);

/* The candidates of a batch class; *n: their number. The first is the default setting. */
const phi_prefetch *phi_tune_candidates(phi_batch_class batch_class, int *n);

/* Bytes that phi_pack writes for a matrix; 0 if these kernels use it in PHI_LAYOUT_ROWS. */
size_t phi_packed_bytes(const phi_kernels *kernels, const phi_matrix *matrix);

/* A mapped file. Matrices within it are read from fd, without page faults; others, and all on Windows, from memory. */
typedef struct {
    const uint8_t *data; /* [n_bytes], mapped from `offset` of the file; NULL: no file */
    size_t n_bytes, offset;
    int fd; /* open for reading */
} phi_pack_source;

typedef struct {
    const phi_kernels *kernels;
    phi_pool *pool;
    phi_matrix *const *matrices; /* [n_matrices]; those of 0 phi_packed_bytes stay as they are */
    int n_matrices;
    uint8_t *memory; /* out [sum of phi_packed_bytes], in the order of the matrices; aligned to 64 bytes */
    phi_pack_source source;
    bool (*poll)(void *); /* called every few milliseconds by the calling thread; true cancels. NULL: never */
    void *poll_context;   /* argument of poll */
} phi_packing;
/* Packs matrices and sets their layout and data as phi_use_packed does. PHI_OK, PHI_CANCELLED or PHI_NO_THREADS: then
 * the matrices are unchanged. */
phi_status phi_pack(const phi_packing *packing);
/* Sets the layout and data of matrices to what phi_pack has written to memory, which they borrow. */
void phi_use_packed(const phi_kernels *kernels, phi_matrix *const *matrices, int n_matrices, const uint8_t *memory);

/* Quantises x [n_rows, n_cols], which must be finite, to out [n_rows, phi_row_bytes(type, n_cols)]. Searches for scales
 * that minimise the squared error, weighted by importance [n_cols] (at least 0; NULL: equal weights). The result does
 * not depend on the number of threads. */
phi_status phi_quantize_rows(phi_pool *pool, phi_type type, const float *x, size_t n_rows, size_t n_cols,
                             const float *importance, void *out);

/* ---- KV cache ---- */

enum { PHI_PAGE_TOKENS = 32 };    /* positions per page */
enum { PHI_KV_PAGE_VERSION = 1 }; /* of the page layout; increment it with every change, since files contain pages */

typedef enum {
    PHI_KV_F16, /* half precision */
    PHI_KV_Q8,  /* int8, with one half-precision scale per position and 32 dimensions */
    PHI_N_KV_TYPES
} phi_kv_type;

/* A KV cache: n_pages pages of keys and values for all layers. The caller allocates pages to sequences. */
typedef struct phi_kv phi_kv;
/* Bytes per page. */
size_t phi_kv_page_bytes(const phi_model *model, phi_kv_type type);
/* Creates a cache of zeroed pages. The operating system provides memory as pages are first written. */
phi_status phi_kv_create(const phi_model *model, phi_kv_type type, int n_pages, phi_kv **kv);
void phi_kv_free(phi_kv *kv);
/* A page's content [phi_kv_page_bytes], to save and restore it. */
uint8_t *phi_kv_page(const phi_model *model, const phi_kv *kv, int page);

/* ---- forward pass ---- */

typedef struct {
    const int32_t *pages; /* page table: position p is stored in page pages[p / PHI_PAGE_TOKENS] */
    bool long_rope;       /* rotate by rope_inv_freq_long */
} phi_sequence;

/* Collects activation statistics for an importance matrix: per input column of a weight matrix, the sum over tokens of
 * the squared activation, before it is quantised. Matrices with the same input share their sums. Tokens are added in
 * batch order, in double precision, so the sums depend neither on the number of threads nor, up to max_exact_batch
 * (kernels.h), on how the tokens are split into batches. */
typedef struct {
    double *attn_in;        /* [n_layers, n_embd]: input of wq, wk, wv */
    double *attn_out;       /* [n_layers, n_heads * head_dim]: input of wo */
    double *ffn_in;         /* [n_layers, n_embd]: input of gate and up, or of the router */
    double *ffn_inner;      /* [n_layers, n_ffn]: input of down; unused with experts */
    double *expert_in;      /* [n_layers, n_experts, n_embd]: input of an expert's gate and up */
    double *expert_inner;   /* [n_layers, n_experts, n_ffn]: input of an expert's down */
    int64_t *expert_tokens; /* [n_layers, n_experts]: tokens routed to an expert */
    double *output;         /* [n_embd]: input of output, for every token of the batch; NULL: not collected */
} phi_observer;

/* PHI_PHASE_QKV, ...: one per row of phases.def */
typedef enum {
#define PHI_PHASE(name, text) PHI_PHASE_##name,
#include "phases.def"
#undef PHI_PHASE
    PHI_N_PHASES
} phi_phase;

extern const char *const phi_phase_names[PHI_N_PHASES];

/* Collects the time of each phase on each thread, added up over its occurrences. The times of a thread add up to the
 * duration of the call. */
typedef struct {
    double *working;     /* [n_threads, PHI_N_PHASES] seconds of computing */
    double *waiting;     /* [n_threads, PHI_N_PHASES] seconds at the barrier that ends the phase */
    int64_t *n_barriers; /* [PHI_N_PHASES] barriers that ended the phase */
} phi_timings;

/* Tokens of one or more sequences. The cache holds the keys and values of all earlier positions of each sequence. */
typedef struct {
    int n_tokens;
    const int32_t *tokens;         /* [n_tokens] token ids */
    const int32_t *positions;      /* [n_tokens], ascending within a sequence */
    const int32_t *seq_ids;        /* [n_tokens] indices into sequences */
    const phi_sequence *sequences; /* [number of sequences] */
    int n_logit_rows;
    const int32_t *logit_rows;    /* [n_logit_rows] indices of tokens to return outputs for, in any order */
    float *logits;                /* out [n_logit_rows, n_vocab]; NULL: not computed */
    float *hidden_states;         /* out [n_logit_rows, n_embd]: input of the LM head, after output_norm; or NULL */
    bool (*poll)(void *);         /* called once per layer by the calling thread; true cancels the pass. NULL: never */
    void *poll_context;           /* argument of poll */
    const phi_observer *observer; /* NULL: no statistics. A cancelled batch may have been added in part */
    const phi_timings *timings;   /* NULL: the clock is not read. A cancelled batch has been added in part */
} phi_batch;

/* Runs a batch: writes its keys and values to the cache and its outputs to logits and hidden_states.
 *
 * A token attends to the positions of its sequence up to its own, in the cache and in this batch. Its outputs have the
 * same bits whatever else is in the batch: alone, in a chunk of a prompt, or among other sequences. On the tiers amx
 * and amxbf16 this holds for batches of at most max_exact_batch (16) tokens; larger ones use products that round
 * differently.
 *
 * Returns PHI_OK, PHI_CANCELLED, PHI_OUT_OF_MEMORY or PHI_NO_THREADS. */
phi_status phi_forward(const phi_model *model, phi_kv *kv, const phi_batch *batch);

/* Runs the LM head alone: logits [n_rows, n_vocab] of hidden_states [n_rows, n_embd] from phi_forward, with the same
 * bits as those of phi_forward (amx, amxbf16: if both calls have at most max_exact_batch rows, or both have more). With
 * it, the logits of many positions can be computed in chunks. Working memory is the cache's scratch buffer. */
phi_status phi_lm_head(const phi_model *model, phi_kv *kv, int n_rows, const float *hidden_states, float *logits);

#endif
