"""Random prompts, greedy generation from them, and code that runs in threads and other processes."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def kill_after(process: subprocess.Popen[bytes], milliseconds: float) -> bytes:
    """Kill a process some time after its first line of output, and return that line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    time.sleep(milliseconds / 1000)
    process.kill()
    process.wait()
    process.stdout.close()
    return line


def run_concurrently(*calls: Callable[[], object]) -> None:
    """Run each call in a thread of its own; when all are done, raise the first error."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    for future in futures:
        future.result()


def whole_pages(n_tokens: int) -> int:
    """Return how many of n_tokens tokens are in full KV pages."""
    return n_tokens // PAGE_TOKENS * PAGE_TOKENS
