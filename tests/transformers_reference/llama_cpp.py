"""llama.cpp in this process, through the xllamacpp package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from reference_models import worst_nmse


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def log_prob_nmse(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the NMSE of log-probabilities, each centred on its mean."""
    a, b = (log_softmax(x)[None] - log_softmax(x).mean() for x in (got, expected))
    return worst_nmse(a, b)


class LlamaCpp:
    """A model file loaded by llama.cpp.

    n_ctx: context size, tokens.
    """

    def __init__(self, path: Path, n_ctx: int) -> None:
        library = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install '.[reference]'")
        params = library.CommonParams()
        params.model.path = str(path)
        params.n_ctx = n_ctx
        params.n_parallel = 1
        params.verbosity = 0
        params.warmup = False
        params.fit_params = False  # do not change n_ctx to fit memory
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        self._server = library.Server(params)

    def _complete(self, prompt: str | Sequence[int], n_tokens: int, n_probs: int) -> dict[str, Any]:
        answer = self._server.handle_completions(
            {
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "n_predict": n_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "n_probs": n_probs,
            }
        )
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def log_probs(self, prompt: str | Sequence[int], n_vocab: int) -> npt.NDArray[np.float64]:
        """Return the log-probabilities of the next token, float64 [n_vocab]."""
        (step,) = self._complete(prompt, 1, n_vocab)["logprobs"]["content"]
        values = np.full(n_vocab, np.nan)
        for entry in step["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        assert not np.isnan(values).any()
        return values

    def greedy(self, prompt: str, n_tokens: int) -> str:
        """Return the text of n_tokens tokens, generated greedily."""
        text: str = self._complete(prompt, n_tokens, 1)["text"]
        return text
