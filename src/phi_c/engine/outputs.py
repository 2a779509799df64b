"""What the engine publishes, and the queue from which a caller reads it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from phi_c.errors import PhiError
from phi_c.sampling.sampler import TokenLogprob

if TYPE_CHECKING:
    from phi_c.engine.sequence import Finish, Sequence

_WAIT_SECONDS = 0.1  # so that signals are handled on Windows too, and if another thread received them

MAX_UNREAD_TOKENS = 64


@dataclass(slots=True)
class Output:
    """A token or hidden states of a sequence, its end, or both; not modified after it was made."""

    sequence: "Sequence"  # to tell the sequences of a queue apart; its state belongs to the engine
    token: int | None = None
    logprob: TokenLogprob | None = None
    position: int = 0  # of the first hidden state
    hidden_states: npt.NDArray[np.float32] | None = None  # [n, n_embd]
    finish: "Finish | None" = None  # None while running, and after an error
    error: BaseException | None = None
    time: float = 0.0  # seconds, when it was published

    @property
    def is_last(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish is not None or self.error is not None


class OutputQueue:
    """Outputs of one or more sequences of a caller, in the order in which they were computed.

    The engine's thread puts, one thread of the caller reads. A sequence is not scheduled while its queue is full, that
    is, has max_unread outputs that nobody has read; None: never full, and the reader gets all outputs of a sequence
    together when it ends, so that it does not wake for each token.
    """

    def __init__(self, max_unread: int | None = MAX_UNREAD_TOKENS) -> None:
        self.max_unread = max_unread
        self._held: list[Output] = []
        self.notify: Callable[[], None] = lambda: None  # called by the reader after the engine found the queue full
        self._queue: SimpleQueue[list[Output]] = SimpleQueue()
        self._n_put = 0  # written by the engine only
        self._n_read = 0  # written by the reader only
        self._was_full = False
        self._process = os.getpid()

    def put(self, outputs: list[Output]) -> None:
        """Add outputs that the reader gets together."""
        self._n_put += len(outputs)
        if self.max_unread is None:
            self._held += outputs
            if not outputs[-1].is_last:
                return
            outputs, self._held = self._held, []
        self._queue.put(outputs)

    @property
    def is_full(self) -> bool:
        """Whether max_unread outputs are unread; if so, the next `read` calls `notify`."""
        if self.max_unread is None or self._n_put - self._n_read < self.max_unread:
            self._was_full = False
            return False
        self._was_full = True
        return self._n_put - self._n_read >= self.max_unread  # again: the reader may not have seen the flag

    def read(self) -> list[Output]:
        """Wait for an output; return all that there are.

        Raises what a signal handler raises, and PhiError in a forked child, which does not run its parent's sequences.
        """
        outputs = list(self._wait())
        while not self._queue.empty():
            outputs += self._queue.get_nowait()
        self._n_read += len(outputs)
        if self._was_full:
            self.notify()
        return outputs

    def _wait(self) -> list[Output]:
        while True:
            try:
                return self._queue.get(timeout=_WAIT_SECONDS)
            except Empty:
                if os.getpid() != self._process:
                    raise PhiError("a call that began before os.fork does not continue in the child process") from None
