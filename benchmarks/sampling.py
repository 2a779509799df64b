"""Measure the time to sample one token, in microseconds and as a share of a decode step.

    python benchmarks/sampling.py [--repeats 50]

The logits are random: peaked (Zipf, like word frequencies), Gaussian with a standard deviation of 3, or flat with one
of 0.01, where nearly the whole vocabulary remains a candidate. The decode step is the time to read the model's weights
at 30 GB/s.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler, logprob

Floats = npt.NDArray[np.float32]

# Model -> size of the vocabulary, decode step in ms.
_MODELS = {"SmolLM2-135M": (49_152, 4), "Phi-3-mini": (32_064, 80), "Phi-4-mini": (200_064, 80)}
_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "top_k 40": {"top_k": 40},
    "top_k 40 alone": {"top_k": 40, "top_p": 1.0, "min_p": 0.0},
    "top_p alone": {"min_p": 0.0},
    "top_p, temperature 1.5": {"min_p": 0.0, "temperature": 1.5},
    "no filter": {"top_p": 1.0, "min_p": 0.0},
    "repeat_penalty 1.1": {"repeat_penalty": 1.1},
    "greedy": {"temperature": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="Number of calls; medians are printed.")
    n_repeats = parser.parse_args().repeats
    for model, (n_vocab, step_ms) in _MODELS.items():
        shapes = random_logits(n_vocab)
        print(f"\n{model}: vocabulary of {n_vocab}, decode step {step_ms} ms; us per token (share of the step)\n")
        print(f"| options | {' | '.join(shapes)} |")
        print(f"|---|{'---:|' * len(shapes)}")
        for name, call in timed_calls(n_vocab).items():
            times = [_median_us(call, logits, n_repeats) for logits in shapes.values()]
            print(f"| {name} | {' | '.join(f'{us:.0f} ({us / step_ms / 1000:.1%})' for us in times)} |")


def random_logits(n_vocab: int) -> dict[str, Floats]:
    """Return logits, float32 [n_vocab], by the shape of their distribution."""
    rng = np.random.default_rng(0)
    ranks = rng.permutation(n_vocab) + 1
    shapes = {
        "peaked": 10 - 1.2 * np.log(ranks) + rng.normal(0, 0.3, n_vocab),
        "Gaussian": rng.normal(0, 3, n_vocab),
        "flat": rng.normal(0, 0.01, n_vocab),
    }
    return {name: logits.astype(np.float32) for name, logits in shapes.items()}


def timed_calls(n_vocab: int) -> dict[str, Callable[[Floats], object]]:
    """Return the functions to time, by name."""
    generated = [int(token) for token in np.random.default_rng(1).integers(0, n_vocab, 200)]
    timed: dict[str, Callable[[Floats], object]] = {}
    for name, options in _OPTIONS.items():
        sampler = Sampler(SamplingParams(seed=0, **options), n_vocab)
        timed[name] = lambda logits, sampler=sampler: sampler.sample(logits, generated)
    timed["log-probability"] = lambda logits: logprob(logits, 5, 0)
    timed["log-probabilities, top 5"] = lambda logits: logprob(logits, 5, 5)
    return timed


def _median_us(call: Callable[[Floats], object], logits: Floats, n_repeats: int) -> float:
    seconds = []
    for _ in range(n_repeats):
        fresh = logits.copy()  # as after a forward pass
        start = time.perf_counter()
        call(fresh)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


if __name__ == "__main__":
    main()
