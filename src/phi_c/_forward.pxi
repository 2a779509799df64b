# ---- KV cache and forward pass ----


KV_TYPES = ("f16", "q8")


cdef phi_kv_type _kv_type(kv_type) except *:
    if kv_type not in KV_TYPES:
        raise OptionError(f"kv_type is {kv_type!r}, expected one of {', '.join(KV_TYPES)}")
    return PHI_KV_Q8 if kv_type == "q8" else PHI_KV_F16


def kv_page_bytes(config, kv_type="f16"):
    """Return the bytes per page (PAGE_TOKENS positions) of a model's KV cache.

    config: ModelConfig. kv_type: one of KV_TYPES; raises OptionError for another.
    """
    return config.n_layers * config.n_kv_heads * phi_kv_slice_bytes(_kv_type(kv_type), config.head_dim)


cdef class KvCache:
    """The KV cache of a model: n_pages pages of PAGE_TOKENS positions, page_bytes each, initially zero.

    kv_type: "f16" (half precision) or "q8" (int8 with a half-precision scale per position and 32 dimensions).

    The operating system provides memory as pages are first written. Raises ValueError for n_pages below 1, OptionError
    for another kv_type, MemoryError if the address space cannot be reserved.
    """

    cdef phi_kv *kv
    cdef Model model
    cdef readonly int n_pages
    cdef readonly size_t page_bytes

    def __init__(self, Model model not None, int n_pages, kv_type="f16"):
        cdef phi_kv_type type = _kv_type(kv_type)
        if n_pages < 1:
            raise ValueError(f"n_pages is {n_pages}, expected at least 1")
        self.model = model
        self.n_pages = n_pages
        self.page_bytes = phi_kv_page_bytes(&model.model, type)
        if phi_kv_create(&model.model, type, n_pages, &self.kv) != PHI_OK:
            raise MemoryError(f"cannot allocate {n_pages * self.page_bytes} bytes for the KV cache")

    def __dealloc__(self):
        phi_kv_free(self.kv)

    def read_page(self, int page):
        """Return a copy of a page's content, uint8 [page_bytes]. Raises IndexError if there is no such page."""
        cdef const uint8_t *source = self._page(page)
        cdef uint8_t[::1] data = np.empty(self.page_bytes, np.uint8)
        with nogil:
            memcpy(&data[0], source, self.page_bytes)
        return np.asarray(data)

    def write_page(self, int page, const uint8_t[::1] data not None):
        """Overwrite a page with content from `read_page` of the same model, kv_type and KV_PAGE_VERSION.

        data: uint8 [page_bytes]. Raises IndexError if there is no such page, ValueError for data of another size. Must
        not overlap with a `forward` call on this cache.
        """
        cdef uint8_t *target = self._page(page)
        if <size_t>data.shape[0] != self.page_bytes:
            raise ValueError(f"a page has {data.shape[0]} bytes, expected {self.page_bytes}")
        with nogil:
            memcpy(target, &data[0], self.page_bytes)

    cdef uint8_t *_page(self, int page) except NULL:
        if not 0 <= page < self.n_pages:
            raise IndexError(f"page is {page}, expected 0 to {self.n_pages - 1}")
        return phi_kv_page(&self.model.model, self.kv, page)


cdef class Observer:
    """Collects activation statistics for an importance matrix while `forward` runs.

    For each input column of the model's weight matrices: the sum over tokens of the squared activation, before it is
    quantised. Sums are float64, accumulated over all `forward` calls with this observer.

    n_tokens: number of tokens observed.
    attn_in: [n_layers, n_embd], input of wq, wk and wv.
    attn_out: [n_layers, n_heads * head_dim], input of wo.
    ffn_in: [n_layers, n_embd], input of gate and up, or of the router.
    ffn_inner: [n_layers, n_ffn], input of down; 0 with experts.
    expert_in: [n_layers, n_experts, n_embd], input of each expert's gate and up.
    expert_inner: [n_layers, n_experts, n_ffn], input of each expert's down.
    expert_tokens: int64 [n_layers, n_experts], tokens routed to each expert.
    output: [n_embd], input of the output matrix; None unless requested with output=True.
    """

    cdef phi_observer sums  # pointers into the arrays
    cdef Model model
    cdef readonly object attn_in, attn_out, ffn_in, ffn_inner, output, expert_in, expert_inner, expert_tokens
    cdef readonly long long n_tokens

    def __init__(self, Model model not None, *, output=False):
        cdef const phi_model *m = &model.model
        self.model = model
        self.attn_in = np.zeros((m.n_layers, m.n_embd))
        self.attn_out = np.zeros((m.n_layers, m.n_heads * m.head_dim))
        self.ffn_in = np.zeros((m.n_layers, m.n_embd))
        self.ffn_inner = np.zeros((m.n_layers, m.n_ffn))
        self.output = np.zeros(m.n_embd) if output else None
        self.sums.attn_in, self.sums.attn_out = _doubles(self.attn_in), _doubles(self.attn_out)
        self.sums.ffn_in, self.sums.ffn_inner = _doubles(self.ffn_in), _doubles(self.ffn_inner)
        self.sums.output = _doubles(self.output[None]) if output else NULL
        cdef int n_experts = m.n_experts
        self.expert_in = np.zeros((m.n_layers, n_experts, m.n_embd))
        self.expert_inner = np.zeros((m.n_layers, n_experts, m.n_ffn))
        self.expert_tokens = np.zeros((m.n_layers, n_experts), np.int64)
        cdef int64_t[:, ::1] tokens = self.expert_tokens
        if n_experts:
            self.sums.expert_in = _doubles(self.expert_in.reshape(-1, m.n_embd))
            self.sums.expert_inner = _doubles(self.expert_inner.reshape(-1, m.n_ffn))
            self.sums.expert_tokens = &tokens[0, 0]

    def clear(self):
        """Reset all sums to 0. Required after a cancelled `forward`, which may have added part of its batch."""
        for sums in (self.attn_in, self.attn_out, self.ffn_in, self.ffn_inner, self.output,
                     self.expert_in, self.expert_inner, self.expert_tokens):
            if sums is not None:
                sums.fill(0)
        self.n_tokens = 0


PHASES = tuple(phi_phase_names[i].decode() for i in range(PHI_N_PHASES))


cdef class Timings:
    """Collects the time of each phase of `forward`, summed over all calls with this object.

    The phases are named in PHASES (csrc/phases.def). A thread's times add up to the duration of the calls.

    n_calls: number of calls that ended without an error.
    working: float64 [n_threads, n_phases], seconds of computing.
    waiting: float64 [n_threads, n_phases], seconds at the barrier that ends the phase.
    n_barriers: int64 [n_phases], barriers that ended the phase.
    """

    cdef phi_timings times  # pointers into the arrays
    cdef Model model
    cdef readonly object working, waiting, n_barriers
    cdef readonly long long n_calls

    def __init__(self, Model model not None):
        self.model = model
        self.working = np.zeros((model.n_threads, PHI_N_PHASES))
        self.waiting = np.zeros((model.n_threads, PHI_N_PHASES))
        self.n_barriers = np.zeros(PHI_N_PHASES, np.int64)
        cdef int64_t[::1] n_barriers = self.n_barriers
        self.times.working, self.times.waiting = _doubles(self.working), _doubles(self.waiting)
        self.times.n_barriers = &n_barriers[0]

    def clear(self):
        """Reset all times and counts to 0. Required after a cancelled `forward`, which has added part of its times."""
        for values in (self.working, self.waiting, self.n_barriers):
            values.fill(0)
        self.n_calls = 0


cdef double *_doubles(double[:, ::1] array) noexcept:
    return &array[0, 0]


cdef int _check(const int32_t[::1] values, int low, int high, what) except -1:
    cdef Py_ssize_t i
    for i in range(values.shape[0]):
        if not low <= values[i] < high:
            raise ValueError(f"{what} is {values[i]}, expected {low} to {high - 1}")
    return 0


def forward(Model model not None, KvCache kv not None, const int32_t[::1] tokens not None,
            const int32_t[::1] positions not None, const int32_t[::1] seq_ids not None,
            list page_tables not None, list long_rope not None, const int32_t[::1] logit_rows not None,
            CancelFlag cancel=None, Observer observer=None, bint hidden_states=False, Timings timings=None,
            list sequence_cancels=None):
    """Run a batch of tokens of one or more sequences; return the logits of selected tokens.

    tokens: int32 [n_tokens], token ids.
    positions: int32 [n_tokens], ascending within a sequence; the cache holds all earlier positions.
    seq_ids: int32 [n_tokens], indices into page_tables and long_rope.
    page_tables: per sequence, int32 page numbers; position p is stored in page page_table[p // PAGE_TOKENS].
    long_rope: per sequence, whether to rotate by the long LongRoPE factors.
    logit_rows: int32 [n_logit_rows], indices of tokens in the batch, in any order.
    cancel: flag that cancels the call.
    sequence_cancels: CancelFlags of sequences; the call is cancelled when all of them are set.
    observer: an Observer of this model, to which the batch is added.
    hidden_states: return hidden states instead of logits: the input of the LM head, after the final norm.
    timings: a Timings of this model, to which the times of the call are added.

    Returns float32 [n_logit_rows, n_vocab], or [n_logit_rows, n_embd] with hidden_states.

    Raises ValueError for lengths that differ and indices out of range, ModelClosedError, Cancelled, MemoryError. An
    exception of a signal handler, such as KeyboardInterrupt, is raised within 0.1 s and one layer.
    """
    cdef int n_tokens = <int>tokens.shape[0], n_sequences = <int>len(page_tables), i
    cdef int n_logit_rows = <int>logit_rows.shape[0]
    if n_tokens == 0 or positions.shape[0] != n_tokens or seq_ids.shape[0] != n_tokens:
        raise ValueError("tokens, positions and seq_ids differ in length or are empty")
    if len(long_rope) != n_sequences:
        raise ValueError(f"long_rope has {len(long_rope)} elements, expected {n_sequences}: one per page table")
    if kv.model is not model:
        raise ValueError("the KV cache belongs to another model")
    if observer is not None and observer.model is not model:
        raise ValueError("the observer belongs to another model")
    if timings is not None and timings.model is not model:
        raise ValueError("the timings belong to another model")
    _check(tokens, 0, model.model.n_vocab, "a token id")
    _check(seq_ids, 0, n_sequences, "a sequence id")
    _check(logit_rows, 0, n_tokens, "a logit row")
    tables = [np.ascontiguousarray(table, np.int32) for table in page_tables]
    cdef const int32_t[::1] table
    cdef phi_sequence *sequences = <phi_sequence *>calloc(n_sequences, sizeof(phi_sequence))
    if sequences == NULL:
        raise MemoryError
    cdef phi_batch batch
    cdef phi_status status
    cdef list errors = []
    cdef _Watch watch = _watch(cancel, errors, phi_seconds())
    cdef _Flags *flags = NULL
    try:
        if sequence_cancels:
            flags = <_Flags *>calloc(len(sequence_cancels), sizeof(_Flags))
            if flags == NULL:
                raise MemoryError
            for i, flag in enumerate(sequence_cancels):
                flags[i] = _flags(flag)
            watch.sequences, watch.n_sequences = flags, len(sequence_cancels)
        for i in range(n_sequences):
            table = tables[i]
            _check(table, 0, kv.n_pages, "a page number")
            sequences[i].pages = &table[0] if table.shape[0] else NULL
            sequences[i].long_rope = bool(long_rope[i])
        for i in range(n_tokens):
            if not 0 <= positions[i] < len(tables[seq_ids[i]]) * PHI_PAGE_TOKENS:
                raise ValueError(f"position {positions[i]} is outside the pages of sequence {seq_ids[i]}")
        out = np.empty((n_logit_rows, model.model.n_embd if hidden_states else model.model.n_vocab), np.float32)
        batch.n_tokens = n_tokens
        batch.tokens = &tokens[0]
        batch.positions = &positions[0]
        batch.seq_ids = &seq_ids[0]
        batch.sequences = sequences
        batch.n_logit_rows = n_logit_rows
        batch.logit_rows = &logit_rows[0] if n_logit_rows else NULL
        batch.logits = batch.hidden_states = NULL
        if n_logit_rows and hidden_states:
            batch.hidden_states = _data(out)
        elif n_logit_rows:
            batch.logits = _data(out)
        batch.poll = _poll
        batch.poll_context = &watch
        batch.observer = &observer.sums if observer is not None else NULL
        batch.timings = &timings.times if timings is not None else NULL
        with model.lock:  # a thread pool runs one call at a time
            if model.model.pool == NULL:
                raise ModelClosedError("the model was closed")
            with nogil:
                status = phi_forward(&model.model, kv.kv, &batch)
    finally:
        free(sequences)
        free(flags)
    if errors:
        raise errors[0]
    if status == PHI_CANCELLED:
        raise Cancelled("the call was cancelled")
    if status != PHI_OK:
        raise _failure(status, "the working memory of a forward pass")
    if observer is not None:
        observer.n_tokens += n_tokens
    if timings is not None:
        timings.n_calls += 1
    return out


def lm_head(Model model not None, KvCache kv not None, const float[:, ::1] hidden_states not None):
    """Return the logits of hidden states from `forward`, float32 [n_rows, n_vocab].

    hidden_states: float32 [n_rows, n_embd], after the final norm. kv: a KV cache of the model, whose working memory is
    used. The logits have the bits that `forward` would return; on tiers with a `max_exact_batch`, if both calls have at
    most that many rows, or both have more.

    Raises ValueError for another shape or another model's cache, ModelClosedError, MemoryError.
    """
    cdef int n_rows = <int>hidden_states.shape[0]
    cdef phi_status status
    cdef float *out
    if kv.model is not model:
        raise ValueError("the KV cache belongs to another model")
    if hidden_states.shape[1] != model.model.n_embd:
        raise ValueError(f"hidden states have {hidden_states.shape[1]} columns, expected {model.model.n_embd}")
    logits = np.empty((n_rows, model.model.n_vocab), np.float32)
    if n_rows == 0:
        return logits
    out = _data(logits)
    with model.lock:
        if model.model.pool == NULL:
            raise ModelClosedError("the model was closed")
        with nogil:
            status = phi_lm_head(&model.model, kv.kv, n_rows, &hidden_states[0, 0], out)
    if status != PHI_OK:
        raise _failure(status, "the working memory of the LM head")
    return logits


cdef float *_data(float[:, ::1] array) noexcept:
    return &array[0, 0]
