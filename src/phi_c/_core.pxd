# The parts of csrc/ that _core.pyx uses. The headers document them.

from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t

cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"

cdef extern from "phi.h":
    ctypedef enum phi_status:
        PHI_OK
        PHI_CANCELLED
        PHI_OUT_OF_MEMORY
        PHI_NO_THREADS
        PHI_TIER_UNAVAILABLE
    ctypedef enum phi_activation_format:
        PHI_ACTIVATION_F32
        PHI_ACTIVATION_Q8
    ctypedef int phi_type
    ctypedef struct phi_type_traits:
        const char *name
        int gguf_id
        int block_elements
        int block_bytes
        phi_activation_format activation_format
    const int PHI_N_TYPES
    const int PHI_PAGE_TOKENS
    const int PHI_KV_PAGE_VERSION
    const phi_type_traits phi_types[]
    size_t phi_row_bytes(phi_type type, size_t n_cols) nogil

    ctypedef struct phi_prefetch:
        size_t l1_bytes, l2_bytes
        c_bool next_page
    const int PHI_N_BATCH_CLASSES
    const int PHI_MAX_SMALL_BATCH
    ctypedef enum phi_batch_class:
        PHI_BATCH_1
    phi_batch_class phi_batch_class_of(int n_tokens) nogil
    ctypedef struct phi_tuning:
        phi_prefetch prefetch[32][4]
        int max_small_batch[32]
        int max_task_rows
        int tasks_per_thread
        int spins
    phi_tuning phi_default_tuning() nogil
    ctypedef struct phi_q8:
        int8_t *quants
        float *scales
        float *sums
        float *block_sums
        int32_t *offsets
        int32_t *block_offsets
    ctypedef struct phi_tiled:
        int8_t *tiles
        float *scales
        size_t n_tokens
    ctypedef struct phi_peak:
        double (*run)(size_t n_steps) noexcept nogil
        int macs
    ctypedef struct phi_kernels:
        const char *name
        int max_exact_batch
        void (*dequantize[32])(const void *row, size_t n, float *y) noexcept nogil
        void (*matmul[32])(const phi_matmul *m) noexcept nogil
        void (*matmul_packed[32])(const phi_matmul *m) noexcept nogil
        void (*quantize_q8)(const float *x, size_t n, phi_q8 q8) noexcept nogil
        void (*quantize_tiled)(const float *x, size_t n_cols, const phi_tiled *tiled, size_t token) noexcept nogil
        void (*rms_norm)(const float *x, const float *weight, size_t n, float eps, float *y) noexcept nogil
        void (*rope[2])(float *x, int rope_dims, const float *cos, const float *sin) noexcept nogil
        void (*layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float eps,
                           float *y) noexcept nogil
        void (*gelu)(const float *x, size_t n, float *y) noexcept nogil
        void (*silu_mul)(const float *gate, const float *up, size_t n, float *y) noexcept nogil
        void (*add)(const float *x, size_t n, float *y) noexcept nogil
        void (*store_kv[2])(const float *k, const float *v, int head_dim, int slot, uint8_t *page) noexcept nogil
        void (*attention[2])(const phi_attention *a) noexcept nogil
        phi_peak peak[2]
    const char *const *phi_tier_names()
    c_bool phi_tier_available(const char *tier)
    phi_status phi_select_kernels(const char *tier, const phi_kernels **kernels)
    const char *phi_cpu_features()

    ctypedef struct phi_pool:
        pass
    phi_status phi_pool_create(int n_threads, phi_pool **pool) nogil
    void phi_pool_free(phi_pool *pool) nogil
    void phi_pool_set_spins(phi_pool *pool, int spins) nogil
    double phi_seconds() nogil
    double phi_read_bandwidth(phi_pool *pool, size_t n_bytes, int n_runs) nogil

    ctypedef enum phi_layout:
        PHI_LAYOUT_ROWS
        PHI_LAYOUT_PANELS
    ctypedef struct phi_matrix:
        phi_type type
        phi_layout layout
        int n_rows, n_cols
        int row_unit
        const void *data
        const float *bias
    ctypedef enum phi_norm_kind:
        PHI_RMS_NORM
        PHI_LAYER_NORM
    ctypedef struct phi_norm:
        const float *weight
        const float *bias
    ctypedef enum phi_ffn_activation:
        PHI_FFN_SWIGLU
        PHI_FFN_GELU
    ctypedef struct phi_feed_forward:
        phi_matrix gate, up, down
    ctypedef struct phi_layer:
        phi_norm attn_norm
        phi_matrix wq, wk, wv, wo
        phi_norm ffn_norm
        phi_matrix router
        phi_feed_forward *ffn
    ctypedef enum phi_rope_style:
        PHI_ROPE_NEOX
        PHI_ROPE_INTERLEAVED
    ctypedef struct phi_model:
        int n_layers, n_embd, n_ffn, n_heads, n_kv_heads, head_dim, n_vocab
        int rope_dims
        phi_rope_style rope_style
        const float *rope_inv_freq
        const float *rope_inv_freq_long
        float rope_attn_factor
        phi_norm_kind norm_kind
        float norm_eps
        phi_ffn_activation ffn_activation
        c_bool parallel
        int n_experts
        int window
        phi_matrix token_embd
        phi_norm output_norm
        phi_matrix output
        const phi_layer *layers
        const phi_kernels *kernels
        phi_pool *pool
        phi_tuning tuning

    ctypedef struct phi_tune_result:
        c_bool measured
        phi_prefetch chosen
        double default_seconds
        double chosen_seconds
        int n_samples
        c_bool is_clear
    ctypedef struct phi_tune_call:
        double seconds
        c_bool is_known[32]
        c_bool (*poll)(void *) noexcept nogil
        void *poll_context
        phi_tune_result results[32][4]
    phi_status phi_tune(const phi_model *model, phi_tune_call *call, phi_tuning *tuning) nogil
    const phi_prefetch *phi_tune_candidates(phi_batch_class batch_class, int *n) nogil

    size_t phi_packed_bytes(const phi_kernels *kernels, const phi_matrix *matrix) nogil
    ctypedef struct phi_pack_source:
        const uint8_t *data
        size_t n_bytes, offset
        int fd
    ctypedef struct phi_packing:
        const phi_kernels *kernels
        phi_pool *pool
        phi_matrix **matrices
        int n_matrices
        uint8_t *memory
        phi_pack_source source
        c_bool (*poll)(void *) noexcept nogil
        void *poll_context
    phi_status phi_pack(const phi_packing *packing) nogil
    void phi_use_packed(const phi_kernels *kernels, phi_matrix **matrices, int n_matrices, const uint8_t *memory) nogil

    phi_status phi_quantize_rows(phi_pool *pool, phi_type type, const float *x, size_t n_rows, size_t n_cols,
                                 const float *importance, void *out) nogil

    ctypedef enum phi_kv_type:
        PHI_KV_F16
        PHI_KV_Q8
    ctypedef struct phi_kv:
        pass
    size_t phi_kv_page_bytes(const phi_model *model, phi_kv_type type) nogil
    phi_status phi_kv_create(const phi_model *model, phi_kv_type type, int n_pages, phi_kv **kv) nogil
    void phi_kv_free(phi_kv *kv) nogil
    uint8_t *phi_kv_page(const phi_model *model, const phi_kv *kv, int page) nogil

    ctypedef struct phi_sequence:
        const int32_t *pages
        c_bool long_rope
    ctypedef struct phi_observer:
        double *attn_in
        double *attn_out
        double *ffn_in
        double *ffn_inner
        double *expert_in
        double *expert_inner
        int64_t *expert_tokens
        double *output
    const int PHI_N_PHASES
    const char *const phi_phase_names[]
    ctypedef struct phi_timings:
        double *working
        double *waiting
        int64_t *n_barriers
    ctypedef struct phi_batch:
        int n_tokens
        const int32_t *tokens
        const int32_t *positions
        const int32_t *seq_ids
        const phi_sequence *sequences
        int n_logit_rows
        const int32_t *logit_rows
        float *logits
        float *hidden_states
        c_bool (*poll)(void *) noexcept nogil
        void *poll_context
        const phi_observer *observer
        const phi_timings *timings
    phi_status phi_forward(const phi_model *model, phi_kv *kv, const phi_batch *batch) nogil
    phi_status phi_lm_head(const phi_model *model, phi_kv *kv, int n_rows, const float *hidden_states,
                           float *logits) nogil

cdef extern from "kernels.h":
    ctypedef struct phi_activations:
        int n_cols
        float *f32
        phi_q8 q8
        phi_tiled tiled
    ctypedef struct phi_matmul:
        const uint8_t *rows
        size_t row_bytes
        int n_rows, n_cols
        const phi_activations *x
        int first_token, n_tokens
        float *out
        size_t out_stride
        phi_prefetch prefetch
        int max_small_batch
    ctypedef struct phi_attention:
        const float *q
        int n_tokens, n_queries, head_dim
        size_t token_stride
        const uint8_t *pages
        size_t page_bytes
        const int32_t *page_table
        int query_start, window
        float scale
        float *scratch
        float *out
    const int PHI_Q8_BLOCK
    const int PHI_SUM_BLOCK
    const int PHI_TILED_BLOCK
    const int PHI_KV_GROUP
    const int PHI_ATTENTION_ROWS
    const int PHI_TILED_TASK_ROWS
    size_t phi_kv_slice_bytes(phi_kv_type type, int head_dim)
    size_t phi_attention_scratch_floats(int head_dim)
    size_t phi_tiled_bytes(size_t n_tokens, size_t n_cols)
    size_t phi_tiled_n_scales(size_t n_tokens, size_t n_cols)
    size_t phi_tiled_tokens(size_t n_tokens)

cdef extern from "dispatch.h":
    const char *phi_matmul_tier(const char *tier, phi_type type)

cdef extern from "kernels/generic/pack.h":
    const int PHI_PANEL_VERSION

cdef extern from "memory.h":
    void *phi_map(size_t n_bytes) nogil
    void phi_unmap(void *memory, size_t n_bytes) nogil

cdef extern from "bench.h":
    const int PHI_CLOCK_CYCLES
    ctypedef struct phi_walk:
        const uint8_t *data
        size_t n_bytes, at
    const uint8_t *phi_walk_next(phi_walk *walk, size_t n_bytes) nogil
    ctypedef struct phi_bench_stop:
        c_bool (*poll)(void *) noexcept nogil
        void *context
    ctypedef struct phi_bench_product:
        void (*kernel)(const phi_matmul *m) noexcept nogil
        phi_matmul product
        int task_rows
    double phi_bench_products(const phi_bench_product *b, phi_walk *walk, size_t n_calls, phi_bench_stop stop) nogil
    ctypedef struct phi_bench_attention:
        void (*kernel)(const phi_attention *a) noexcept nogil
        phi_attention attention
        const int32_t *page_table
        size_t n_table_pages, n_pages
    double phi_bench_attentions(const phi_bench_attention *b, size_t *next, size_t n_calls) nogil
    const int PHI_BENCH_HEADS
    ctypedef enum phi_bench_vector_op:
        PHI_BENCH_RMS_NORM
        PHI_BENCH_LAYER_NORM
        PHI_BENCH_ROPE_NEOX
        PHI_BENCH_ROPE_INTERLEAVED
        PHI_BENCH_SILU_MUL
        PHI_BENCH_GELU
        PHI_BENCH_ADD
        PHI_BENCH_QUANTIZE_Q8
        PHI_BENCH_STORE_KV_F16
        PHI_BENCH_STORE_KV_Q8
    ctypedef struct phi_bench_vector:
        phi_bench_vector_op op
        const phi_kernels *kernels
        size_t n
        const float *x
        const float *weight
        const float *bias
        float *y
        phi_q8 q8
        uint8_t *slice
    double phi_bench_vectors(const phi_bench_vector *b, size_t n_calls) nogil
    double phi_bench_barriers(phi_pool *pool, size_t n_calls) nogil
    double phi_bench_reads(phi_walk *walk, size_t n_bytes, size_t prefetch_bytes, size_t n_calls) nogil
    double phi_bench_multiplies(const phi_peak *peak, size_t n_calls) nogil
    double phi_bench_clock(size_t n_calls) nogil
