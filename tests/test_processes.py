"""Processes that begin after a model has run here: by each start method, and by a fork in the middle of a step."""

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import phi_c
from tiny_gguf import write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of a fork, from 3.12 on
SECONDS = 60
TOKENS = list(range(3, 60))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0", n_ctx=2048)


def tokens_of(llm: phi_c.LLM, n: int = 24) -> tuple[int, ...]:
    ban = dict.fromkeys(llm.tokenizer.eog_ids, -1e9)
    return tuple(llm.generate(TOKENS, max_tokens=n, temperature=0, logit_bias=ban).tokens)


def send_tokens(sender: Connection, model: "phi_c.LLM | Path") -> None:
    """In the child: a model that it got from the parent, or that it loads."""
    if isinstance(model, phi_c.LLM):
        sender.send(tokens_of(model))
    else:
        with phi_c.load(model, n_threads=2) as llm:
            sender.send(tokens_of(llm))


def in_child(method: str, model: "phi_c.LLM | Path") -> tuple[int, ...]:
    """Return what a process of this start method makes of TOKENS; fails when it takes too long."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_tokens, args=(sender, model))
    child.start()
    try:
        assert receiver.poll(SECONDS), "the child says nothing"
        tokens = receiver.recv()
        child.join(SECONDS)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    return tuple(tokens)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_each_start_method(path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    with phi_c.load(path, n_threads=2) as llm:
        expected = tokens_of(llm)
        assert len(expected) == 24
        assert in_child(method, path) == expected
        if method == "fork":  # the model itself, whose threads the child does not have
            assert in_child(method, llm) == expected
        assert tokens_of(llm) == expected


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks beside a running thread")
def test_fork_in_the_middle_of_a_step(path: Path, tmp_path: Path) -> None:
    """Another thread holds the engine's lock nearly always; the child must find it free, and the cache whole."""
    with phi_c.load(path, n_threads=2, prefix_cache=tmp_path / "prefix") as llm:
        expected = tokens_of(llm)
        stop = threading.Event()
        counts = [0]

        def go_on() -> None:
            while not stop.is_set():
                tokens_of(llm, 40)
                counts[0] += 1

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            for _ in range(10):
                assert in_child("fork", llm) == expected
            before = counts[0]
            deadline = time.monotonic() + SECONDS
            while counts[0] < before + 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert counts[0] >= before + 2, "the parent's thread does not go on"
        finally:
            stop.set()
            thread.join()
