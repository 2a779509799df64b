"""Measures a model as its users meet it: the engine's own steps, scheduler and greedy choice included."""

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi_c import hub, llm, machine
from phi_c._core import PAGE_TOKENS
from phi_c.bench.memory import read_rate
from phi_c.engine.scheduler import pages_for
from phi_c.engine.sequence import Sequence
from phi_c.errors import OptionError
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import ModelConfig, read_config
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler

_SHORT_PROMPT_TOKENS = 8
_HASHED_TOKENS = 16
_HASH_DIGITS = 16


@dataclass(frozen=True)
class Plan:
    """What to measure; every speed is the median of n_repeats."""

    n_prefill: int = 512  # tokens of the prompt
    n_decode: int = 64  # tokens timed after the first one, of each sequence
    n_seqs: tuple[int, ...] = (1, 4, 8, 16)  # sequences that are decoded together
    contexts: tuple[int, ...] = (0,)  # tokens in the cache before those that are timed
    n_repeats: int = 5

    @property
    def n_ctx(self) -> int:
        """Positions of KV cache that the largest part takes."""
        deepest = pages_for(max(*self.contexts, 1) + self.n_decode)
        widest = max(self.n_seqs) * pages_for(1 + self.n_decode)
        return max(pages_for(self.n_prefill), deepest, widest) * PAGE_TOKENS


@dataclass(frozen=True)
class _Part:
    """One thing to time: n_seqs sequences that decode together, each with so many tokens before."""

    n_seqs: int
    context: int


def measure(
    source: str, plan: Plan, *, progress: Callable[[str], None] = lambda text: None, **loading: Any
) -> dict[str, Any]:
    """Return what `phi-c bench` prints, ready for JSON. loading: options of phi_c.load; progress: is told what runs.

    Speeds are tokens a second. read_gb_s, 1e9 bytes a second, is the median of readings before, between and after the
    repetitions. Raises what loading raises, and OptionError when the plan needs more context than the model has.
    """
    with GGUFFile(hub.resolve(source)) as file:
        config = read_config(file)
        weight_bytes = weight_bytes_per_token(file)
    progress("loading")
    start = time.perf_counter()
    with llm.load(source, n_ctx=_n_ctx(plan, config), **loading) as model:
        load_s = time.perf_counter() - start
        runner = _Runner(model, plan)
        model.generate(runner.random_ids(_SHORT_PROMPT_TOKENS), max_tokens=1, temperature=0)
        first_token_s = time.perf_counter() - start
        digest = logits_hash(model)
        runner.run(progress)
        read = statistics.median(runner.reads) if runner.reads else None
        decode = runner.decode_tok_s(_Part(1, 0))
        return {
            "model": config.name,
            "tier": model.tier,
            "n_threads": model.n_threads,
            "prefill_tok_s": round(statistics.median(runner.prefills), 3),
            "decode_tok_s": decode,
            "batch": [{"n_seqs": n, "tok_s": runner.decode_tok_s(_Part(n, 0))} for n in plan.n_seqs],
            "context": [{"n_tokens": n, "tok_s": runner.decode_tok_s(_Part(1, n))} for n in plan.contexts],
            "read_gb_s": round(read / 1e9, 3) if read else None,
            "weight_bytes_per_token": weight_bytes,
            "bandwidth_share": round(decode * weight_bytes / read, 4) if read else None,
            "load_s": round(load_s, 3),
            "first_token_s": round(first_token_s, 3),
            "peak_rss_bytes": machine.peak_rss(),
            "logits_hash": digest,
        }


def weight_bytes_per_token(file: GGUFFile) -> int:
    """Return the bytes of all matrices that one decoded token reads: those of the layers and of the output.

    Of the embedding a token reads one row, which does not count, unless the embedding serves as output.
    """
    is_tied = "output.weight" not in file.tensors
    return sum(
        info.n_bytes
        for name, info in file.tensors.items()
        if len(info.shape) == 2 and (is_tied or name != "token_embd.weight")
    )


def logits_hash(model: llm.LLM) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the logits (float32, little endian) of fixed tokens."""
    logits = model.logits([7919 * (i + 1) % model.config.n_vocab for i in range(_HASHED_TOKENS)])
    return hashlib.sha256(logits.astype("<f4", copy=False).tobytes()).hexdigest()[:_HASH_DIGITS]


def _n_ctx(plan: Plan, config: ModelConfig) -> int:
    if plan.n_ctx > config.n_ctx_train:
        raise OptionError(
            f"these sizes take a context of {plan.n_ctx} tokens, the model has {config.n_ctx_train}: "
            "lower --prefill, --decode, --batch or --context"
        )
    return plan.n_ctx


class _Runner:
    """Times the parts of a plan, in rounds, so that what else the machine does meets them all alike."""

    def __init__(self, model: llm.LLM, plan: Plan) -> None:
        self.prefills: list[float] = []  # tokens a second, one a repetition; so are the next
        self.decodes: dict[_Part, list[float]] = defaultdict(list)
        self.reads: list[float] = []  # bytes a second
        self._model = model
        self._plan = plan
        self._random = np.random.default_rng(0)

    def run(self, progress: Callable[[str], None]) -> None:
        """Take all measurements."""
        plan = self._plan
        rounds = dict.fromkeys([_Part(1, 0), *(_Part(n, 0) for n in plan.n_seqs)])
        self._read()
        for i in range(plan.n_repeats):
            repetition = f"repetition {i + 1} of {plan.n_repeats}"
            progress(f"prompt of {plan.n_prefill} tokens, {repetition}")
            self.prefills.append(self._prefill())
            for part in rounds:
                progress(f"decoding {part.n_seqs} x {plan.n_decode} tokens, {repetition}")
                self.decodes[part].append(self._decode(part, [self.random_ids(1) for _ in range(part.n_seqs)]))
            self._read()
        for part in dict.fromkeys(_Part(1, n) for n in plan.contexts if n > 0):
            # Computed once: the next repetitions find it in the cache.
            prompt = self.random_ids(part.context)
            for i in range(plan.n_repeats):
                progress(f"decoding after {part.context} tokens, repetition {i + 1} of {plan.n_repeats}")
                self.decodes[part].append(self._decode(part, [prompt]))
            self._read()

    def decode_tok_s(self, part: _Part) -> float:
        """Return the median speed of a part, all its sequences together."""
        return round(statistics.median(self.decodes[part]), 3)

    def random_ids(self, n_tokens: int) -> list[int]:
        """Return token ids that no earlier prompt began with, so that the prefix cache holds none of them."""
        return [int(i) for i in self._random.integers(0, self._model.config.n_vocab, n_tokens)]

    def _read(self) -> None:
        rate = read_rate(self._model.n_threads)
        if rate is not None:
            self.reads.append(rate)

    def _prefill(self) -> float:
        sequence = self._sequence(self.random_ids(self._plan.n_prefill), max_tokens=1)
        start = time.perf_counter()
        self._drive([sequence], 1)
        seconds = time.perf_counter() - start
        return (sequence.n_prompt - sequence.n_cached) / seconds

    def _decode(self, part: _Part, prompts: list[list[int]]) -> float:
        n_tokens = self._plan.n_decode + 1
        sequences = [self._sequence(prompt, n_tokens) for prompt in prompts]
        try:
            self._drive(sequences, 1)
            before = sum(len(sequence.generated) for sequence in sequences)
            start = time.perf_counter()
            self._drive(sequences, n_tokens)
            seconds = time.perf_counter() - start
        finally:
            for sequence in sequences:
                self._model.engine.remove(sequence)
        return (part.n_seqs * n_tokens - before) / seconds

    def _sequence(self, prompt: list[int], max_tokens: int) -> Sequence:
        greedy = SamplingParams(temperature=0, repeat_penalty=1)
        sequence = Sequence(
            tokens=list(prompt),  # it grows, and a prompt may be run again
            max_tokens=max_tokens,
            sampler=Sampler(greedy, self._model.config.n_vocab),
            eog_ids=frozenset(),  # all generate as much as they are asked for
        )
        self._model.engine.add(sequence)
        return sequence

    def _drive(self, sequences: list[Sequence], n_tokens: int) -> None:
        """Run steps until every sequence has generated so many tokens."""
        for sequence in sequences:
            while len(sequence.tokens) - sequence.n_prompt < n_tokens:
                self._model.engine.step(sequence)
