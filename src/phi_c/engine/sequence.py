"""The state of one sequence in the engine."""

from dataclasses import dataclass, field
from enum import Enum, auto

from phi_c._core import CancelFlag
from phi_c.engine.outputs import OutputQueue
from phi_c.sampling.sampler import Sampler


class Finish(Enum):
    """Why a sequence ended; the values are the `finish_reason` of results."""

    STOP = "stop"  # an end-of-generation token or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"  # its cancel flag was set
    OUTPUTS_READY = "outputs_ready"  # a hidden-state request: all hidden states are published


class Status(Enum):
    """Scheduling state of a sequence."""

    WAITING = auto()  # queued; holds no pages
    RUNNING = auto()  # holds pages; takes part in steps
    DONE = auto()  # finished, failed or removed; holds no pages


@dataclass(eq=False)
class Sequence:
    """Token ids and how many of them are in the KV cache; tokens[:n_prompt] is the prompt.

    A generation request has a sampler, which appends tokens. A hidden-state request has output_from instead: the hidden
    states after the final norm are published, from that position to the end.

    From the moment it is submitted, a sequence belongs to the engine; the caller reads `outputs` only.
    """

    tokens: list[int]
    max_tokens: int = 0  # maximum number of generated tokens
    sampler: Sampler | None = None
    eog_ids: frozenset[int] = frozenset()  # end-of-generation tokens
    n_top_logprobs: int | None = None  # most probable tokens to report; None: no log-probabilities
    cancel: CancelFlag = field(default_factory=CancelFlag)
    output_from: int | None = None  # first position of a hidden-state request; None: a generation request
    priority: int = 0  # larger ones are admitted first
    outputs: OutputQueue = field(default_factory=OutputQueue)

    n_prompt: int = field(init=False)
    arrival: int = 0  # in the order of submission
    pages: list[int] = field(default_factory=list)  # page table; FREED behind the sliding window
    n_freed: int = 0  # leading entries of `pages` that are FREED
    keys: list[bytes] = field(default_factory=list)  # prefix keys of the full pages, see kv_pages.extend_keys
    n_computed: int = 0  # tokens whose keys and values are in the KV cache
    n_output: int = 0  # positions whose hidden states are published, or lie before output_from
    n_cached: int | None = None  # prompt tokens found in the prefix cache; None before the first admission
    long_rope: bool = False  # rotated with LongRoPE's long factors
    status: Status = Status.WAITING

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)  # grows
        self.n_prompt = len(self.tokens)
        self.n_output = self.output_from or 0

    @property
    def is_done(self) -> bool:
        """Whether the sequence has left the engine."""
        return self.status is Status.DONE

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.n_prompt :]

    @property
    def n_left(self) -> int:
        """Number of tokens that are not computed yet: 1 while decoding."""
        return len(self.tokens) - self.n_computed

    @property
    def output_start(self) -> int:
        """The first position whose output (logits or hidden states) is still needed."""
        return len(self.tokens) - 1 if self.output_from is None else self.n_output

    @property
    def max_positions(self) -> int:
        """Maximum number of KV cache positions; the last generated token is never computed."""
        return self.n_prompt + max(self.max_tokens - 1, 0)
