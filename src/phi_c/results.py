"""What calls return: a text, whole or piece by piece, and what it cost."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from phi_c.engine.sequence import Finish
from phi_c.engine.sequence import Sequence as EngineSequence
from phi_c.sampling.sampler import TokenLogprob


@dataclass(frozen=True)
class Usage:
    """What a call cost."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache of earlier calls
    completion_tokens: int
    prompt_seconds: float  # until the first token, waiting for other calls included
    decode_seconds: float  # from the first token to the last

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens computed a second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after the first."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.completion_tokens > 1 else 0.0


@dataclass(frozen=True)
class Chunk:
    """A part of a text as it comes; the last one says why it ended."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Completion:
    """A whole text. tokens has the ids as they were generated, an end token included; text has not."""

    text: str
    tokens: list[int]
    finish_reason: str  # "stop": the model or a stop string ended it; "length": max_tokens or context; "cancelled"
    usage: Usage
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation; logarithms are natural."""

    logprob: float  # of the whole continuation: the sum of logprobs
    tokens: list[int]
    logprobs: list[float]  # of each token, after all before it
    is_greedy: bool  # whether each token is the likeliest in its place
    cached_tokens: int  # of prompt and continuation, found in the cache


@dataclass
class _Collected:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


def collect(pieces: Iterator[Chunk]) -> Completion:
    """Return the text that pieces amount to."""
    all_of = _Collected()
    for piece in pieces:
        all_of.text += piece.text
        all_of.tokens += piece.tokens
        all_of.logprobs += piece.logprobs or []
    if piece.finish_reason is None or piece.usage is None:
        raise AssertionError("the last piece says why the text ended")
    logprobs = None if piece.logprobs is None else all_of.logprobs
    return Completion(all_of.text, all_of.tokens, piece.finish_reason, piece.usage, logprobs)


def make_chunk(
    sequence: EngineSequence,
    start: int,
    end: int,
    text: str,
    finish: Finish | None = None,
    usage: Usage | None = None,
) -> Chunk:
    """Return the part of a sequence's text from its generated token number start up to end."""
    return Chunk(
        text=text,
        tokens=sequence.tokens[sequence.n_prompt + start : sequence.n_prompt + end],
        logprobs=None if sequence.n_top_logprobs is None else sequence.logprobs[start:end],
        finish_reason=finish.value if finish else None,
        usage=usage,
    )
