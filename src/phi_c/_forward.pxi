# ---- the KV cache, and a forward pass over it ----


KV_TYPES = ("f16", "q8")


cdef phi_kv_type _kv_type(kv_type) except *:
    if kv_type not in KV_TYPES:
        raise OptionError(f"kv_type is {kv_type!r}, expected one of {', '.join(KV_TYPES)}")
    return PHI_KV_Q8 if kv_type == "q8" else PHI_KV_F16


def kv_page_bytes(config, kv_type="f16"):
    """Return the bytes of PAGE_TOKENS positions of a model in a KV cache of a type. Raises OptionError for another."""
    return config.n_layers * config.n_kv_heads * phi_kv_slice_bytes(_kv_type(kv_type), config.head_dim)


cdef class KvCache:
    """Pages of keys and values for one model, PAGE_TOKENS positions each.

    kv_type: "f16", half precision, or "q8", int8 with a scale for each 32 dimensions of a position. Memory is taken from
    the system as pages are first written. Raises MemoryError when it is refused, OptionError for another type.
    """

    cdef phi_kv *kv
    cdef Model model
    cdef readonly int n_pages
    cdef readonly size_t page_bytes

    def __init__(self, Model model not None, int n_pages, kv_type="f16"):
        cdef phi_kv_type type = _kv_type(kv_type)
        if n_pages < 1:
            raise ValueError(f"{n_pages} pages, expected at least 1")
        self.model = model
        self.n_pages = n_pages
        self.page_bytes = phi_kv_page_bytes(&model.model, type)
        if phi_kv_create(&model.model, type, n_pages, &self.kv) != PHI_OK:
            raise MemoryError(f"the KV cache of {n_pages * self.page_bytes} bytes could not be had")

    def __dealloc__(self):
        phi_kv_free(self.kv)

    def read_page(self, int page):
        """Return a copy of all that a page holds: uint8 [page_bytes]. Raises IndexError for one that is not there."""
        cdef const uint8_t *source = self._page(page)
        cdef uint8_t[::1] data = np.empty(self.page_bytes, np.uint8)
        with nogil:
            memcpy(&data[0], source, self.page_bytes)
        return np.asarray(data)

    def write_page(self, int page, const uint8_t[::1] data not None):
        """Fill a page with what `read_page` gave, of this model, type and KV_PAGE_VERSION.

        Raises IndexError, ValueError for data of another size. No `forward` may run meanwhile.
        """
        cdef uint8_t *target = self._page(page)
        if <size_t>data.shape[0] != self.page_bytes:
            raise ValueError(f"{data.shape[0]} bytes, expected {self.page_bytes} of a page")
        with nogil:
            memcpy(target, &data[0], self.page_bytes)

    cdef uint8_t *_page(self, int page) except NULL:
        if not 0 <= page < self.n_pages:
            raise IndexError(f"page {page}, expected 0 to {self.n_pages - 1}")
        return phi_kv_page(&self.model.model, self.kv, page)


cdef class CancelFlag:
    """Stops a running `forward` from another thread."""

    cdef volatile int flag

    def set(self):
        """Ask the call that watches this flag to stop."""
        self.flag = 1

    def clear(self):
        """Make the flag usable again."""
        self.flag = 0

    def is_set(self):
        """Return whether `set` was called."""
        return self.flag != 0


cdef struct _Watch:  # what a running forward pass asks between layers
    const volatile int *flag  # of a CancelFlag, or NULL
    double asked  # phi_seconds() at the last look at Python's signals
    void *errors  # the list that takes what a signal handler raised


cdef c_bool _poll(void *context) noexcept nogil:
    cdef _Watch *watch = <_Watch *>context
    cdef double now = phi_seconds()
    if watch.flag != NULL and watch.flag[0]:
        return True
    if 0 <= now - watch.asked < 0.1:
        return False
    watch.asked = now
    return _handle_signals(watch)


cdef c_bool _handle_signals(_Watch *watch) noexcept with gil:
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        (<list>watch.errors).append(error)
        return True
    return False


cdef class Observer:
    """Adds up, while `forward` runs, the squares of what each matrix of a model is multiplied with.

    attn_in [n_layers, n_embd] is fed to wq, wk and wv, attn_out [n_layers, n_heads * head_dim] to wo, ffn_in
    [n_layers, n_embd] to gate and up, or to a router of experts, ffn_inner [n_layers, n_ffn] to down, and output
    [n_embd], None unless it is asked for, to the output matrix: float64, sums over n_tokens. expert_in [n_layers,
    n_experts, n_embd] and expert_inner [n_layers, n_experts, n_ffn] are what experts are fed, summed over the
    expert_tokens [n_layers, n_experts] that they ran for; without experts they are empty, with them ffn_inner is 0.
    Inputs count as they are before they are rounded to int8.
    """

    cdef phi_observer sums
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
        """Begin anew: also after a pass that was interrupted, which has added a part of its tokens."""
        for sums in (self.attn_in, self.attn_out, self.ffn_in, self.ffn_inner, self.output,
                     self.expert_in, self.expert_inner, self.expert_tokens):
            if sums is not None:
                sums.fill(0)
        self.n_tokens = 0


cdef double *_doubles(double[:, ::1] array) noexcept:
    return &array[0, 0]


cdef int _check(const int32_t[::1] values, int low, int high, what) except -1:
    cdef Py_ssize_t i
    for i in range(values.shape[0]):
        if not low <= values[i] < high:
            raise ValueError(f"{what} is {values[i]}, expected {low} to {high - 1}")
    return 0


def forward(Model model not None, KvCache kv not None, const int32_t[::1] tokens not None,
            const int32_t[::1] positions not None, const int32_t[::1] sequences not None,
            list page_tables not None, list long_rope not None, const int32_t[::1] logit_rows not None,
            CancelFlag cancel=None, Observer observer=None, bint hidden_states=False):
    """Run a batch of tokens and return the logits asked for: float32 [n_logit_rows, n_vocab].

    With hidden_states=True: what the head takes instead, float32 [n_logit_rows, n_embd]: the rows after the final norm,
    of which `head` makes the same logits.

    tokens, positions, sequences: int32 [n_tokens]; token i is at a position of sequence sequences[i], whose position
    p lies in KV page page_tables[s][p // PAGE_TOKENS] (int32) and which rotates by the long factors if long_rope[s].
    logit_rows: int32, tokens of the batch. Positions ascend within a sequence, and the cache holds those before.
    observer: one of this model, to which the batch is added.

    Raises ValueError for indices out of range, ModelClosedError, Cancelled when the flag was set; an interrupt
    (Ctrl-C) passes through within a layer's time.
    """
    cdef int n_tokens = <int>tokens.shape[0], n_sequences = <int>len(page_tables), i
    cdef int n_logit_rows = <int>logit_rows.shape[0]
    if n_tokens == 0 or positions.shape[0] != n_tokens or sequences.shape[0] != n_tokens or len(long_rope) != n_sequences:
        raise ValueError("tokens, positions and sequences differ in length or are empty")
    if kv.model is not model:
        raise ValueError("the KV cache belongs to another model")
    if observer is not None and observer.model is not model:
        raise ValueError("the observer belongs to another model")
    _check(tokens, 0, model.model.n_vocab, "a token id")
    _check(sequences, 0, n_sequences, "a sequence index")
    _check(logit_rows, 0, n_tokens, "a logit row")
    tables = [np.ascontiguousarray(table, np.int32) for table in page_tables]
    cdef const int32_t[::1] table
    cdef phi_sequence *seqs = <phi_sequence *>calloc(n_sequences, sizeof(phi_sequence))
    if seqs == NULL:
        raise MemoryError
    cdef phi_batch batch
    cdef phi_status status
    cdef list errors = []
    cdef _Watch watch
    watch.flag = &cancel.flag if cancel is not None else NULL
    watch.asked = phi_seconds()
    watch.errors = <void *>errors
    try:
        for i in range(n_sequences):
            table = tables[i]
            _check(table, 0, kv.n_pages, "a page")
            seqs[i].pages = &table[0] if table.shape[0] else NULL
            seqs[i].long_rope = bool(long_rope[i])
        for i in range(n_tokens):
            if not 0 <= positions[i] < len(tables[sequences[i]]) * PHI_PAGE_TOKENS:
                raise ValueError(f"position {positions[i]} is outside the pages of its sequence")
        out = np.empty((n_logit_rows, model.model.n_embd if hidden_states else model.model.n_vocab), np.float32)
        batch.n_tokens = n_tokens
        batch.tokens = &tokens[0]
        batch.positions = &positions[0]
        batch.sequences = &sequences[0]
        batch.seqs = seqs
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
        with model.lock:  # one run at a time on a pool
            if model.model.pool == NULL:
                raise ModelClosedError("the model was closed")
            with nogil:
                status = phi_forward(&model.model, kv.kv, &batch)
    finally:
        free(seqs)
    if errors:
        raise errors[0]
    if status == PHI_CANCELLED:
        raise Cancelled("the call was cancelled")
    if status != PHI_OK:
        raise MemoryError("the working memory of a forward pass could not be had")
    if observer is not None:
        observer.n_tokens += n_tokens
    return out


def lm_head(Model model not None, KvCache kv not None, const float[:, ::1] rows not None):
    """Return the logits of rows that `forward` gave with hidden_states=True: float32 [n_rows, n_vocab].

    Raises ValueError for rows of another width, ModelClosedError.
    """
    cdef int n_rows = <int>rows.shape[0]
    cdef phi_status status
    cdef float *out
    if kv.model is not model:
        raise ValueError("the KV cache belongs to another model")
    if rows.shape[1] != model.model.n_embd:
        raise ValueError(f"rows of {rows.shape[1]} values, expected {model.model.n_embd}")
    logits = np.empty((n_rows, model.model.n_vocab), np.float32)
    if n_rows == 0:
        return logits
    out = _data(logits)
    with model.lock:
        if model.model.pool == NULL:
            raise ModelClosedError("the model was closed")
        with nogil:
            status = phi_lm_head(&model.model, kv.kv, n_rows, &rows[0, 0], out)
    if status != PHI_OK:
        raise MemoryError("the working memory of the head could not be had")
    return logits


cdef float *_data(float[:, ::1] array) noexcept:
    return &array[0, 0]
