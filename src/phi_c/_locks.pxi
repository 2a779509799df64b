# ---- locks that a fork waits for ----


ENGINE, DISK_CACHE, MODEL = range(3)  # ranks of locks, in the order in which a thread takes them

_fork_locks = []  # weak references to them
_lock_numbers = itertools.count()
_forking = threading.local()


cdef class ForkLock:
    """A lock that a fork waits for; a context manager. A thread that holds one takes others of a higher rank only.

    A child of `os.fork` has the thread that forked and no other: a lock that another one held would never be released
    there, and what it guards would be half changed. So a fork takes all of these locks first and gives them back on
    both sides, which costs at most the step that a model is in. Those that the forking thread holds itself, since a
    signal handler forks in the middle of a step, stay its own on both sides.

    Compiled, so that no interrupt comes between taking the lock and noting who holds it. Raises PhiError for a thread
    that holds it already, and would wait for itself.
    """

    cdef object lock, __weakref__
    cdef readonly tuple place
    cdef long holder  # a thread, or 0

    def __init__(self, int rank):
        self.lock = threading.Lock()
        self.place = rank, next(_lock_numbers)
        _fork_locks.append(weakref.ref(self, _fork_locks.remove))

    def __enter__(self):
        cdef long thread = PyThread_get_thread_ident()
        if self.holder == thread:
            raise PhiError("a model was called in the middle of a call by the same thread, from a signal handler maybe")
        self.lock.acquire()
        self.holder = thread

    def __exit__(self, *exception):
        self.holder = 0
        self.lock.release()

    def locked(self):
        """Return whether a thread holds it, this one or another."""
        return self.lock.locked()


def _take_fork_locks():
    cdef ForkLock each
    cdef long thread = PyThread_get_thread_ident()
    _forking.taken = []
    locks = [lock for reference in list(_fork_locks) if (lock := reference()) is not None]
    for each in sorted(locks, key=lambda lock: lock.place):
        if each.holder != thread:
            each.lock.acquire()  # an interrupt ends it, and the fork goes on with what was taken
            _forking.taken.append(each.lock)


def _release_fork_locks():
    for lock in reversed(getattr(_forking, "taken", ())):
        lock.release()
    _forking.taken = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_take_fork_locks, after_in_parent=_release_fork_locks, after_in_child=_release_fork_locks
    )
