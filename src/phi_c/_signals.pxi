# ---- signals ----


cdef struct _Watch:  # state of _poll, which long C calls call every few milliseconds
    const volatile int *flag  # of a CancelFlag, or NULL
    double last_check  # phi_seconds() at the last check for Python signals
    void *errors  # list of exceptions raised by signal handlers


cdef c_bool _poll(void *context) noexcept nogil:
    cdef _Watch *watch = <_Watch *>context
    cdef double now = phi_seconds()
    if watch.flag != NULL and watch.flag[0]:
        return True
    if 0 <= now - watch.last_check < 0.1:
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
