# ---- tuning: settings that change the speed of a model, never its results ----


BATCH_CLASSES = (1, 4, 8, 16)  # largest batch, in tokens, of each class that has a prefetch of its own
MAX_SMALL_BATCH = PHI_MAX_SMALL_BATCH
_TASK_ROWS = (32, 64, 128, 256)


class Prefetch(NamedTuple):
    """Software prefetch of weights: distances into L1 and L2 in bytes (0: none), and whether of the next 4 KiB page."""

    l1_bytes: int
    l2_bytes: int
    next_page: bool


class Tuning(NamedTuple):
    """Settings of a model's forward passes, phi_tuning in csrc/phi.h.

    prefetch: per type name, a Prefetch for each of BATCH_CLASSES.
    max_small_batch: per type name, the largest batch that takes the small-batch path of packed products, in tokens.
    max_task_rows: weight rows per task. tasks_per_thread: tasks that a phase is divided into, per thread.
    spins: checks of a waiting thread before it sleeps.
    """

    prefetch: dict
    max_small_batch: dict
    max_task_rows: int
    tasks_per_thread: int
    spins: int


class TuneResult(NamedTuple):
    """The measured choice for one tensor type and batch class.

    n_tokens: the class, one of BATCH_CLASSES. prefetch: the choice. default_seconds: per byte of weights
    with the default setting, median of n_samples. chosen_seconds: the same times the median ratio of the choice.
    is_clear: False if another candidate may be faster, but the measurements vary too much to tell.
    """

    type_name: str
    n_tokens: int
    prefetch: Prefetch
    default_seconds: float
    chosen_seconds: float
    n_samples: int
    is_clear: bool


cdef object _prefetch_object(const phi_prefetch *p):
    return Prefetch(p.l1_bytes, p.l2_bytes, bool(p.next_page))


cdef object _tuning_object(const phi_tuning *t):
    return Tuning(
        {
            phi_types[i].name.decode(): tuple(_prefetch_object(&t.prefetch[i][c]) for c in range(PHI_N_BATCH_CLASSES))
            for i in range(PHI_N_TYPES)
        },
        {phi_types[i].name.decode(): t.max_small_batch[i] for i in range(PHI_N_TYPES)},
        t.max_task_rows,
        t.tasks_per_thread,
        t.spins,
    )


cdef int _fill_tuning(tuning, phi_tuning *t) except -1:
    cdef int i, c
    if tuning.max_task_rows not in _TASK_ROWS:
        raise ValueError(f"max_task_rows is {tuning.max_task_rows}, expected one of {_TASK_ROWS}")
    if not 1 <= tuning.tasks_per_thread <= 64:
        raise ValueError(f"tasks_per_thread is {tuning.tasks_per_thread}, expected 1 to 64")
    if not 0 <= tuning.spins <= 1 << 20:
        raise ValueError(f"spins is {tuning.spins}, expected 0 to {1 << 20}")
    t.max_task_rows, t.tasks_per_thread, t.spins = tuning.max_task_rows, tuning.tasks_per_thread, tuning.spins
    for i in range(PHI_N_TYPES):
        name = phi_types[i].name.decode()
        if not 1 <= tuning.max_small_batch[name] <= PHI_MAX_SMALL_BATCH:
            raise ValueError(
                f"max_small_batch of {name} is {tuning.max_small_batch[name]}, expected 1 to {PHI_MAX_SMALL_BATCH}"
            )
        if len(tuning.prefetch[name]) != PHI_N_BATCH_CLASSES:
            raise ValueError(f"{name} has {len(tuning.prefetch[name])} prefetches, expected {PHI_N_BATCH_CLASSES}")
        t.max_small_batch[i] = tuning.max_small_batch[name]
        for c in range(PHI_N_BATCH_CLASSES):
            each = tuning.prefetch[name][c]
            if not (0 <= each.l1_bytes <= 1 << 16 and 0 <= each.l2_bytes <= 1 << 16):
                raise ValueError(f"prefetch of {name} is {each}, expected distances from 0 to {1 << 16} bytes")
            t.prefetch[i][c].l1_bytes, t.prefetch[i][c].l2_bytes = each.l1_bytes, each.l2_bytes
            t.prefetch[i][c].next_page = each.next_page
    return 0


def default_tuning():
    """Return the settings without measurement, the same on every CPU."""
    cdef phi_tuning t = phi_default_tuning()
    return _tuning_object(&t)


def get_tuning(Model model not None):
    """Return the settings of a model."""
    return _tuning_object(&model.model.tuning)


def set_tuning(Model model not None, tuning):
    """Change the settings of a model. Raises ValueError for values out of range, ModelClosedError."""
    cdef phi_tuning t = model.model.tuning
    _fill_tuning(tuning, &t)
    with model.lock:
        if model.model.pool == NULL:
            raise ModelClosedError("the model was closed")
        model.model.tuning = t
        phi_pool_set_spins(model.model.pool, t.spins)


def prefetch_candidates(int n_tokens):
    """Return the prefetches that `tune` compares for batches of n_tokens; the first is the default."""
    cdef int n
    cdef const phi_prefetch *candidates = phi_tune_candidates(phi_batch_class_of(n_tokens), &n)
    return [_prefetch_object(&candidates[i]) for i in range(n)]


def tune(Model model not None, double seconds, known=(), CancelFlag cancel=None):
    """Choose the prefetch of each tensor type and batch class by measuring the model's packed weights.

    seconds: budget. known: names of types whose settings are kept. The model's own settings are not changed.

    Returns (Tuning, list of TuneResult): the model's settings with the choices, and what was measured. Raises
    ModelClosedError, Cancelled, MemoryError. An exception of a signal handler is raised within 0.1 s.
    """
    cdef phi_tuning tuning = model.model.tuning
    cdef phi_tune_call call
    cdef phi_status status
    cdef list errors = []
    cdef _Watch watch = _watch(cancel, errors, phi_seconds())
    call.seconds = seconds
    call.poll = _poll
    call.poll_context = &watch
    for i in range(PHI_N_TYPES):
        call.is_known[i] = phi_types[i].name.decode() in known
    with model.lock:
        if model.model.pool == NULL:
            raise ModelClosedError("the model was closed")
        with nogil:
            status = phi_tune(&model.model, &call, &tuning)
    if errors:
        raise errors[0]
    if status == PHI_CANCELLED:
        raise Cancelled("the call was cancelled")
    if status != PHI_OK:
        raise _failure(status, "the working memory of tuning")
    return _tuning_object(&tuning), [
        TuneResult(phi_types[i].name.decode(), BATCH_CLASSES[c], _prefetch_object(&call.results[i][c].chosen),
                   call.results[i][c].default_seconds, call.results[i][c].chosen_seconds, call.results[i][c].n_samples,
                   bool(call.results[i][c].is_clear))
        for c in range(PHI_N_BATCH_CLASSES)
        for i in range(PHI_N_TYPES)
        if call.results[i][c].measured
    ]
