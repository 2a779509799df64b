# ---- single kernels, for tests, benchmarks, conversion and quantisation ----
#
# tier: name of an instruction-set tier; None: the default tier. Raises OptionError if the machine cannot run it.


def dequantize(int type_id, const uint8_t[::1] data not None, size_t n_elements, tier=None):
    """Dequantise n_elements weights.

    type_id: GGUF tensor type. data: uint8, whole blocks. Returns float32 [n_elements]. Raises ValueError if data has
    another size than n_elements weights.
    """
    cdef int index = _type_index(type_id)
    cdef const phi_kernels *kernels = _kernels(tier)
    if n_elements % phi_types[index].block_elements or phi_row_bytes(index, n_elements) != <size_t>data.shape[0]:
        raise ValueError(f"{data.shape[0]} bytes are not {n_elements} weights of type {phi_types[index].name.decode()}")
    y = np.empty(n_elements, np.float32)
    cdef float[::1] view = y
    if n_elements:
        with nogil:
            kernels.dequantize[index](&data[0], n_elements, &view[0])
    return y


def quantize_rows(int type_id, const float[:, ::1] x not None, const float[::1] importance=None, int n_threads=1):
    """Quantise rows of weights.

    type_id: GGUF tensor type.
    x: float32 [n_rows, n_cols], finite.
    importance: float32 [n_cols], the weight of the squared error of each column; None: all columns alike.

    Returns uint8 [n_rows, row_bytes], the same for any n_threads. Raises ValueError if sizes do not match, MemoryError
    if the threads cannot be started.
    """
    cdef int index = _type_index(type_id)
    cdef size_t n_rows = x.shape[0], n_cols = x.shape[1]
    cdef phi_pool *pool = NULL
    cdef phi_status status
    _check_shape(index, n_rows, n_cols)
    if importance is not None and <size_t>importance.shape[0] != n_cols:
        raise ValueError(f"importance of {importance.shape[0]} columns, expected {n_cols}")
    if n_threads < 1:
        raise ValueError(f"n_threads is {n_threads}, expected at least 1")
    out = np.empty((n_rows, phi_row_bytes(index, n_cols)), np.uint8)
    cdef uint8_t[:, ::1] view = out
    if phi_pool_create(n_threads, &pool) != PHI_OK:
        raise MemoryError(f"cannot start {n_threads} threads")
    with nogil:
        status = phi_quantize_rows(
            pool, index, &x[0, 0], n_rows, n_cols, &importance[0] if importance is not None else NULL, &view[0, 0]
        )
        phi_pool_free(pool)
    if status != PHI_OK:
        raise MemoryError(f"cannot start {n_threads} threads")
    return out


def _aligned(shape, dtype):
    """Return an uninitialised array whose first element is aligned to 64 bytes, as buffers of a forward pass are."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start:start + n_bytes].view(dtype).reshape(shape)


class Q8(NamedTuple):
    """Quantised activations, phi_q8 in csrc/kernels.h: int8 with a float32 scale per 32, and sums of 16 and of 32."""

    quants: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    block_sums: np.ndarray
    offsets: np.ndarray
    block_offsets: np.ndarray


cdef phi_q8 _q8_pointers(q8) except *:
    cdef int8_t[::1] quants = q8.quants
    cdef float[::1] scales = q8.scales, sums = q8.sums, block_sums = q8.block_sums
    cdef int32_t[::1] offsets = q8.offsets, block_offsets = q8.block_offsets
    return phi_q8(&quants[0], &scales[0], &sums[0], &block_sums[0], &offsets[0], &block_offsets[0])


def quantize_q8(const float[::1] x not None, tier=None):
    """Quantise activations x, float32 [n], to int8 with a scale per 32. Raises ValueError if n % 32 is not 0."""
    cdef const phi_kernels *kernels = _kernels(tier)
    cdef size_t n = x.shape[0]
    if n == 0 or n % PHI_Q8_BLOCK:
        raise ValueError(f"{n} activations, expected a positive multiple of {PHI_Q8_BLOCK}")
    n_blocks, n_sums = n // PHI_Q8_BLOCK, n // PHI_SUM_BLOCK
    q8 = Q8(
        quants=_aligned(n, np.int8),
        scales=_aligned(n_blocks, np.float32),
        sums=_aligned(n_sums, np.float32),
        block_sums=_aligned(n_blocks, np.float32),
        offsets=_aligned(n_sums, np.int32),
        block_offsets=_aligned(n_blocks, np.int32),
    )
    kernels.quantize_q8(&x[0], n, _q8_pointers(q8))
    return q8


ctypedef void (*_matmul_kernel)(const phi_matmul *m) noexcept nogil


cdef void _set_default_tuning(phi_matmul *m, phi_type type) noexcept:
    cdef phi_tuning tuning = phi_default_tuning()
    m.prefetch = tuning.prefetch[type][<int>phi_batch_class_of(m.n_tokens)]
    m.max_small_batch = tuning.max_small_batch[type]


cdef class _Product:
    """A product of a matrix and activations x, float32 [n_tokens, n_cols], which are quantised as in a forward pass.

    The product is out, float32 [n_tokens, n_rows]. Raises ValueError for another shape of x.
    """

    cdef _matmul_kernel kernel
    cdef phi_matmul m
    cdef phi_activations a
    cdef readonly object out
    cdef object keep_alive  # what the pointers point to

    def __init__(self, Matrix weights not None, const float[:, ::1] x not None, tier):
        cdef const phi_kernels *kernels = _kernels(tier)
        cdef int n_tokens = <int>x.shape[0], n_cols = weights.matrix.n_cols, n_rows = weights.matrix.n_rows
        if x.shape[1] != n_cols or n_tokens == 0:
            raise ValueError(f"x has shape ({n_tokens}, {x.shape[1]}), expected at least 1 row of {n_cols}")
        self.a.n_cols = n_cols
        self.a.f32 = <float *>&x[0, 0]
        q8 = None
        if n_cols % PHI_Q8_BLOCK == 0:
            q8 = quantize_q8(np.asarray(x).reshape(-1), tier)
            self.a.q8 = _q8_pointers(q8)
        self.a.tiled.tiles = NULL
        cdef int8_t[::1] tiles = None
        cdef float[::1] scales = None
        cdef int t
        if kernels.quantize_tiled != NULL and n_cols % PHI_TILED_BLOCK == 0 and n_tokens > kernels.max_exact_batch:
            tiles = _aligned(phi_tiled_bytes(n_tokens, n_cols), np.int8)
            tiles[:] = 127  # padding tokens may have any values
            scales = _aligned(phi_tiled_n_scales(n_tokens, n_cols), np.float32)
            self.a.tiled.tiles, self.a.tiled.scales = &tiles[0], &scales[0]
            self.a.tiled.n_tokens = phi_tiled_tokens(n_tokens)
            for t in range(n_tokens):
                kernels.quantize_tiled(&x[t, 0], n_cols, &self.a.tiled, t)
        cdef phi_type type = weights.matrix.type
        cdef bint is_packed = weights.matrix.layout == PHI_LAYOUT_PANELS
        self.kernel = kernels.matmul_packed[type] if is_packed else kernels.matmul[type]
        self.out = _aligned((n_tokens, n_rows), np.float32)
        cdef float[:, ::1] out = self.out
        self.m.rows = <const uint8_t *>weights.matrix.data
        self.m.row_bytes = phi_row_bytes(type, n_cols)
        self.m.n_rows, self.m.n_cols = n_rows, n_cols
        self.m.x = &self.a
        self.m.first_token, self.m.n_tokens = 0, n_tokens
        self.m.out = &out[0, 0]
        self.m.out_stride = n_rows
        _set_default_tuning(&self.m, weights.matrix.type)
        self.keep_alive = weights, x, q8, tiles, scales


def matmul(Matrix weights not None, const float[:, ::1] x not None, tier=None):
    """Multiply on one thread, quantising x as a forward pass does; a bias of the weights is not added.

    x: float32 [n_tokens, n_cols]. Returns x @ weights.T, float32 [n_tokens, n_rows]. Raises ValueError for another
    shape.
    """
    cdef _Product product = _Product(weights, x, tier)
    with nogil:
        product.kernel(&product.m)
    return product.out


def rms_norm(const float[::1] x not None, const float[::1] weight not None, float eps, tier=None):
    """Return x / sqrt(mean(x^2) + eps) * weight; all float32 [n]. Raises ValueError if lengths differ or are 0."""
    cdef const phi_kernels *kernels = _kernels(tier)
    if x.shape[0] != weight.shape[0] or x.shape[0] == 0:
        raise ValueError("x and weight differ in length or are empty")
    y = np.empty(x.shape[0], np.float32)
    cdef float[::1] view = y
    kernels.rms_norm(&x[0], &weight[0], x.shape[0], eps, &view[0])
    return y


def layer_norm(const float[::1] x not None, const float[::1] weight not None, const float[::1] bias not None, float eps,
               tier=None):
    """Return (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias; all float32 [n].

    Raises ValueError if lengths differ or are 0.
    """
    cdef const phi_kernels *kernels = _kernels(tier)
    if not 0 < x.shape[0] == weight.shape[0] == bias.shape[0]:
        raise ValueError("x, weight and bias differ in length or are empty")
    y = np.empty(x.shape[0], np.float32)
    cdef float[::1] view = y
    kernels.layer_norm(&x[0], &weight[0], &bias[0], x.shape[0], eps, &view[0])
    return y


def gelu(const float[::1] x not None, tier=None):
    """Return the tanh approximation of gelu(x); both float32 [n]. Raises ValueError if x is empty."""
    cdef const phi_kernels *kernels = _kernels(tier)
    if x.shape[0] == 0:
        raise ValueError("x is empty")
    y = np.empty(x.shape[0], np.float32)
    cdef float[::1] view = y
    kernels.gelu(&x[0], x.shape[0], &view[0])
    return y


def silu_mul(const float[::1] gate not None, const float[::1] up not None, tier=None):
    """Return silu(gate) * up; all float32 [n]. Raises ValueError if lengths differ or are 0."""
    cdef const phi_kernels *kernels = _kernels(tier)
    if gate.shape[0] != up.shape[0] or gate.shape[0] == 0:
        raise ValueError("gate and up differ in length or are empty")
    y = np.empty(gate.shape[0], np.float32)
    cdef float[::1] view = y
    kernels.silu_mul(&gate[0], &up[0], gate.shape[0], &view[0])
    return y


def add(const float[::1] x not None, const float[::1] y not None, tier=None):
    """Return x + y; all float32 [n]. Raises ValueError if lengths differ or are 0."""
    cdef const phi_kernels *kernels = _kernels(tier)
    if x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise ValueError("x and y differ in length or are empty")
    total = np.array(y)
    cdef float[::1] view = total
    kernels.add(&x[0], x.shape[0], &view[0])
    return total


def rope(const float[::1] x not None, const float[::1] cos not None, const float[::1] sin not None, style, tier=None):
    """Apply rotary position embedding to one head.

    x: float32 [head_dim]. cos, sin: float32 [rope_dims / 2], of the angles. style: "neox" rotates dimensions i and
    i + rope_dims / 2, "interleaved" 2i and 2i + 1. Returns float32 [head_dim]; dimensions from rope_dims on are x.
    Raises ValueError if the shapes do not match.
    """
    cdef const phi_kernels *kernels = _kernels(tier)
    cdef int rope_dims = <int>(2 * cos.shape[0])
    if cos.shape[0] != sin.shape[0] or rope_dims == 0 or rope_dims > x.shape[0]:
        raise ValueError(
            f"cos and sin have {cos.shape[0]} and {sin.shape[0]} elements, expected the same number from 1 to "
            f"{x.shape[0] // 2}"
        )
    y = np.array(x)
    cdef float[::1] view = y
    cdef phi_rope_style index = PHI_ROPE_NEOX if style == "neox" else PHI_ROPE_INTERLEAVED
    kernels.rope[<int>index](&view[0], rope_dims, &cos[0], &sin[0])
    return y


def store_kv(const float[::1] k not None, const float[::1] v not None, int slot, tier=None, kv_type="f16"):
    """Store one position's key and value in a new page.

    k, v: float32 [head_dim] of one KV head. slot: position in the page. kv_type: "f16" or "q8".

    Returns the head's slice of the page (phi_kv_slice in csrc/kernels.h), uint8, whose other bytes are 0xff. Raises
    ValueError if k and v differ in length or are empty, or if there is no such slot; OptionError for another kv_type.
    """
    cdef const phi_kernels *kernels = _kernels(tier)
    cdef int head_dim = <int>k.shape[0]
    if v.shape[0] != head_dim or head_dim == 0 or not 0 <= slot < PHI_PAGE_TOKENS:
        raise ValueError(
            f"k and v have {head_dim} and {v.shape[0]} elements for slot {slot}, expected equal lengths and a slot "
            f"from 0 to {PHI_PAGE_TOKENS - 1}"
        )
    cdef phi_kv_type type = _kv_type(kv_type)
    page = np.full(phi_kv_slice_bytes(type, head_dim), 0xff, np.uint8)
    cdef uint8_t[::1] view = page
    kernels.store_kv[<int>type](&k[0], &v[0], head_dim, slot, &view[0])
    return page


def attention(const float[:, :, ::1] q not None, const float[:, ::1] k not None, const float[:, ::1] v not None,
              int query_start, int window, float scale, tier=None, kv_type="f16"):
    """Return softmax(scale * q @ k.T) @ v, causal: float32 [n_tokens, n_queries, head_dim].

    q: float32 [n_tokens, n_queries, head_dim], tokens at positions query_start, query_start + 1, ...
    k, v: float32 [n_positions, head_dim] of one KV head. They are stored as kv_type ("f16" or "q8") in pages in reverse
        order; unused slots are NaN.
    window: positions that a token attends to, itself included; 0: unlimited.

    Raises ValueError if the shapes do not match, OptionError for another kv_type.
    """
    cdef const phi_kernels *kernels = _kernels(tier)
    cdef int n = <int>k.shape[0], head_dim = <int>k.shape[1], n_pages = (n + PHI_PAGE_TOKENS - 1) // PHI_PAGE_TOKENS
    if not (0 < q.shape[0] <= PHI_ATTENTION_ROWS and 0 <= query_start and query_start + q.shape[0] <= n
            and q.shape[1] > 0 and q.shape[2] == v.shape[1] == head_dim and v.shape[0] == n
            and head_dim > 0 and head_dim % 2 == 0):
        raise ValueError(
            f"q, k and v have shapes {np.shape(q)}, {np.shape(k)} and {np.shape(v)}, query_start is {query_start}: "
            f"expected (n_tokens, n_queries, head_dim) and twice (n_positions, head_dim) with an even head_dim, and "
            f"query_start + n_tokens of at most n_positions"
        )
    cdef phi_kv_type type = _kv_type(kv_type)
    cdef size_t page_bytes = phi_kv_slice_bytes(type, head_dim)
    cdef uint8_t[::1] pages = np.full(n_pages * page_bytes, 0xff, np.uint8)
    cdef int32_t[::1] table = np.arange(n_pages - 1, -1, -1, dtype=np.int32)
    cdef int p
    for p in range(n):
        kernels.store_kv[<int>type](&k[p, 0], &v[p, 0], head_dim, p % PHI_PAGE_TOKENS,
                                    &pages[table[p // PHI_PAGE_TOKENS] * page_bytes])
    cdef float[:, :, ::1] out = np.empty(np.shape(q), np.float32)
    cdef phi_attention a
    a.q = &q[0, 0, 0]
    a.n_tokens, a.n_queries, a.head_dim = <int>q.shape[0], <int>q.shape[1], head_dim
    a.token_stride = a.n_queries * head_dim
    a.pages = &pages[0]
    a.page_bytes = page_bytes
    a.page_table = &table[0]
    a.query_start, a.window, a.scale = query_start, window, scale
    cdef float[::1] scratch = np.full(phi_attention_scratch_floats(head_dim), np.nan, np.float32)
    a.scratch = &scratch[0]
    a.out = &out[0, 0, 0]
    with nogil:
        kernels.attention[<int>type](&a)
    return np.asarray(out)
