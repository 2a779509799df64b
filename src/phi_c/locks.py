"""Locks that a fork waits for.

A child of `os.fork` has the thread that forked and no other: a lock that another one held would never be released
there, and what it guards would be half changed. So a fork takes all of these locks first and gives them back on both
sides, which costs at most the step that a model is in.
"""

import itertools
import os
import threading
import weakref

ENGINE, DISK_CACHE, MODEL = range(3)  # ranks, in the order in which a thread takes them

_order: weakref.WeakKeyDictionary[threading.Lock, tuple[int, int]] = weakref.WeakKeyDictionary()
_numbers = itertools.count()
_held: list[threading.Lock] = []  # by the thread that forks


def new_lock(rank: int) -> threading.Lock:
    """Return a lock; a thread that holds one takes others of a higher rank only."""
    lock = threading.Lock()
    _order[lock] = rank, next(_numbers)
    return lock


def _take_all() -> None:
    global _held  # noqa: PLW0603 - hooks of a fork hand over nothing
    locks = [lock for _, lock in sorted((place, lock) for lock, place in list(_order.items()))]
    for lock in locks:
        lock.acquire()
    _held = locks


def _release_all() -> None:
    global _held
    held, _held = _held, []  # before another thread can have them all
    for lock in reversed(held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_all, after_in_parent=_release_all, after_in_child=_release_all)
