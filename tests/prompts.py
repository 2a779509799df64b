"""Prompts of random tokens and what continues them, in this process and in others."""

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


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 300, n)]


def generate(llm: phi_c.LLM, tokens: list[int], n: int = 12) -> phi_c.Completion:
    ban = dict.fromkeys(llm.tokenizer.eog_ids, -1e9)
    return llm.generate(tokens, max_tokens=n, logprobs=2, logit_bias=ban, **GREEDY)


def in_other_process(code: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
    )


def whole_pages(n: int) -> int:
    return n // PAGE_TOKENS * PAGE_TOKENS
