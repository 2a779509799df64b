"""One request on its way through the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag
from phi_c.sampling.sampler import Sampler, TokenLogprob


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-generation token, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"
    OUTPUTS_READY = "outputs_ready"  # all the rows that were wanted are there


class Status(Enum):
    """Where a sequence is."""

    WAITING = auto()  # has no pages yet
    RUNNING = auto()
    DONE = auto()


@dataclass(eq=False)
class Sequence:
    """Tokens, and how many of them are in the cache. tokens[:n_prompt] is the prompt.

    It is continued by its sampler, or, with output_from, only read: the rows after the final norm, from that position to
    the end, are put into `rows`, and whoever waits takes them from there.
    """

    tokens: list[int]
    max_tokens: int = 0  # generated at most
    sampler: Sampler | None = None
    eog_ids: frozenset[int] = frozenset()
    n_top_logprobs: int | None = None  # None: no log-probabilities
    cancel: CancelFlag | None = None
    accept: Callable[[int], bool] = lambda token: True  # False: the text is complete
    output_from: int | None = None

    n_prompt: int = field(init=False)
    pages: list[int] = field(default_factory=list)  # FREED where the window has passed
    n_freed: int = 0  # pages, the first ones, that the window has passed
    keys: list[bytes] = field(default_factory=list)  # of the pages that tokens fill, see extend_keys
    n_computed: int = 0  # tokens whose keys and values are in the cache
    n_cached: int = 0  # of the prompt, found in the prefix cache
    long_rope: bool = False
    status: Status = Status.WAITING
    finish: Finish | None = None
    error: BaseException | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    rows: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)  # first position -> [n, n_embd]

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def is_done(self) -> bool:
        """Whether it has left the engine."""
        return self.status is Status.DONE

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.n_prompt :]

    @property
    def output_start(self) -> int:
        """The first position whose row is wanted; what lies before may come from the cache."""
        return len(self.tokens) - 1 if self.output_from is None else self.output_from

    @property
    def n_longest(self) -> int:
        """Positions that it may come to need: the last generated token is never computed."""
        return self.n_prompt + max(self.max_tokens - 1, 0)
