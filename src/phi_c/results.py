"""What calls return: generated text, whole or in chunks, scores, and usage."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from phi_c.sampling.sampler import TokenLogprob


@dataclass(frozen=True)
class Usage:
    """Token counts and times of a generation call."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens served from the KV cache
    completion_tokens: int  # generated tokens, an end token included
    prompt_seconds: float  # time to first token, including the wait for room in the KV cache
    decode_seconds: float  # from the first to the last generated token

    @property
    def prompt_tok_s(self) -> float:
        """Prefill speed: computed prompt tokens per second until the first token."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def decode_tok_s(self) -> float:
        """Decode speed: tokens per second after the first one; 0 with less than two tokens."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.completion_tokens > 1 else 0.0


@dataclass(frozen=True)
class Chunk:
    """A part of a streamed output."""

    text: str
    tokens: list[int]  # generated token ids
    logprobs: list[TokenLogprob] | None = None  # one per token; None unless requested
    finish_reason: str | None = None  # as in Completion; None except in the last chunk
    usage: Usage | None = None  # None except in the last chunk
    seed: int | None = None  # as in Completion; None except in the last chunk


@dataclass(frozen=True)
class Completion:
    """The complete output of a generation call."""

    text: str  # without stop string and end token
    tokens: list[int]  # generated token ids, an end token included
    finish_reason: str  # "stop": end token or stop string; "length": max_tokens or end of context; "cancelled"
    usage: Usage
    seed: int  # with which the call can be repeated; chosen at random unless it was given
    logprobs: list[TokenLogprob] | None = None  # one per token; None unless requested


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a continuation, in nats."""

    logprob: float  # of the whole continuation: the sum of logprobs
    tokens: list[int]  # token ids of the continuation
    logprobs: list[float]  # of each token, given all tokens before it
    is_greedy: bool  # whether every token is the most probable one, so that greedy decoding generates the continuation
    cached_tokens: int  # tokens of prompt and continuation served from the KV cache


@dataclass
class _Accumulated:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


def collect(chunks: Iterator[Chunk]) -> Completion:
    """Return the completion that chunks add up to."""
    total = _Accumulated()
    for chunk in chunks:
        total.text += chunk.text
        total.tokens += chunk.tokens
        total.logprobs += chunk.logprobs or []
    if chunk.finish_reason is None or chunk.usage is None or chunk.seed is None:
        raise AssertionError("the last chunk has no finish_reason, no usage or no seed")
    logprobs = None if chunk.logprobs is None else total.logprobs
    return Completion(total.text, total.tokens, chunk.finish_reason, chunk.usage, chunk.seed, logprobs)
