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


cdef object _tuning_object(const phi_tuning *t):
    return Tuning(
        {
            phi_types[i].name.decode(): tuple(
                Prefetch(t.prefetch[i][c].l1_bytes, t.prefetch[i][c].l2_bytes, bool(t.prefetch[i][c].next_page))
                for c in range(PHI_N_BATCH_CLASSES)
            )
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
