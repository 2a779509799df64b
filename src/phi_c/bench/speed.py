"""Measures the speed of a model through the engine: scheduler, forward pass and greedy sampling."""

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
class Workload:
    """What to measure; every speed is the median of n_repeats repetitions."""

    n_prefill: int = 512  # prompt length in tokens
    n_decode: int = 64  # timed tokens per sequence, after its first one
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)  # numbers of sequences that are decoded together
    contexts: tuple[int, ...] = (0,)  # tokens in the KV cache before the timed ones, for one sequence
    n_repeats: int = 5

    @property
    def n_ctx(self) -> int:
        """KV cache capacity, in tokens, of the largest measurement."""
        longest = pages_for(max(*self.contexts, 1) + self.n_decode)
        largest_batch = max(self.batch_sizes) * pages_for(1 + self.n_decode)
        return max(pages_for(self.n_prefill), longest, largest_batch) * PAGE_TOKENS


@dataclass(frozen=True)
class _DecodeCase:
    """A decode measurement: batch_size sequences, each after `context` tokens."""

    batch_size: int
    context: int


def measure(
    source: str,
    workload: Workload,
    *,
    n_ctx: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **loading: Any,
) -> dict[str, Any]:
    """Return the report of `phi-c bench`, ready for JSON.

    n_ctx: context size in tokens; None: that of the workload. progress: called with a line on what is measured.
    loading: options of phi_c.load. Speeds are in tokens per second. read_gb_s, in 1e9 bytes per second, is the median
    of measurements before, between and after the repetitions.

    Raises the errors of phi_c.load, and OptionError if the workload needs a larger context than n_ctx or the model has.
    """
    with GGUFFile(hub.resolve(source)) as file:
        config = read_config(file)
        weight_bytes = weight_bytes_per_token(file)
    progress("loading")
    start = time.perf_counter()
    with llm.load(source, n_ctx=_choose_n_ctx(n_ctx, workload, config), **loading) as model:
        load_s = time.perf_counter() - start
        runner = _Runner(model, workload)
        model.generate(runner.random_ids(_SHORT_PROMPT_TOKENS), max_tokens=1, temperature=0)
        first_token_s = time.perf_counter() - start
        digest = logits_hash(model)
        runner.run(progress)
        read = statistics.median(runner.read_rates) if runner.read_rates else None
        decode = runner.decode_tok_s(_DecodeCase(1, 0))
        return {
            "model": config.name,
            "tier": model.tier,
            "n_threads": model.n_threads,
            "tuning": model.tuning,
            "prefill_tok_s": round(statistics.median(runner.prefill_speeds), 3),
            "decode_tok_s": decode,
            "batch": [{"n_seqs": n, "tok_s": runner.decode_tok_s(_DecodeCase(n, 0))} for n in workload.batch_sizes],
            "context": [{"n_tokens": n, "tok_s": runner.decode_tok_s(_DecodeCase(1, n))} for n in workload.contexts],
            "read_gb_s": round(read / 1e9, 3) if read else None,
            "weight_bytes_per_token": weight_bytes,
            "bandwidth_share": round(decode * weight_bytes / read, 4) if read else None,
            "load_s": round(load_s, 3),
            "first_token_s": round(first_token_s, 3),
            "peak_rss_bytes": machine.peak_rss(),
            "logits_hash": digest,
        }


def weight_bytes_per_token(file: GGUFFile) -> int:
    """Return the size in bytes of all matrices that decoding one token reads: those of the layers and the output.

    The embedding counts only if it is tied to the output; otherwise a token reads a single row of it.
    """
    is_tied = "output.weight" not in file.tensors
    return sum(
        info.n_bytes
        for name, info in file.tensors.items()
        if len(info.shape) == 2 and (is_tied or name != "token_embd.weight")
    )


def logits_hash(model: llm.LLM) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the logits (little-endian float32) of fixed tokens."""
    logits = model.logits([7919 * (i + 1) % model.config.n_vocab for i in range(_HASHED_TOKENS)])
    return hashlib.sha256(logits.astype("<f4", copy=False).tobytes()).hexdigest()[:_HASH_DIGITS]


def _choose_n_ctx(n_ctx: int | None, workload: Workload, config: ModelConfig) -> int:
    if workload.n_ctx > config.n_ctx_train:
        raise OptionError(
            f"the workload needs a context of {workload.n_ctx} tokens, the model has {config.n_ctx_train}: "
            "lower --prefill, --decode, --batch or --context"
        )
    if n_ctx is not None and n_ctx < workload.n_ctx:
        raise OptionError(f"n_ctx is {n_ctx}, expected at least {workload.n_ctx}, which the workload needs")
    return workload.n_ctx if n_ctx is None else n_ctx


class _Runner:
    """Runs the measurements of a workload in rounds, so that other load on the machine affects all of them alike."""

    def __init__(self, model: llm.LLM, workload: Workload) -> None:
        self.prefill_speeds: list[float] = []  # tokens per second of each repetition
        self.decode_speeds: dict[_DecodeCase, list[float]] = defaultdict(list)  # the same
        self.read_rates: list[float] = []  # bytes per second
        self._model = model
        self._workload = workload
        self._random = np.random.default_rng(0)

    def run(self, progress: Callable[[str], None]) -> None:
        """Run all measurements."""
        workload = self._workload
        batches = dict.fromkeys([_DecodeCase(1, 0), *(_DecodeCase(n, 0) for n in workload.batch_sizes)])
        self._measure_read_rate()
        for i in range(workload.n_repeats):
            repetition = f"repetition {i + 1} of {workload.n_repeats}"
            progress(f"prefill of {workload.n_prefill} tokens, {repetition}")
            self.prefill_speeds.append(self._prefill())
            for case in batches:
                progress(f"decoding {case.batch_size} x {workload.n_decode} tokens, {repetition}")
                prompts = [self.random_ids(1) for _ in range(case.batch_size)]
                self.decode_speeds[case].append(self._decode(prompts))
            self._measure_read_rate()
        for case in dict.fromkeys(_DecodeCase(1, n) for n in workload.contexts if n > 0):
            # Prefilled once: later repetitions find the prompt in the prefix cache.
            prompt = self.random_ids(case.context)
            for i in range(workload.n_repeats):
                progress(f"decoding after {case.context} tokens, repetition {i + 1} of {workload.n_repeats}")
                self.decode_speeds[case].append(self._decode([prompt]))
            self._measure_read_rate()

    def decode_tok_s(self, case: _DecodeCase) -> float:
        """Return the median decode speed of a case in tokens per second, summed over its sequences."""
        return round(statistics.median(self.decode_speeds[case]), 3)

    def random_ids(self, n_tokens: int) -> list[int]:
        """Return random token ids, which the prefix cache does not contain."""
        return [int(i) for i in self._random.integers(0, self._model.config.n_vocab, n_tokens)]

    def _measure_read_rate(self) -> None:
        rate = read_rate(self._model.n_threads)
        if rate is not None:
            self.read_rates.append(rate)

    def _prefill(self) -> float:
        """Return the prefill speed in tokens per second."""
        sequence = self._add_sequence(self.random_ids(self._workload.n_prefill), max_tokens=1)
        start = time.perf_counter()
        self._run_until([sequence], 1)
        seconds = time.perf_counter() - start
        return (sequence.n_prompt - sequence.n_cached) / seconds

    def _decode(self, prompts: list[list[int]]) -> float:
        """Return the decode speed of a batch in tokens per second; prefill and first tokens are not timed."""
        n_tokens = self._workload.n_decode + 1
        sequences = [self._add_sequence(prompt, n_tokens) for prompt in prompts]
        try:
            self._run_until(sequences, 1)
            n_before = sum(len(sequence.generated) for sequence in sequences)
            start = time.perf_counter()
            self._run_until(sequences, n_tokens)
            seconds = time.perf_counter() - start
        finally:
            for sequence in sequences:
                self._model.engine.remove(sequence)
        return (len(prompts) * n_tokens - n_before) / seconds

    def _add_sequence(self, prompt: list[int], max_tokens: int) -> Sequence:
        greedy = SamplingParams(temperature=0, repeat_penalty=1)
        sequence = Sequence(
            tokens=list(prompt),  # a copy: it grows, and a prompt can be used again
            max_tokens=max_tokens,
            sampler=Sampler(greedy, self._model.config.n_vocab),
            eog_ids=frozenset(),  # no end token: all sequences generate max_tokens
        )
        self._model.engine.add(sequence)
        return sequence

    def _run_until(self, sequences: list[Sequence], n_tokens: int) -> None:
        """Run engine steps until every sequence has generated n_tokens tokens."""
        for sequence in sequences:
            while len(sequence.tokens) - sequence.n_prompt < n_tokens:
                self._model.engine.step(sequence)
