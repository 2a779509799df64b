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
from phi_c._core import PAGE_TOKENS, Timings
from phi_c.bench import batch_curve
from phi_c.bench.memory import read_rate
from phi_c.bench.phases import Case, PhaseSample, phase_weights, report_phases, take_sample
from phi_c.engine.engine import Engine
from phi_c.engine.outputs import OutputQueue
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
_N_DECODE = 64
_N_DECODE_OF_CURVE = 4  # 1..32 takes a minute per repetition with Phi-3-mini on two cores
_MIN_CURVE_SIZES = 9  # batch sizes from which _N_DECODE_OF_CURVE is the default


@dataclass(frozen=True)
class Workload:
    """What to measure; every speed is the median of n_repeats repetitions."""

    n_prefill: int = 512  # prompt length in tokens
    n_decode: int = _N_DECODE  # timed tokens per sequence, after its first one
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)  # numbers of sequences that are decoded together
    contexts: tuple[int, ...] = (0,)  # tokens in the KV cache before the timed ones, for one sequence
    n_repeats: int = 5
    phases: bool = False  # also measure the phases of the forward pass

    @property
    def n_ctx(self) -> int:
        """Length in tokens of the longest sequence, in whole pages."""
        return max(pages_for(self.n_prefill), pages_for(max(*self.contexts, 1) + self.n_decode)) * PAGE_TOKENS

    @property
    def kv_cache_tokens(self) -> int:
        """KV cache capacity, in tokens, of the largest measurement."""
        return max(self.n_ctx, max(self.batch_sizes) * pages_for(1 + self.n_decode) * PAGE_TOKENS)


def default_n_decode(n_batch_sizes: int) -> int:
    """Return the number of tokens to decode per sequence: few if many batch sizes are measured."""
    return _N_DECODE if n_batch_sizes < _MIN_CURVE_SIZES else _N_DECODE_OF_CURVE


def measure(
    source: str,
    workload: Workload,
    *,
    n_ctx: int | None = None,
    kv_cache_tokens: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **loading: Any,
) -> dict[str, Any]:
    """Return the report of `phi-c bench`, ready for JSON.

    n_ctx, kv_cache_tokens: see phi_c.load; None: what the workload needs. progress: called with a line on what is
    measured. loading: options of phi_c.load. Speeds are in tokens per second. read_gb_s, in 1e9 bytes per second, is
    the median of measurements before, between and after the repetitions.

    Raises the errors of phi_c.load, and OptionError if the workload needs a larger context than n_ctx or the model has,
    or a larger KV cache than kv_cache_tokens.
    """
    with GGUFFile(hub.resolve(source)) as file:
        config = read_config(file)
        weights = phase_weights(file)
    weight_bytes = sum(of_phase.n_bytes for of_phase in weights.values())
    n_ctx = _choose_n_ctx(n_ctx, workload, config)
    kv_cache_tokens = _choose_kv_cache_tokens(kv_cache_tokens, n_ctx, workload)
    progress("loading")
    start = time.perf_counter()
    with llm.load(source, n_ctx=n_ctx, kv_cache_tokens=kv_cache_tokens, **loading) as model:
        load_s = time.perf_counter() - start
        runner = _Runner(model, workload)
        model.generate(runner.random_ids(_SHORT_PROMPT_TOKENS), max_tokens=1, temperature=0)
        first_token_s = time.perf_counter() - start
        digest = logits_hash(model)
        runner.run(progress)
        read = statistics.median(runner.read_rates) if runner.read_rates else None
        decode = runner.decode_tok_s(_decode_case(1))
        by_size = {n: runner.decode_speeds[_decode_case(n)] for n in workload.batch_sizes}
        report = {
            "model": config.name,
            "tier": model.tier,
            "n_threads": model.n_threads,
            "tuning": model.tuning,
            "prefill_tok_s": round(statistics.median(runner.prefill_speeds), 3),
            "decode_tok_s": decode,
            "batch": batch_curve.curve(by_size),
            "batch_steps": batch_curve.steps(by_size),
            "context": [{"n_tokens": n, "tok_s": runner.decode_tok_s(_decode_case(1, n))} for n in workload.contexts],
            "read_gb_s": round(read / 1e9, 3) if read else None,
            "weight_bytes_per_token": weight_bytes,
            "bandwidth_share": round(decode * weight_bytes / read, 4) if read else None,
            "load_s": round(load_s, 3),
            "first_token_s": round(first_token_s, 3),
            "peak_rss_bytes": machine.peak_rss(),
            "logits_hash": digest,
        }
        if workload.phases:
            report["phases"] = [
                report_phases(case, samples, weights, read, config.n_experts > 0)
                for case, samples in runner.phase_samples.items()
            ]
        return report


def logits_hash(model: llm.LLM) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the logits (little-endian float32) of fixed tokens."""
    logits = model.logits([7919 * (i + 1) % model.config.n_vocab for i in range(_HASHED_TOKENS)])
    return hashlib.sha256(logits.astype("<f4", copy=False).tobytes()).hexdigest()[:_HASH_DIGITS]


def _choose_n_ctx(n_ctx: int | None, workload: Workload, config: ModelConfig) -> int:
    if workload.n_ctx > config.n_ctx_train:
        raise OptionError(
            f"the workload needs a context of {workload.n_ctx} tokens, the model has {config.n_ctx_train}: "
            "lower --prefill, --decode or --context"
        )
    if n_ctx is not None and n_ctx < workload.n_ctx:
        raise OptionError(f"n_ctx is {n_ctx}, expected at least {workload.n_ctx}, which the workload needs")
    return workload.n_ctx if n_ctx is None else n_ctx


def _choose_kv_cache_tokens(kv_cache_tokens: int | None, n_ctx: int, workload: Workload) -> int:
    needed = max(n_ctx, workload.kv_cache_tokens)
    if kv_cache_tokens is not None and kv_cache_tokens < needed:
        raise OptionError(f"kv_cache_tokens is {kv_cache_tokens}, expected at least {needed}, which the workload needs")
    return needed if kv_cache_tokens is None else kv_cache_tokens


def _decode_case(batch_size: int, context: int = 0) -> Case:
    return Case("decode", batch_size, context)


class _Batch:
    """Sequences that run together."""

    def __init__(self, model: llm.LLM, prompts: list[list[int]], max_tokens: int) -> None:
        self._loop = model.loop
        self._outputs = OutputQueue(len(prompts) * max_tokens + 1)
        greedy = SamplingParams(temperature=0, repeat_penalty=1)
        self.sequences = [
            Sequence(
                tokens=prompt,
                max_tokens=max_tokens,
                sampler=Sampler(greedy, model.config.n_vocab),
                eog_ids=frozenset(),  # no end token: all sequences generate max_tokens
                outputs=self._outputs,
            )
            for prompt in prompts
        ]

    def start(self, prepare: Callable[[], None], *, with_first_tokens: bool) -> tuple[float, int]:
        """Submit the sequences; return the time in seconds and the number of tokens computed until then.

        with_first_tokens: after the step that gives the last of them its first token. prepare: called just before.
        """

        def run(engine: Engine) -> tuple[float, int]:
            engine.add(self.sequences)
            while with_first_tokens and not engine.interrupt.is_set():
                if all(len(s.tokens) > s.n_prompt or s.is_done for s in self.sequences):
                    break
                engine.step()
            prepare()
            return time.perf_counter(), self.n_computed

        return self._loop.call(run)

    def wait(self) -> float:
        """Wait until every sequence is done; return the time in seconds of the last output."""
        n_running = len(self.sequences)
        last = 0.0
        while n_running:
            for output in self._outputs.read():
                if output.error is not None:
                    raise output.error
                n_running -= output.is_last
                last = output.time
        return last

    def cancel(self) -> None:
        """Remove sequences that are not done."""
        self._loop.cancel(self.sequences)

    @property
    def n_computed(self) -> int:
        """Number of tokens computed so far; the last generated token is never computed."""
        return sum((len(s.tokens) - 1 if s.is_done else s.n_computed) - (s.n_cached or 0) for s in self.sequences)


class _Runner:
    """Runs the measurements of a workload in rounds, so that other load on the machine affects all of them alike."""

    def __init__(self, model: llm.LLM, workload: Workload) -> None:
        self.prefill_speeds: list[float] = []  # tokens per second of each repetition
        self.decode_speeds: dict[Case, list[float]] = defaultdict(list)  # the same
        self.phase_samples: dict[Case, list[PhaseSample]] = defaultdict(list)  # one per repetition
        self.read_rates: list[float] = []  # bytes per second
        self._model = model
        self._workload = workload
        self._random = np.random.default_rng(0)
        self._timings = Timings(model.engine.model) if workload.phases else None
        model.engine.timings = self._timings  # before the first step

    def run(self, progress: Callable[[str], None]) -> None:
        """Run all measurements."""
        workload = self._workload
        batches = list(dict.fromkeys([_decode_case(1), *map(_decode_case, workload.batch_sizes)]))
        self._measure_read_rate()
        for i in range(workload.n_repeats):
            repetition = f"repetition {i + 1} of {workload.n_repeats}"
            progress(f"prefill of {workload.n_prefill} tokens, {repetition}")
            self._prefill()
            # In turns up and down, so that a drift of the machine's speed favours neither larger nor smaller batches.
            for case in batches if i % 2 == 0 else reversed(batches):
                progress(f"decoding {case.n_seqs} x {workload.n_decode} tokens, {repetition}")
                self._decode(case, [self.random_ids(1) for _ in range(case.n_seqs)])
            self._measure_read_rate()
        for case in dict.fromkeys(_decode_case(1, n) for n in workload.contexts if n > 0):
            # Prefilled once: later repetitions find the prompt in the prefix cache.
            prompt = self.random_ids(case.n_tokens)
            for i in range(workload.n_repeats):
                progress(f"decoding after {case.n_tokens} tokens, repetition {i + 1} of {workload.n_repeats}")
                self._decode(case, [prompt])
            self._measure_read_rate()

    def decode_tok_s(self, case: Case) -> float:
        """Return the median decode speed of a case in tokens per second, summed over its sequences."""
        return round(statistics.median(self.decode_speeds[case]), 3)

    def random_ids(self, n_tokens: int) -> list[int]:
        """Return random token ids, which the prefix cache does not contain."""
        return [int(i) for i in self._random.integers(0, self._model.config.n_vocab, n_tokens)]

    def _measure_read_rate(self) -> None:
        rate = read_rate(self._model.n_threads)
        if rate is not None:
            self.read_rates.append(rate)

    def _prefill(self) -> None:
        n_tokens = self._workload.n_prefill
        batch = _Batch(self._model, [self.random_ids(n_tokens)], max_tokens=1)
        speed = self._run_batch(Case("prefill", 1, n_tokens), batch, with_first_tokens=False)
        self.prefill_speeds.append(speed)

    def _decode(self, case: Case, prompts: list[list[int]]) -> None:
        """Measure the decode speed of a batch; prefill and first tokens are not timed."""
        batch = _Batch(self._model, prompts, self._workload.n_decode + 1)
        self.decode_speeds[case].append(self._run_batch(case, batch, with_first_tokens=True))

    def _run_batch(self, case: Case, batch: _Batch, *, with_first_tokens: bool) -> float:
        """Run a batch to its end; return the tokens computed per second. With phases, also keep the times of steps."""
        try:
            start, n_before = batch.start(self._clear_timings, with_first_tokens=with_first_tokens)
            seconds = batch.wait() - start
        finally:
            batch.cancel()
        n_tokens = batch.n_computed - n_before
        if self._timings is not None:
            self.phase_samples[case].append(take_sample(self._timings, seconds, n_tokens))
        return n_tokens / seconds

    def _clear_timings(self) -> None:
        if self._timings is not None:
            self._timings.clear()
