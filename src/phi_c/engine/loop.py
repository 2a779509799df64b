"""The thread that runs an engine: callers submit sequences and read their outputs; nothing else touches its state."""

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from phi_c.engine.engine import Bytes, Engine
from phi_c.engine.sequence import Sequence
from phi_c.errors import ModelClosedError, PhiError

T = TypeVar("T")
_Command = Callable[[Engine], None]
_Inbox = SimpleQueue[_Command | None]  # None ends the thread

_WAIT_SECONDS = 0.1  # so that signals are handled on Windows too, and if another thread received them
# Signals of the thread's own errors, which must not be blocked.
_FAULTS = {s for s in signal.Signals if s.name in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT")}
_loops: "weakref.WeakSet[EngineLoop]" = weakref.WeakSet()


class EngineLoop:
    """Runs an engine on a thread of its own, which starts with the first call. Safe to use from any thread.

    Commands and steps take turns. Exceptions of a caller, such as KeyboardInterrupt or a timeout that a signal handler
    raises, never reach the engine: Python runs signal handlers in the main thread only. A forked child has the engine
    without sequences, and starts a thread of its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.RLock()  # a signal handler may interrupt its owner and make another call
        self._is_closed = False
        self._inbox: _Inbox = SimpleQueue()
        self._thread: threading.Thread | None = None
        _loops.add(self)

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences together. The caller then reads their outputs. Raises ModelClosedError, MemoryError."""
        if not sequences:
            return
        wake = _waker(self._inbox)
        for sequence in sequences:
            sequence.outputs.notify = wake
        self._send(lambda engine: engine.add(sequences))

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Remove sequences without an output. Never blocks: the garbage collector may call it in any thread."""
        for sequence in sequences:
            if not sequence.is_done:
                sequence.cancel.set()  # ends a forward pass that computes nothing else
                self._inbox.put(_removal(sequence))

    def call(self, function: Callable[[Engine], T]) -> T:
        """Call a function with the engine between two steps, and return its result.

        Sequences wait meanwhile. Raises what the function raises, ModelClosedError, MemoryError.
        """
        if threading.current_thread() is self._thread:
            raise AssertionError("a command of the engine's thread called the loop")
        reply: _Reply[T] = _Reply(function)
        self._send(reply.run)
        return reply.wait()

    @property
    def page_bytes(self) -> int:
        """Size of a page of the KV cache."""
        return self._engine.kv.page_bytes

    def read_page(self, key: bytes) -> Bytes | None:
        """See Engine.read_page."""
        return self.call(lambda engine: engine.read_page(key))

    def insert_page(self, key: bytes, data: Bytes) -> bool:
        """See Engine.insert_page."""
        return self.call(lambda engine: engine.insert_page(key, data))

    def close(self) -> None:
        """Close the model and wait for the thread; unfinished sequences fail with ModelClosedError."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        if thread is None:
            self._engine.close()
            return
        self._engine.interrupt.set()
        self._inbox.put(None)
        while thread.is_alive():
            thread.join(_WAIT_SECONDS)

    def _send(self, command: _Command) -> None:
        with self._lock:
            if self._is_closed:
                raise ModelClosedError("the model was closed")
            if self._thread is None:
                self._start()
            self._inbox.put(command)

    def _start(self) -> None:
        thread = threading.Thread(target=_run, args=(self._engine, self._inbox), name="phi-c engine", daemon=True)
        # The thread has no reference to this object: a model that nobody refers to ends it.
        self._finalizer = weakref.finalize(self, _end, self._engine, self._inbox)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:
            self._finalizer.detach()
            self._thread = None
            raise MemoryError("cannot start the thread of the model: the limit of threads is reached") from None

    def after_fork_in_child(self) -> None:
        """Forget the parent's thread, commands and sequences."""
        if self._thread is not None:
            self._finalizer.detach()
            self._engine.forget_sequences()
        self._lock = threading.RLock()
        self._inbox = SimpleQueue()
        self._thread = None


class _Reply(Generic[T]):
    """The result of a function that another thread calls."""

    def __init__(self, function: Callable[[Engine], T]) -> None:
        self._function = function
        self._results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._process = os.getpid()

    def run(self, engine: Engine) -> None:
        """Call the function; in the engine's thread."""
        try:
            self._results.put((self._function(engine), None))
        except BaseException as error:
            self._results.put((None, error))

    def wait(self) -> T:
        """Return the result, or raise the error."""
        while True:
            with contextlib.suppress(Empty):
                result, error = self._results.get(timeout=_WAIT_SECONDS)
                break
            if os.getpid() != self._process:
                raise PhiError("a call that began before os.fork does not continue in the child process")
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


def _run(engine: Engine, inbox: _Inbox) -> None:
    """Run commands, and steps while there is something to compute, until a command is None."""
    if hasattr(signal, "pthread_sigmask"):  # Ctrl-C and timers are for the threads that wait
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
    is_open = True
    while is_open:
        # Those that are there: more that come meanwhile must not keep the sequences waiting.
        for _ in range(inbox.qsize() or int(engine.scheduler.is_idle)):
            command = inbox.get()
            if command is None:
                is_open = False
            else:
                _try(engine, command)
        if is_open and not engine.scheduler.is_idle:
            _try(engine, Engine.step)
    engine.close()
    while not inbox.empty():  # sent before the end
        command = inbox.get()
        if command is not None:
            _try(engine, command)


def _try(engine: Engine, command: _Command) -> None:
    try:
        command(engine)
    except BaseException as error:  # a bug: the callers get it, instead of waiting forever
        engine.fail_all(error)


def _end(engine: Engine, inbox: _Inbox) -> None:
    engine.interrupt.set()
    inbox.put(None)


def _waker(inbox: _Inbox) -> Callable[[], None]:
    def wake() -> None:
        inbox.put(_do_nothing)

    return wake


def _removal(sequence: Sequence) -> _Command:
    def remove(engine: Engine) -> None:
        engine.remove(sequence)

    return remove


def _do_nothing(engine: Engine) -> None:
    pass


def _after_fork_in_child() -> None:
    for loop in list(_loops):
        loop.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
