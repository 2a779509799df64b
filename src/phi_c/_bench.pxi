# ---- loops over single kernels, for benchmarks ----
#
# Every loop has the method `seconds(n_calls)`, which calls the kernel n_calls times in C, without the GIL, and returns
# how long that took.

_FINITE = 0x10, 0x3c  # bytes of which floats of every type are finite, and none is denormal
cdef enum:
    RANDOM_BYTES = 1 << 20
    TASK_ROWS = 64  # rows per call of a kernel, as in a forward pass
    PADDING = 272  # floats between vectors, so that they do not have the same address modulo 4096
    SLOW_TASK_ROWS = 16  # the same for the scalar tier, so that a call ends soon


cdef class Arena:
    """Memory full of random weights, valid for every tensor type and layout, and a position for loops that walk it.

    n_bytes: a multiple of 64. Raises ValueError, MemoryError.
    """

    cdef phi_walk walk
    cdef uint8_t *memory
    cdef readonly size_t n_bytes

    def __init__(self, size_t n_bytes):
        if n_bytes == 0 or n_bytes % 64:
            raise ValueError(f"n_bytes is {n_bytes}, expected a positive multiple of 64")
        self.memory = <uint8_t *>phi_map(n_bytes)
        if self.memory == NULL:
            raise MemoryError(f"cannot allocate {n_bytes} bytes of weights to read")
        self.n_bytes = n_bytes
        cdef const uint8_t[::1] part = np.random.default_rng(0).integers(*_FINITE, RANDOM_BYTES, dtype=np.uint8)
        cdef size_t at
        for at in range(0, n_bytes, RANDOM_BYTES):
            memcpy(self.memory + at, &part[0], min(<size_t>RANDOM_BYTES, n_bytes - at))
            PyErr_CheckSignals()
        self.walk.data, self.walk.n_bytes, self.walk.at = self.memory, n_bytes, 0

    def __dealloc__(self):
        if self.memory != NULL:
            phi_unmap(self.memory, self.n_bytes)

    def matrix(self, int type_id, int n_rows, int n_cols, tier=None):
        """Return the matrix stored at the start, packed if the tier packs it. Raises ValueError if it does not fit."""
        cdef int index = _type_index(type_id)
        _check_shape(index, n_rows, n_cols)
        cdef size_t n_bytes = <size_t>n_rows * phi_row_bytes(index, n_cols)
        if n_bytes > self.n_bytes:
            raise ValueError(f"{n_rows} x {n_cols} weights have {n_bytes} bytes, expected at most {self.n_bytes}")
        cdef Matrix matrix = Matrix(type_id, n_rows, n_cols, <uint8_t[:n_bytes]>self.memory)
        if phi_packed_bytes(_kernels(tier), &matrix.matrix):
            matrix.matrix.layout = PHI_LAYOUT_PANELS
        return matrix


cdef class ProductLoop:
    """Multiplies matrices of an arena by activations x, float32 [n_tokens, n_cols], on one thread.

    walks: whether each call reads the next matrix, or all calls of one `seconds` read the same, so that it is in cache.
        The next `seconds` then reads the next one: where a matrix is stored affects the speed, and samples average it.
    out: float32 [n_tokens, n_rows], the product of the last call. n_bytes: of a matrix.

    Raises ValueError if a matrix does not fit the arena.
    """

    cdef phi_bench_product loop
    cdef phi_walk own
    cdef _Product product
    cdef Arena arena
    cdef bint walks
    cdef readonly size_t n_bytes
    cdef readonly object out

    def __init__(self, Arena arena not None, int type_id, int n_rows, x, tier=None, *, bint walks=False):
        self.arena, self.walks = arena, walks
        self.product = _Product(arena.matrix(type_id, n_rows, x.shape[1], tier), x, tier)
        self.n_bytes = n_rows * self.product.m.row_bytes
        self.out = self.product.out
        self.loop.kernel = self.product.kernel
        self.loop.product = self.product.m
        self.loop.task_rows = SLOW_TASK_ROWS if tier == "scalar" else TASK_ROWS
        if self.product.a.tiled.tiles != NULL:
            self.loop.task_rows = PHI_TILED_TASK_ROWS
        self.own.data, self.own.n_bytes, self.own.at = arena.memory, arena.n_bytes, 0

    def seconds(self, size_t n_calls):
        """Return the seconds of n_calls products."""
        cdef phi_walk same
        same.data, same.n_bytes, same.at = phi_walk_next(&self.own, self.n_bytes), self.n_bytes, 0
        cdef phi_walk *walk = &self.arena.walk if self.walks else &same
        cdef list errors = []
        cdef _Watch watch = _watch(None, errors, phi_seconds())
        cdef phi_bench_stop stop
        stop.poll, stop.context = _poll, &watch
        cdef double seconds
        with nogil:
            seconds = phi_bench_products(&self.loop, walk, n_calls, stop)
        if errors:
            raise errors[0]
        return seconds


cdef class AttentionLoop:
    """Attention of one KV head whose pages are in an arena.

    n_tokens: query tokens, the last positions of n_positions. n_queries: query heads per KV head. kv_type: "f16", "q8".
    walks: whether each call reads other pages, far apart as in a KV cache of many layers, or always the first.
    out: float32 [n_tokens, n_queries, head_dim] of the last call. n_bytes: of the pages that a call reads.

    Raises ValueError if the pages do not fit the arena or the sizes are out of range, OptionError for another kv_type.
    """

    cdef phi_bench_attention loop
    cdef Arena arena
    cdef size_t next
    cdef readonly size_t n_bytes
    cdef readonly object out
    cdef object keep_alive

    def __init__(self, Arena arena not None, int n_tokens, int n_positions, int n_queries, int head_dim, tier=None, *,
                 kv_type="f16", bint walks=False):
        if not 0 < n_tokens <= min(n_positions, PHI_ATTENTION_ROWS) or n_queries < 1 or head_dim < 2 or head_dim % 2:
            raise ValueError(f"no attention of {n_tokens} tokens, {n_positions} positions and {head_dim} dimensions")
        cdef const phi_kernels *kernels = _kernels(tier)
        cdef phi_kv_type type = _kv_type(kv_type)
        cdef size_t page_bytes = phi_kv_slice_bytes(type, head_dim)
        n_pages = -(-n_positions // PHI_PAGE_TOKENS)
        n_stored = arena.n_bytes // page_bytes if walks else n_pages
        if n_pages * page_bytes > arena.n_bytes:
            raise ValueError(f"{n_pages} pages of {page_bytes} bytes, expected at most {arena.n_bytes} bytes")
        order = np.arange(n_stored, dtype=np.int32)
        if walks:
            np.random.default_rng(0).shuffle(order)
        q = np.random.default_rng(0).normal(size=(n_tokens, n_queries, head_dim)).astype(np.float32)
        self.out = _aligned(q.shape, np.float32)
        scratch = _aligned(phi_attention_scratch_floats(head_dim), np.float32)
        cdef float[:, :, ::1] queries = q, out = self.out
        cdef float[::1] buffer = scratch
        cdef int32_t[::1] table = order
        self.arena, self.keep_alive = arena, (q, scratch, order)
        self.n_bytes = n_pages * page_bytes
        self.loop.kernel = kernels.attention[<int>type]
        self.loop.page_table, self.loop.n_table_pages, self.loop.n_pages = &table[0], n_stored, n_pages
        cdef phi_attention *a = &self.loop.attention
        a.q, a.out, a.scratch = &queries[0, 0, 0], &out[0, 0, 0], &buffer[0]
        a.n_tokens, a.n_queries, a.head_dim = n_tokens, n_queries, head_dim
        a.token_stride = n_queries * head_dim
        a.pages, a.page_bytes = arena.memory, page_bytes
        a.query_start, a.window, a.scale = n_positions - n_tokens, 0, head_dim ** -0.5

    def seconds(self, size_t n_calls):
        """Return the seconds of n_calls calls."""
        cdef double seconds
        with nogil:
            seconds = phi_bench_attentions(&self.loop, &self.next, n_calls)
        return seconds


_VECTOR_OPS = {
    ("rms_norm", ""): PHI_BENCH_RMS_NORM,
    ("layer_norm", ""): PHI_BENCH_LAYER_NORM,
    ("rope", "neox"): PHI_BENCH_ROPE_NEOX,
    ("rope", "interleaved"): PHI_BENCH_ROPE_INTERLEAVED,
    ("silu_mul", ""): PHI_BENCH_SILU_MUL,
    ("gelu", ""): PHI_BENCH_GELU,
    ("add", ""): PHI_BENCH_ADD,
    ("quantize_q8", ""): PHI_BENCH_QUANTIZE_Q8,
    ("store_kv", "f16"): PHI_BENCH_STORE_KV_F16,
    ("store_kv", "q8"): PHI_BENCH_STORE_KV_Q8,
}
VECTOR_OPS = tuple(_VECTOR_OPS)


cdef class VectorLoop:
    """An operation on vectors of n elements; op and variant: a pair of VECTOR_OPS.

    inputs: float32 [3, n]: x, then the weight and bias of a norm, up of silu_mul, cos and sin of rope, v of store_kv.
    out: what the calls wrote: float32 [1, n], a Q8, or the bytes of a slice of a page. add changes it in place, starting
        from x; so does rope, whose calls rotate the heads float32 [32, n] in turn.

    Raises ValueError for an odd n, and for quantize_q8 one that is not a multiple of 32.
    """

    cdef phi_bench_vector loop
    cdef readonly object inputs, out

    def __init__(self, op, variant, int n, tier=None):
        if n < 2 or n % 2 or (op == "quantize_q8" and n % PHI_Q8_BLOCK):
            raise ValueError(f"{op} of {n} elements, expected a multiple of {PHI_Q8_BLOCK if op == 'quantize_q8' else 2}")
        block = _aligned((4, n + PADDING), np.float32)[:, :n]
        self.inputs = block[:3]
        self.inputs[:] = np.random.default_rng(0).normal(size=(3, n))
        if op == "rope":
            self.inputs[1:] = np.cos(self.inputs[1]), np.sin(self.inputs[1])
        cdef float[:, :] inputs = self.inputs
        cdef phi_bench_vector *loop = &self.loop
        loop.op = _VECTOR_OPS[op, variant]
        loop.kernels, loop.n = _kernels(tier), n
        loop.x, loop.weight, loop.bias = &inputs[0, 0], &inputs[1, 0], &inputs[2, 0]
        cdef uint8_t[::1] slice
        cdef float[:, :] y
        if op == "quantize_q8":
            self.out = quantize_q8(self.inputs[0], tier)
            loop.q8 = _q8_pointers(self.out)
        elif op == "store_kv":
            self.out = store_kv(self.inputs[0], self.inputs[1], 0, tier, variant)
            slice = self.out
            loop.slice = &slice[0]
        else:
            self.out = _aligned((PHI_BENCH_HEADS, n), np.float32) if op == "rope" else block[3:]
            self.out[:] = self.inputs[0]
            y = self.out
            loop.y = &y[0, 0]

    def seconds(self, size_t n_calls):
        """Return the seconds of n_calls calls."""
        cdef double seconds
        with nogil:
            seconds = phi_bench_vectors(&self.loop, n_calls)
        return seconds


cdef class BarrierLoop:
    """Barriers of a pool of n_threads threads. Raises MemoryError if they cannot be started."""

    cdef phi_pool *pool

    def __init__(self, int n_threads):
        if n_threads < 1 or phi_pool_create(n_threads, &self.pool) != PHI_OK:
            raise MemoryError(f"cannot start {n_threads} threads")

    def __dealloc__(self):
        phi_pool_free(self.pool)

    def seconds(self, size_t n_calls):
        """Return the seconds of n_calls barriers, without those of starting the threads."""
        cdef double seconds
        with nogil:
            seconds = phi_bench_barriers(self.pool, n_calls)
        if seconds < 0:
            raise MemoryError("cannot start the threads")
        return seconds


cdef class ReadLoop:
    """Reads of the next n_bytes of an arena per call; prefetch_bytes: software prefetch distance, 0: none."""

    cdef Arena arena
    cdef readonly size_t n_bytes
    cdef size_t prefetch_bytes

    def __init__(self, Arena arena not None, size_t n_bytes, size_t prefetch_bytes=0):
        if n_bytes == 0 or n_bytes % 64 or n_bytes > arena.n_bytes:
            raise ValueError(f"n_bytes is {n_bytes}, expected a multiple of 64 up to {arena.n_bytes}")
        self.arena, self.n_bytes, self.prefetch_bytes = arena, n_bytes, prefetch_bytes

    def seconds(self, size_t n_calls):
        """Return the seconds of n_calls reads."""
        cdef double seconds
        with nogil:
            seconds = phi_bench_reads(&self.arena.walk, self.n_bytes, self.prefetch_bytes, n_calls)
        return seconds


cdef class MultiplyLoop:
    """Steps of a loop of a tier's multiply instruction: the integer dot product if quantised, else float FMA.

    macs: multiply-accumulates per step. Raises ValueError if the tier has no such loop (scalar).
    """

    cdef phi_peak peak

    def __init__(self, tier=None, *, bint quantised=True):
        self.peak = _kernels(tier).peak[<int>(PHI_ACTIVATION_Q8 if quantised else PHI_ACTIVATION_F32)]
        if self.peak.run == NULL:
            raise ValueError(f"tier {tier!r} has no loop of multiplications")

    @property
    def macs(self):
        return self.peak.macs

    def total(self, size_t n_calls):
        """Return the sum of the products of n_calls steps, whose factors are 1."""
        return self.peak.run(n_calls)

    def seconds(self, size_t n_calls):
        """Return the seconds of n_calls steps."""
        cdef double seconds
        with nogil:
            seconds = phi_bench_multiplies(&self.peak, n_calls)
        return seconds


cdef class ClockLoop:
    """Steps of a chain of dependent instructions that takes CYCLES cycles per step, whatever the CPU."""

    CYCLES = PHI_CLOCK_CYCLES

    def seconds(self, size_t n_calls):
        """Return the seconds of n_calls steps."""
        cdef double seconds
        with nogil:
            seconds = phi_bench_clock(n_calls)
        return seconds
