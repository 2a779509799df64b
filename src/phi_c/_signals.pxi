# ---- cancelling long calls: flags and signals ----


cdef class CancelFlag:
    """Cancels a call from any thread. parent: a flag that, when set, counts as this one being set."""

    cdef volatile int flag
    cdef readonly CancelFlag parent

    def __init__(self, CancelFlag parent=None):
        if parent is not None and parent.parent is not None:
            raise ValueError("the parent of a CancelFlag has a parent itself")
        self.parent = parent

    def set(self):
        """Cancel calls with this flag, running or future, until `clear`."""
        self.flag = 1

    def clear(self):
        """Reset the flag, so that it can be used again."""
        self.flag = 0

    def is_set(self):
        """Return whether the flag or its parent is set."""
        return self.flag != 0 or (self.parent is not None and self.parent.flag != 0)


cdef struct _Flags:  # of a CancelFlag and its parent; NULL: none
    const volatile int *own
    const volatile int *parent


cdef struct _Watch:  # state of _poll, which long C calls call every few milliseconds
    _Flags cancel  # cancels the call
    const _Flags *sequences  # [n_sequences]; all set: cancels the call
    int n_sequences
    c_bool handles_signals  # whether the call runs in the main thread, the only one that runs signal handlers
    double last_check  # phi_seconds() at the last check for Python signals
    void *errors  # list of exceptions raised by signal handlers


cdef _Watch _watch(CancelFlag cancel, list errors, double last_check):
    cdef _Watch watch
    watch.cancel = _flags(cancel)
    watch.sequences = NULL
    watch.n_sequences = 0
    watch.handles_signals = threading.current_thread() is threading.main_thread()
    watch.last_check = last_check
    watch.errors = <void *>errors
    return watch


cdef _Flags _flags(CancelFlag cancel):
    cdef _Flags flags
    flags.own = &cancel.flag if cancel is not None else NULL
    flags.parent = &cancel.parent.flag if cancel is not None and cancel.parent is not None else NULL
    return flags


cdef c_bool _is_set(const _Flags *flags) noexcept nogil:
    return (flags.own != NULL and flags.own[0]) or (flags.parent != NULL and flags.parent[0])


cdef c_bool _all_set(const _Watch *watch) noexcept nogil:
    cdef int i
    for i in range(watch.n_sequences):
        if not _is_set(&watch.sequences[i]):
            return False
    return watch.n_sequences > 0


cdef c_bool _poll(void *context) noexcept nogil:
    cdef _Watch *watch = <_Watch *>context
    cdef double now = phi_seconds()
    if _is_set(&watch.cancel) or _all_set(watch):
        return True
    if not watch.handles_signals or 0 <= now - watch.last_check < 0.1:
        return False
    watch.last_check = now
    return _handle_signals(watch)


cdef c_bool _handle_signals(_Watch *watch) noexcept with gil:
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        (<list>watch.errors).append(error)
        return True
    return False
