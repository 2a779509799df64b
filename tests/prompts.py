"""Random prompts, greedy generation from them, and code that runs in another process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

import phi_c
from phi_c._core import PAGE_TOKENS

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
TALK = [{"role": "user", "content": "the and in " * 30}]


def tokens_of(n_tokens: int, seed: int = 0) -> list[int]:
    """Return a prompt of random token ids."""
    return [int(t) for t in np.random.default_rng(seed).integers(3, 300, n_tokens)]


def generate(llm: phi_c.LLM, tokens: list[int], n_tokens: int = 12) -> phi_c.Completion:
    """Generate n_tokens greedily; end-of-generation tokens are banned."""
    ban = dict.fromkeys(llm.tokenizer.eog_ids, -1e9)
    return llm.generate(tokens, max_tokens=n_tokens, logprobs=2, logit_bias=ban, **GREEDY)


def in_other_process(code: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a Python process that runs `code`; environment: variables to set."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
    )


def whole_pages(n_tokens: int) -> int:
    """Return how many of n_tokens tokens are in full KV pages."""
    return n_tokens // PAGE_TOKENS * PAGE_TOKENS
