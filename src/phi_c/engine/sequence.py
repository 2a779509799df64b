"""The state of one request in the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag
from phi_c.sampling.sampler import Sampler, TokenLogprob


class Finish(Enum):
    """Why a sequence ended; the values are the `finish_reason` of results."""

    STOP = "stop"  # an end-of-generation token or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"  # its cancel flag was set
    OUTPUTS_READY = "outputs_ready"  # a hidden-state request: all hidden states are computed


class Status(Enum):
    """Scheduling state of a sequence."""

    WAITING = auto()  # queued; holds no pages
    RUNNING = auto()  # holds pages; takes part in steps
    DONE = auto()  # finished, failed or removed; holds no pages


@dataclass(eq=False)
class Sequence:
    """Token ids of a request and how many of them are in the KV cache; tokens[:n_prompt] is the prompt.

    A generation request has a sampler, which appends tokens. A hidden-state request has output_from instead: the hidden
    states after the final norm, from that position to the end, are put into `hidden_states`, from where the caller
    removes them.
    """

    tokens: list[int]
    max_tokens: int = 0  # maximum number of generated tokens
    sampler: Sampler | None = None
    eog_ids: frozenset[int] = frozenset()  # end-of-generation tokens
    n_top_logprobs: int | None = None  # most probable tokens to report; None: no log-probabilities
    cancel: CancelFlag | None = None
    accept: Callable[[int], bool] = lambda token: True  # called with each generated token; False ends the sequence
    output_from: int | None = None  # first position of a hidden-state request; None: a generation request

    n_prompt: int = field(init=False)
    pages: list[int] = field(default_factory=list)  # page table; FREED behind the sliding window
    n_freed: int = 0  # leading entries of `pages` that are FREED
    keys: list[bytes] = field(default_factory=list)  # prefix keys of the full pages, see kv_pages.extend_keys
    n_computed: int = 0  # tokens whose keys and values are in the KV cache
    n_cached: int = 0  # prompt tokens found in the prefix cache
    long_rope: bool = False  # rotated with LongRoPE's long factors
    status: Status = Status.WAITING
    finish: Finish | None = None  # None while running, and after an error
    error: BaseException | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one per generated token
    hidden_states: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)  # first position -> [n, n_embd]

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def is_done(self) -> bool:
        """Whether the sequence has left the engine."""
        return self.status is Status.DONE

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.n_prompt :]

    @property
    def output_start(self) -> int:
        """The first position with an output (logits or hidden states); pages before it may come from a cache."""
        return len(self.tokens) - 1 if self.output_from is None else self.output_from

    @property
    def max_positions(self) -> int:
        """Maximum number of KV cache positions; the last generated token is never computed."""
        return self.n_prompt + max(self.max_tokens - 1, 0)
