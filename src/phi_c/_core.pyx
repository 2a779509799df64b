# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, freethreading_compatible=False
"""Python bindings of the C API (csrc/phi.h). Arguments are validated here; the C code relies on it."""

import itertools
import os
import threading
import weakref
from typing import NamedTuple

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from phi_c.errors import Cancelled, ModelClosedError, OptionError, PhiError


# ---- tensor types ----


class TensorType(NamedTuple):
    """A GGUF tensor type: a row of csrc/tensor_types.def.

    name: "Q4_K". type_id: its number in a GGUF file. block_elements: weights per block. block_bytes: bytes per block.
    quantised_activations: whether products with it use int8 activations (else float32).
    """

    name: str
    type_id: int
    block_elements: int
    block_bytes: int
    quantised_activations: bool


cdef dict _index_of_id = {phi_types[i].gguf_id: i for i in range(PHI_N_TYPES)}
TENSOR_TYPES = {
    phi_types[i].gguf_id: TensorType(
        phi_types[i].name.decode(),
        phi_types[i].gguf_id,
        phi_types[i].block_elements,
        phi_types[i].block_bytes,
        phi_types[i].activation_format == PHI_ACTIVATION_Q8,
    )
    for i in range(PHI_N_TYPES)
}
PAGE_TOKENS = PHI_PAGE_TOKENS
KV_PAGE_VERSION = PHI_KV_PAGE_VERSION
PANEL_VERSION = PHI_PANEL_VERSION


cdef int _type_index(int type_id) except -1:
    if type_id not in _index_of_id:
        raise ValueError(f"unknown tensor type {type_id}, expected one of {list(_index_of_id)}")
    return _index_of_id[type_id]


cdef int _check_shape(int index, Py_ssize_t n_rows, Py_ssize_t n_cols) except -1:
    cdef int block_elements = phi_types[index].block_elements
    if n_rows < 1 or n_cols < 1 or n_cols % block_elements:
        raise ValueError(
            f"{n_rows} x {n_cols} is not a shape of type {phi_types[index].name.decode()}, expected at least 1 row and "
            f"a multiple of {block_elements} columns"
        )
    return 0


# ---- machine ----


def tiers(*, known=False):
    """Return the names of the instruction-set tiers that this machine can run, slowest first.

    known: include tiers of this build that this machine cannot run.
    """
    names = []
    cdef const char *const *name = phi_tier_names()
    while name[0] != NULL:
        if known or phi_tier_available(name[0]):
            names.append(name[0].decode())
        name += 1
    return names


def default_tier():
    """Return the tier used by default: the fastest available one that is not opt-in (amx, amxbf16)."""
    return _kernels(None).name.decode()


def max_exact_batch(tier=None):
    """Return the largest batch, in tokens, whose products have the bits of single tokens; None: unlimited.

    tier: default_tier if None. Raises OptionError if the machine cannot run it.
    """
    return _kernels(tier).max_exact_batch or None


def kernel_table():
    """Return {tier: {type name: tier that implements the matrix product}}: itself, or a lower tier it inherits from."""
    return {
        tier: {
            traits.name: phi_matmul_tier(tier.encode(), _type_index(traits.type_id)).decode()
            for traits in TENSOR_TYPES.values()
        }
        for tier in tiers()
    }


def cpu_features():
    """Return the instruction sets that this CPU has and the operating system enables."""
    names = phi_cpu_features().decode()
    return names.split(",") if names else []


cdef object _failure(phi_status status, str memory):
    """Return the exception of a call that could not start threads, or could not allocate what `memory` names."""
    if status == PHI_NO_THREADS:
        return MemoryError("cannot start the threads of the model: the system's limit of threads or memory is reached")
    return MemoryError(f"cannot allocate {memory}")


cdef const phi_kernels *_kernels(tier) except NULL:
    cdef const phi_kernels *kernels = NULL
    cdef bytes name
    cdef phi_status status
    if tier is None:
        status = phi_select_kernels(NULL, &kernels)
    else:
        name = tier.encode()
        status = phi_select_kernels(name, &kernels)
    if status != PHI_OK:
        raise OptionError(f"tier {tier!r} is not available on this machine, expected one of {', '.join(tiers())}")
    return kernels


def read_bandwidth(int n_threads, size_t n_bytes):
    """Measure memory read bandwidth: n_threads read a buffer of n_bytes, five times with prefetch and five without.

    Returns the highest rate in bytes per second. Raises ValueError for n_threads below 1 or n_bytes below 4096,
    MemoryError.
    """
    cdef phi_pool *pool = NULL
    cdef double rate
    if n_threads < 1 or n_bytes < 4096:
        raise ValueError(f"n_threads is {n_threads} and n_bytes {n_bytes}, expected at least 1 and 4096")
    if phi_pool_create(n_threads, &pool) != PHI_OK:
        raise MemoryError(f"cannot start {n_threads} threads")
    with nogil:
        rate = phi_read_bandwidth(pool, n_bytes, 5)
        phi_pool_free(pool)
    if rate == 0:
        raise MemoryError(f"cannot allocate {n_bytes} bytes")
    return rate


def prefault(const uint8_t[::1] buffer not None):
    """Read one byte of every 4 KiB page of a mapped file, so that it is loaded into memory; return their exclusive or.

    The GIL is released.
    """
    cdef size_t i
    cdef uint8_t bits = 0
    with nogil:
        for i in range(0, <size_t>buffer.shape[0], 4096):
            bits ^= buffer[i]
    return bits


def read_strings(const uint8_t[::1] buffer not None, size_t offset, size_t count):
    """Read `count` strings of a GGUF array: each a length in bytes (uint64, little endian) and UTF-8 bytes.

    Returns the strings and the offset after them. Raises ValueError if one extends beyond the buffer or is not UTF-8.
    """
    cdef size_t size = buffer.shape[0]
    cdef uint64_t length
    cdef size_t i
    cdef list strings = []
    for i in range(count):
        if offset > size or size - offset < 8:
            raise ValueError(f"string {i} starts at offset {offset}, the file ends at {size}")
        memcpy(&length, &buffer[offset], 8)
        offset += 8
        if length > size - offset:
            raise ValueError(f"string {i} has {length} bytes at offset {offset}, the file ends at {size}")
        try:
            strings.append(
                PyUnicode_DecodeUTF8(<const char *>&buffer[offset], <Py_ssize_t>length, NULL) if length else ""
            )
        except UnicodeDecodeError:
            raise ValueError(f"string {i} at offset {offset} is not UTF-8 text") from None
        offset += length
    return strings, offset


include "_locks.pxi"
include "_kernels.pxi"
include "_signals.pxi"


# ---- model ----


cdef class Matrix:
    """A weight matrix [n_rows, n_cols] of a GGUF tensor type: a view of its bytes, which it keeps alive.

    data: uint8, n_rows rows of whole blocks.
    bias: float32 [n_rows], added to products in a forward pass; None: no bias.
    row_unit: a forward pass computes rows in multiples of row_unit (head_dim for q, k and v); 0: in any number.

    Raises ValueError for an unknown type or sizes that do not match.
    """

    cdef phi_matrix matrix
    cdef const uint8_t[::1] data
    cdef const float[::1] bias

    def __init__(self, int type_id, int n_rows, int n_cols, const uint8_t[::1] data not None, *,
                 const float[::1] bias=None, int row_unit=0):
        cdef int index = _type_index(type_id)
        _check_shape(index, n_rows, n_cols)
        if <size_t>data.shape[0] != <size_t>n_rows * phi_row_bytes(index, n_cols):
            raise ValueError(f"a {n_rows} x {n_cols} matrix of type {phi_types[index].name.decode()} has "
                             f"{data.shape[0]} bytes, expected {n_rows * phi_row_bytes(index, n_cols)}")
        self.data = data
        self.matrix.type = index
        self.matrix.n_rows = n_rows
        self.matrix.n_cols = n_cols
        self.matrix.data = &data[0]
        self.matrix.row_unit = row_unit
        if bias is not None:
            if bias.shape[0] != n_rows:
                raise ValueError(f"the bias has {bias.shape[0]} elements, expected {n_rows}: one per row")
            self.bias = bias
            self.matrix.bias = &bias[0]

    def packed(self, tier=None):
        """Return a copy packed for a tier's kernels, without the bias; the matrix itself if they use it unpacked."""
        cdef const phi_kernels *kernels = _kernels(tier)
        cdef size_t n_bytes = phi_packed_bytes(kernels, &self.matrix)
        cdef uint8_t[::1] panels
        cdef phi_pool *pool = NULL
        if n_bytes == 0:
            return self
        cdef Matrix packed = Matrix(self.type_id, *self.shape, self.data)
        cdef phi_matrix *matrix = &packed.matrix
        panels = np.empty(n_bytes, np.uint8)
        if phi_pool_create(1, &pool) != PHI_OK:
            raise MemoryError
        cdef phi_packing packing
        memset(&packing, 0, sizeof(packing))
        packing.kernels, packing.pool, packing.memory = kernels, pool, &panels[0]
        packing.matrices, packing.n_matrices = &matrix, 1
        phi_pack(&packing)
        phi_pool_free(pool)
        packed.data = panels
        return packed

    def packed_bytes(self, tier=None):
        """Return the size in bytes of the matrix packed for a tier's kernels; 0 if they use it unpacked."""
        return phi_packed_bytes(_kernels(tier), &self.matrix)

    @property
    def type_id(self):
        return phi_types[self.matrix.type].gguf_id

    @property
    def shape(self):
        return self.matrix.n_rows, self.matrix.n_cols


cdef enum:
    WRITE_BYTES = 1 << 26  # bytes per write of packed weights


cdef class Model:
    """A model ready to run: sizes, weights, the kernels of a tier, and a thread pool.

    config: ModelConfig. weights: Weights, of the same sizes.
    n_threads: threads of a forward pass, the calling one included.
    tier: instruction-set tier; None: default_tier.
    layout: "packed" copies matrices to the tier's packed layout, which leaves none of the mapped file's pages in this
        process's memory; "mmap" uses all matrices in place.
    panels: uint8 [packed_bytes], written by `write_panels` of a model with the same weights and packed layout; used in
        place of packing.

    packed_bytes: size of the packed weights in bytes; 0 for "mmap".

    Raises OptionError for an invalid n_threads, layout or tier, ValueError for weights or panels of other sizes,
    MemoryError.
    """

    cdef phi_model model
    cdef phi_layer *layers
    cdef phi_feed_forward *ffns  # [n_layers, n_ffns]
    cdef int n_ffns  # feed-forwards per layer
    cdef phi_matrix **matrices  # [n_matrices], those that can be packed, in the order of Weights.packed_sizes
    cdef int n_matrices
    cdef uint8_t *panels  # packed weights that the model owns; NULL if there are none or they are borrowed
    cdef readonly size_t packed_bytes
    cdef list keep_alive  # objects whose memory the C structs point to
    cdef ForkLock lock
    cdef readonly str tier
    cdef readonly int n_threads

    def __init__(self, config, weights, *, int n_threads, tier=None, layout="packed", panels=None):
        cdef phi_model *m = &self.model
        if n_threads < 1:
            raise OptionError(f"n_threads is {n_threads}, expected at least 1")
        if layout not in ("packed", "mmap"):
            raise OptionError(f"layout is {layout!r}, expected one of packed, mmap")
        self.lock = ForkLock()
        self.keep_alive = []
        m.kernels = _kernels(tier)
        m.tuning = phi_default_tuning()
        self.tier = m.kernels.name.decode()
        self.n_threads = n_threads
        m.n_layers, m.n_embd, m.n_ffn = config.n_layers, config.n_embd, config.n_ffn
        m.n_heads, m.n_kv_heads, m.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        m.n_vocab, m.rope_dims = config.n_vocab, config.rope_dims
        m.rope_style = PHI_ROPE_NEOX if config.rope_style == "neox" else PHI_ROPE_INTERLEAVED
        m.rope_attn_factor, m.norm_eps = config.rope_attn_factor, config.norm_eps
        m.norm_kind = PHI_LAYER_NORM if config.norm == "layer" else PHI_RMS_NORM
        m.ffn_activation = PHI_FFN_GELU if config.activation == "gelu" else PHI_FFN_SWIGLU
        m.parallel, m.n_experts = config.parallel, config.n_experts
        self.n_ffns = max(1, m.n_experts)
        m.window = config.window or 0
        m.rope_inv_freq = self._floats(weights.rope_inv_freq, m.rope_dims // 2)
        m.rope_inv_freq_long = self._floats(weights.rope_inv_freq_long, m.rope_dims // 2)
        m.output_norm = self._norm(weights.output_norm)
        m.token_embd = self._matrix(weights.token_embd, m.n_vocab, m.n_embd)
        m.output = self._matrix(weights.output, m.n_vocab, m.n_embd)
        if len(weights.layers) != m.n_layers or m.n_layers < 1:
            raise ValueError(f"the weights have {len(weights.layers)} layers, expected {m.n_layers}")
        self.layers = <phi_layer *>calloc(m.n_layers, sizeof(phi_layer))
        self.ffns = <phi_feed_forward *>calloc(m.n_layers * self.n_ffns, sizeof(phi_feed_forward))
        if self.layers == NULL or self.ffns == NULL:
            raise MemoryError
        m.layers = self.layers
        cdef int q_dim = m.n_heads * m.head_dim, kv_dim = m.n_kv_heads * m.head_dim
        cdef phi_layer *layer
        cdef phi_feed_forward *ffn
        for i, w in enumerate(weights.layers):
            layer = self.layers + <int>i
            layer.ffn = self.ffns + <int>i * self.n_ffns
            layer.attn_norm = self._norm(w.attn_norm)
            if not m.parallel:
                layer.ffn_norm = self._norm(w.ffn_norm)
            layer.wq = self._matrix(w.wq, q_dim, m.n_embd)
            layer.wk = self._matrix(w.wk, kv_dim, m.n_embd)
            layer.wv = self._matrix(w.wv, kv_dim, m.n_embd)
            layer.wo = self._matrix(w.wo, m.n_embd, q_dim)
            if m.n_experts:
                layer.router = self._matrix(w.router, m.n_experts, m.n_embd)
            if len(w.ffn) != self.n_ffns:
                raise ValueError(f"layer {i} has {len(w.ffn)} feed-forwards, expected {self.n_ffns}")
            for k, f in enumerate(w.ffn):
                ffn = layer.ffn + <int>k
                if m.ffn_activation == PHI_FFN_SWIGLU:
                    ffn.gate = self._matrix(f.gate, m.n_ffn, m.n_embd)
                ffn.up = self._matrix(f.up, m.n_ffn, m.n_embd)
                ffn.down = self._matrix(f.down, m.n_embd, m.n_ffn)
        if phi_pool_create(n_threads, &m.pool) != PHI_OK:
            raise MemoryError(f"cannot start {n_threads} threads")
        if layout == "packed":
            self._list_matrices()
            if panels is None:
                self._pack(weights.file)
            else:
                self._borrow(panels)

    cdef int _list_matrices(self) except -1:
        """Set matrices, and packed_bytes to the bytes that packing them takes."""
        cdef phi_model *m = &self.model
        cdef phi_layer *layer
        cdef phi_feed_forward *ffn
        cdef phi_matrix **next
        cdef int i, k
        self.n_matrices = m.n_layers * (4 + 3 * self.n_ffns) + 1
        self.matrices = next = <phi_matrix **>calloc(self.n_matrices, sizeof(phi_matrix *))
        if next == NULL:
            raise MemoryError
        for i in range(m.n_layers):
            layer = &self.layers[i]
            next[0], next[1], next[2], next[3] = &layer.wq, &layer.wk, &layer.wv, &layer.wo
            next += 4
            for k in range(self.n_ffns):
                ffn = &self.ffns[i * self.n_ffns + k]
                next[0], next[1], next[2] = &ffn.gate, &ffn.up, &ffn.down
                next += 3
        next[0] = &m.output
        for i in range(self.n_matrices):
            self.packed_bytes += phi_packed_bytes(m.kernels, self.matrices[i])
        return 0

    cdef int _borrow(self, const uint8_t[::1] panels) except -1:
        if <size_t>panels.shape[0] != self.packed_bytes:
            raise ValueError(f"found {panels.shape[0]} bytes of packed weights, expected {self.packed_bytes}")
        if self.packed_bytes == 0:
            return 0
        self.keep_alive.append(panels)
        phi_use_packed(self.model.kernels, self.matrices, self.n_matrices, &panels[0])
        return 0

    cdef int _pack(self, file) except -1:
        cdef const uint8_t[::1] data
        cdef phi_packing p
        cdef phi_status status
        cdef list errors = []
        if self.packed_bytes == 0:
            return 0
        self.panels = <uint8_t *>phi_map(self.packed_bytes)
        if self.panels == NULL:
            raise MemoryError(f"cannot allocate {self.packed_bytes} bytes for packed weights")
        cdef _Watch watch = _watch(None, errors, 0)  # 0: the first call checks
        p.kernels, p.pool, p.memory = self.model.kernels, self.model.pool, self.panels
        p.matrices, p.n_matrices = self.matrices, self.n_matrices
        p.source = phi_pack_source(NULL, 0, 0, -1)
        if file is not None:
            data = file.all_data()
            p.source = phi_pack_source(&data[0], data.shape[0], file.data_offset, file.fileno())
        p.poll, p.poll_context = _poll, &watch
        with nogil:
            status = phi_pack(&p)
        if file is not None:
            file.release()
        if errors:
            raise errors[0]
        if status != PHI_OK:
            raise MemoryError(f"cannot start {self.n_threads} threads")
        return 0

    cdef const float *_floats(self, values, int n) except NULL:
        array = np.array(values, np.float32)  # a copy, aligned to 4 bytes; the file's may not be
        if array.shape != (n,):
            raise ValueError(f"a vector has shape {array.shape}, expected ({n},)")
        self.keep_alive.append(array)
        cdef float[::1] view = array
        return &view[0]

    cdef phi_norm _norm(self, norm) except *:
        cdef phi_norm n
        n.weight, n.bias = self._floats(norm.weight, self.model.n_embd), NULL
        if self.model.norm_kind == PHI_LAYER_NORM:
            n.bias = self._floats(norm.bias, self.model.n_embd)
        return n

    cdef phi_matrix _matrix(self, Matrix matrix, int n_rows, int n_cols) except *:
        if matrix.matrix.n_rows != n_rows or matrix.matrix.n_cols != n_cols:
            raise ValueError(f"a matrix has shape {matrix.shape}, expected ({n_rows}, {n_cols})")
        self.keep_alive.append(matrix)
        return matrix.matrix

    def write_panels(self, file):
        """Write the packed weights (packed_bytes) to a binary file. Raises ValueError if the model has packed none."""
        cdef size_t start, n_bytes
        with self.lock:
            if self.panels == NULL:
                raise ValueError("the model has no packed weights of its own")
            for start in range(0, self.packed_bytes, WRITE_BYTES):
                n_bytes = min(<size_t>WRITE_BYTES, self.packed_bytes - start)
                file.write(<uint8_t[:n_bytes]>(self.panels + start))

    def close(self):
        """Stop the threads and free the packed weights. Later calls of `forward` raise ModelClosedError. Idempotent."""
        with self.lock:
            phi_pool_free(self.model.pool)
            self.model.pool = NULL
            self.keep_alive = []
            self._unmap()

    cdef void _unmap(self) noexcept:
        if self.panels != NULL:
            phi_unmap(self.panels, self.packed_bytes)
            self.panels = NULL

    def __dealloc__(self):
        phi_pool_free(self.model.pool)
        free(self.layers)
        free(self.matrices)
        free(self.ffns)
        self._unmap()


include "_forward.pxi"
include "_tuning.pxi"
include "_bench.pxi"
