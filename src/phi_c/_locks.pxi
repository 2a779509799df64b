# ---- locks that os.fork acquires ----


_fork_locks = []  # weak references to all ForkLocks
_lock_numbers = itertools.count()
_forking = threading.local()  # acquired: the locks that this thread's running os.fork has acquired


cdef class ForkLock:
    """A lock that `os.fork` acquires before it forks and releases in the parent and in the child; a context manager.

    A forked child has only the thread that called `os.fork`. A lock held by another thread would never be released
    there, and the data that it guards might be inconsistent. So a fork waits for all ForkLocks, at most as long as the
    current step of a model. Locks that the forking thread itself holds (a signal handler can fork in the middle of a
    call) stay held in parent and child. A thread holds at most one ForkLock at a time.

    Not reentrant: raises PhiError if the thread already holds it, instead of a deadlock. Compiled, so that no interrupt
    can occur between acquiring the lock and recording its owner.
    """

    cdef object lock, __weakref__
    cdef readonly long long number  # of creation: the order in which a fork acquires locks
    cdef long owner  # thread identifier; 0: unlocked

    def __cinit__(self):
        self.lock = threading.Lock()
        self.number = next(_lock_numbers)
        _fork_locks.append(weakref.ref(self, _fork_locks.remove))

    def __enter__(self):
        cdef long thread = PyThread_get_thread_ident()
        if self.owner == thread:
            raise PhiError("the model is in use by this thread: a signal handler must not call it")
        self.lock.acquire()
        self.owner = thread

    def __exit__(self, *exception):
        self.owner = 0
        self.lock.release()


def _acquire_fork_locks():
    cdef ForkLock each
    cdef long thread = PyThread_get_thread_ident()
    _forking.acquired = []
    locks = [lock for reference in list(_fork_locks) if (lock := reference()) is not None]
    for each in sorted(locks, key=lambda lock: lock.number):
        if each.owner != thread:
            each.lock.acquire()  # if an interrupt ends the loop, os.fork continues with the locks acquired so far
            _forking.acquired.append(each.lock)


def _release_fork_locks():
    for lock in reversed(getattr(_forking, "acquired", ())):
        lock.release()
    _forking.acquired = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_acquire_fork_locks, after_in_parent=_release_fork_locks, after_in_child=_release_fork_locks
    )
