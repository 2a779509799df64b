"""Calls beside each other, through the public interface: none waits for, loses, or receives what belongs to another."""

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import phi_c
from phi_c._core import PAGE_TOKENS
from phi_c.engine import engine as engine_module
from phi_c.engine.engine import Engine
from phi_c.engine.outputs import MAX_UNREAD_TOKENS, Output
from phi_c.engine.sequence import Sequence
from phi_c.errors import ModelClosedError
from prompts import GREEDY, run_concurrently, tokens_of

SECONDS = 60


@pytest.fixture
def llm(path: Path) -> Iterator[phi_c.LLM]:
    with phi_c.load(path, n_ctx=512, n_threads=1) as loaded:
        yield loaded


def no_end(llm: phi_c.LLM) -> dict[int, float]:
    return dict.fromkeys(llm.tokenizer.eog_ids, -1e9)


def n_available_pages(llm: phi_c.LLM) -> int:
    return llm.loop.call(lambda engine: engine.scheduler.n_available_pages)


def record_steps(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Return a list to which every forward pass adds its number of tokens by sequence; before: called first."""
    real, steps = engine_module.forward, []

    def recording(model: Any, kv: Any, tokens: Any, positions: Any, seq_ids: Any, *rest: Any) -> Any:
        steps.append([int((seq_ids == i).sum()) for i in range(int(seq_ids[-1]) + 1)])
        before()
        return real(model, kv, tokens, positions, seq_ids, *rest)

    monkeypatch.setattr(engine_module, "forward", recording)
    return steps


def test_default_options_batch_concurrent_calls(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sets max_tokens: each call may fill the context, and all of them run together."""
    steps = record_steps(monkeypatch, lambda: time.sleep(0.001))
    bias = no_end(llm)
    flag = phi_c.CancelFlag()
    calls = [
        threading.Thread(target=llm.generate, args=([5, 6, i],), kwargs={"cancel": flag, "logit_bias": bias})
        for i in range(8)
    ]
    for call in calls:
        call.start()
    deadline = time.monotonic() + SECONDS
    while max(map(len, steps), default=0) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    flag.set()
    for call in calls:
        call.join()
    assert max(map(len, steps)) == 8


def test_stream_that_nobody_reads_stops(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_tokens": 200, "logit_bias": no_end(llm), **GREEDY}
    expected = llm.generate([5, 6, 7], **options)
    stream = llm.stream([5, 6, 7], **options)
    chunks = [next(stream)]
    steps = record_steps(monkeypatch)
    deadline = time.monotonic() + SECONDS
    previous = -1
    while previous != len(steps) and time.monotonic() < deadline:
        previous = len(steps)
        time.sleep(0.2)
    assert len(steps) <= MAX_UNREAD_TOKENS
    process_time = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - process_time < 0.1  # nothing runs
    # Other calls do not compute it to its end.
    assert llm.generate([8, 9], max_tokens=3, **GREEDY).usage.completion_tokens <= 3
    assert len(steps) <= MAX_UNREAD_TOKENS + 3
    chunks += stream
    assert [token for chunk in chunks for token in chunk.tokens] == expected.tokens
    assert "".join(chunk.text for chunk in chunks) == expected.text


def test_zipped_streams_advance_together(llm: phi_c.LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 300, "logit_bias": no_end(llm), **GREEDY}
    pairs = zip(llm.stream([5, 6, 7], **options), llm.stream([9, 8], **options), strict=False)
    for chunks in itertools.islice(pairs, 3):
        assert all(1 <= len(chunk.tokens) <= MAX_UNREAD_TOKENS for chunk in chunks)


def test_unread_stream_makes_room_for_others(path: Path) -> None:
    with phi_c.load(path, n_ctx=256, kv_cache_tokens=256) as llm:
        options: dict[str, Any] = {"logit_bias": no_end(llm), **GREEDY}
        expected = llm.generate(tokens_of(150), max_tokens=100, **options).tokens
        stream = llm.stream(tokens_of(150), max_tokens=100, **options)
        tokens = list(next(stream).tokens)
        assert len(llm.generate(tokens_of(200, 1), max_tokens=50, **options).tokens) == 50
        assert tokens + [token for chunk in stream for token in chunk.tokens] == expected


def test_texts_are_equal_under_contention(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many streams in a KV cache of little more than one context, some cancelled, some left: preempted all the time."""
    before = sys.getswitchinterval()
    with phi_c.load(path, n_ctx=192, kv_cache_tokens=192, n_batch=32) as llm:
        bias = no_end(llm)
        n_jobs = 24
        prompts = [tokens_of(10 + 5 * (i % 7), i % 5) for i in range(n_jobs)]

        def options(i: int) -> dict[str, Any]:
            return {"max_tokens": 40 + i % 60, "temperature": 1.0, "seed": i, "logit_bias": bias, "logprobs": 1}

        expected = [llm.generate(prompt, **options(i)) for i, prompt in enumerate(prompts)]
        n_free = n_available_pages(llm)
        preempted: list[Sequence] = []
        real = engine_module.Scheduler._preempt

        def preempt(self: engine_module.Scheduler, sequence: Sequence) -> None:
            preempted.append(sequence)
            real(self, sequence)

        monkeypatch.setattr(engine_module.Scheduler, "_preempt", preempt)

        def run(first: int) -> None:
            choose = random.Random(first)
            for i in range(first, n_jobs, 8):
                kind = choose.choice(["whole", "stream", "cancel", "leave"])
                if kind == "whole":
                    got = llm.generate(prompts[i], **options(i))
                    assert (got.text, got.tokens, got.logprobs) == (
                        expected[i].text,
                        expected[i].tokens,
                        expected[i].logprobs,
                    )
                    continue
                flag = phi_c.CancelFlag()
                n_read = choose.randrange(1, 40) if kind != "stream" else 10**6
                text, tokens = "", []
                for chunk in llm.stream(prompts[i], cancel=flag, **options(i)):
                    text, tokens = text + chunk.text, tokens + chunk.tokens
                    if len(tokens) >= n_read:
                        if kind == "leave":
                            break
                        flag.set()
                assert tokens == expected[i].tokens[: len(tokens)]
                assert kind == "cancel" or expected[i].text.startswith(text)
                if kind == "stream":
                    assert (text, len(tokens)) == (expected[i].text, len(expected[i].tokens))

        sys.setswitchinterval(1e-5)
        try:
            for _ in range(3):
                run_concurrently(*(lambda first=first: run(first) for first in range(8)))
        finally:
            sys.setswitchinterval(before)
        assert preempted
        assert n_available_pages(llm) == n_free


def test_every_step_has_all_streams(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of outputs: between two tokens of a stream, every other stream has one."""
    order: list[Sequence] = []
    real = Engine._publish

    def publish(self: Engine, outputs: list[Output]) -> None:
        order.extend(output.sequence for output in outputs)
        real(self, outputs)

    monkeypatch.setattr(Engine, "_publish", publish)
    bias = no_end(llm)
    run_concurrently(
        *(lambda i=i: list(llm.stream([5, 6, i], max_tokens=60, logit_bias=bias)) for i in range(4))  # type: ignore[misc]
    )
    positions: dict[Sequence, list[int]] = {}
    for position, sequence in enumerate(order):
        positions.setdefault(sequence, []).append(position)
    assert [len(each) for each in positions.values()] == [60] * 4
    for each in positions.values():
        assert max(after - before for before, after in itertools.pairwise(each)) <= 3 * 4


def test_short_request_does_not_wait_for_a_long_prompt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a decoding stream, a long prompt is computed in chunks, and a short one starts in the next step."""
    submitted: dict[int, int] = {}  # length of the prompt -> number of steps before it was submitted
    first_token: dict[int, int] = {}  # the same, number of steps until its first token
    real_add, real_publish = Engine.add, Engine._publish

    def add(self: Engine, sequences: tuple[Sequence, ...]) -> None:
        submitted.update((sequence.n_prompt, len(steps)) for sequence in sequences)
        real_add(self, sequences)

    def publish(self: Engine, outputs: list[Output]) -> None:
        for output in outputs:
            first_token.setdefault(output.sequence.n_prompt, len(steps))
        real_publish(self, outputs)

    monkeypatch.setattr(Engine, "add", add)
    monkeypatch.setattr(Engine, "_publish", publish)
    with phi_c.load(path, n_ctx=2048, n_threads=1) as llm:
        llm.engine.max_step_seconds = 0.0  # the smallest chunks
        steps = record_steps(monkeypatch, lambda: time.sleep(0.001))
        flag = phi_c.CancelFlag()
        stream = llm.stream([5, 6, 7], logit_bias=no_end(llm), cancel=flag)
        next(stream)
        reader = threading.Thread(target=lambda: list(stream))
        long = threading.Thread(target=lambda: llm.generate(tokens_of(1900), max_tokens=1))
        reader.start()
        long.start()
        deadline = time.monotonic() + SECONDS
        while 1900 not in submitted and time.monotonic() < deadline:
            time.sleep(0.001)
        llm.generate([9, 9, 9, 9], max_tokens=1)
        flag.set()
        long.join()
        reader.join()
    assert submitted[4] - submitted[1900] < 110  # it came while the long one was computed, in 119 steps
    assert first_token[4] - submitted[4] <= 2
    assert max(sum(step) for step in steps[submitted[1900] : submitted[4]]) <= 16 + 1


def test_cancelled_call_keeps_the_step_of_others(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = phi_c.CancelFlag()
    options: dict[str, Any] = {"logit_bias": no_end(llm), **GREEDY}
    expected = llm.generate([5, 6, 7], max_tokens=300, **options).tokens
    in_step = threading.Event()

    def cancel_in_step() -> None:
        if len(steps) > 5 and len(steps[-1]) == 2:
            flag.set()
            in_step.set()
        time.sleep(0.0005)

    steps = record_steps(monkeypatch, cancel_in_step)
    results: list[phi_c.Completion] = []
    run_concurrently(
        lambda: results.append(llm.generate([5, 6, 7], max_tokens=300, **options)),
        lambda: results.append(llm.generate([9, 8], max_tokens=400, cancel=flag, **options)),
    )
    completed = next(r for r in results if r.finish_reason == "length")
    cancelled = next(r for r in results if r.finish_reason == "cancelled")
    assert completed.tokens == expected
    assert in_step.is_set()
    # No step was repeated: each gave a token to each of its sequences.
    assert sum(map(len, steps)) == len(completed.tokens) + len(cancelled.tokens)


def test_cancelled_call_that_is_alone_ends_within_the_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = phi_c.CancelFlag()
    with phi_c.load(path, n_ctx=512) as llm:
        raised: list[BaseException] = []
        real = engine_module.forward

        def forward(*arguments: Any) -> Any:
            flag.set()
            try:
                return real(*arguments)
            except BaseException as error:
                raised.append(error)
                raise

        monkeypatch.setattr(engine_module, "forward", forward)
        out = llm.generate(tokens_of(300), max_tokens=5, cancel=flag)
        assert (out.finish_reason, out.tokens) == ("cancelled", [])
        assert [type(error).__name__ for error in raised] == ["Cancelled"]


def test_error_of_a_step_reaches_its_callers_only(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_module.forward

    def fail(*arguments: Any) -> Any:
        raise MemoryError("no memory for a step")

    monkeypatch.setattr(engine_module, "forward", fail)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no memory for a step"):
            llm.generate([5, 6], max_tokens=2)
    monkeypatch.setattr(engine_module, "forward", real)
    assert llm.generate([5, 6], max_tokens=2).usage.completion_tokens
    # A bug in the engine ends the calls, not the thread.
    monkeypatch.setattr(engine_module.Scheduler, "schedule", fail)
    with pytest.raises(MemoryError, match="no memory for a step"):
        llm.generate([5, 6], max_tokens=2)
    monkeypatch.undo()
    assert llm.generate([5, 6], max_tokens=2).usage.completion_tokens


def test_thread_that_cannot_start_is_an_error_every_time(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(2):
        with pytest.raises(MemoryError, match="cannot start the thread of the model"):
            llm.generate([5, 6], max_tokens=2)
    monkeypatch.undo()
    assert llm.generate([5, 6], max_tokens=2).usage.completion_tokens


def test_close_ends_waiting_calls(path: Path) -> None:
    llm = phi_c.load(path, n_ctx=2048)
    bias = no_end(llm)
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            llm.generate([5, 6, 7], logit_bias=bias)
        except ModelClosedError as error:
            errors.append(error)

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    llm.close()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert len(errors) == 3


def test_prefix_cache_is_written_before_the_last_chunk(path: Path, tmp_path: Path) -> None:
    """A caller that leaves at finish_reason has it on disk."""
    with phi_c.load(path, prefix_cache=tmp_path / "c") as llm:
        for chunk in llm.stream(tokens_of(4 * PAGE_TOKENS), max_tokens=5):
            if chunk.finish_reason is not None:
                break
        assert len(list((tmp_path / "c").glob("*/*.pages"))) == 1


def run_script(code: str, path: Path) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


INTERRUPTED = """
    import os, random, signal, sys, threading, time
    import phi_c

    def raise_timeout(*_):
        raise TimeoutError("deadline")

    with phi_c.load(sys.argv[1], n_ctx=512, n_threads=1) as llm:
        ban = dict.fromkeys(llm.tokenizer.eog_ids, float("-inf"))
        options = {"max_tokens": 40, "temperature": 1.0, "logit_bias": ban}
        expected = {i: llm.generate([9, 8, i], seed=i, **options) for i in range(9)}
        stop, wrong, counts = threading.Event(), [], [0, 0, 0]

        def other(n):
            while not stop.is_set():
                i = counts[n] % 9
                try:
                    chunks = list(llm.stream([9, 8, i], seed=i, **options))
                    text = "".join(chunk.text for chunk in chunks)
                    tokens = [token for chunk in chunks for token in chunk.tokens]
                    if (text, tokens) != (expected[i].text, expected[i].tokens):
                        wrong.append(text)
                except BaseException as error:
                    wrong.append(repr(error))
                counts[n] += 1

        def interrupt():
            while not stop.is_set():
                time.sleep(random.uniform(0.002, 0.02))
                os.kill(os.getpid(), signal.SIGINT)

        others = [threading.Thread(target=other, args=(n,)) for n in range(3)]
        [thread.start() for thread in others]
        held = llm.stream([3, 4], logit_bias=ban)
        next(held)
        signal.signal(signal.SIGINT, raise_timeout if sys.argv[-1] == "timeout" else signal.default_int_handler)
        interrupter = threading.Thread(target=interrupt)
        n_caught = 0
        start = time.monotonic()
        interrupter.start()
        while True:
            try:
                while time.monotonic() - start < 3:
                    llm.generate([3, 4, 5], max_tokens=400, temperature=1.0, logit_bias=ban)
                stop.set()
                break
            except (KeyboardInterrupt, TimeoutError):
                n_caught += 1
        while interrupter.is_alive():
            try:
                interrupter.join()
            except (KeyboardInterrupt, TimeoutError):
                pass
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        [thread.join(30) for thread in others]
        assert not any(thread.is_alive() for thread in others), "a call hangs"
        held.close()
        pages = llm.loop.call(lambda engine: engine.scheduler.n_available_pages)
        print(n_caught > 5, min(counts) > 0, wrong[:3], pages == llm.engine.kv.n_pages)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGINT on Windows")
@pytest.mark.parametrize("kind", ["interrupt", "timeout"])
def test_signals_end_the_call_of_the_main_thread_only(path: Path, kind: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "True True [] True"


FORKED = """
    import os, sys, threading, time
    import phi_c
    from phi_c.engine import engine

    llm = phi_c.load(sys.argv[1], n_ctx=2048, n_threads=2)
    ban = dict.fromkeys(llm.tokenizer.eog_ids, float("-inf"))
    expected = llm.generate([5, 6, 7], max_tokens=5, temperature=0).tokens
    flag = phi_c.CancelFlag()
    busy = [threading.Thread(target=llm.generate, args=([9, 8, i],), kwargs={"logit_bias": ban, "cancel": flag})
            for i in range(3)]
    [thread.start() for thread in busy]
    time.sleep(0.1)
    child = os.fork()
    if child == 0:
        widths, real = [], engine.forward

        def recording(model, kv, tokens, positions, seq_ids, *rest):
            widths.append(int(seq_ids[-1]) + 1)
            return real(model, kv, tokens, positions, seq_ids, *rest)

        engine.forward = recording
        assert len(llm.engine.scheduler.running) == 0
        got = llm.generate([5, 6, 7], max_tokens=5, temperature=0).tokens
        llm.close()
        os._exit(0 if got == expected and set(widths) == {1} and len(widths) == len(got) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    alive = all(thread.is_alive() for thread in busy)
    flag.set()
    [thread.join() for thread in busy]
    print(code, alive, llm.generate([5, 6, 7], max_tokens=5, temperature=0).tokens == expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks while another thread runs")
def test_forked_child_does_not_run_its_parents_sequences(path: Path) -> None:
    assert run_script(FORKED, path).split() == ["0", "True", "True"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_signal_handler_may_call_the_model(llm: phi_c.LLM) -> None:
    results: list[list[int]] = []
    expected = llm.generate([9, 8], max_tokens=3, **GREEDY).tokens
    before = signal.signal(
        signal.SIGALRM, lambda *_: results.append(llm.generate([9, 8], max_tokens=3, **GREEDY).tokens)
    )
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        deadline = time.monotonic() + SECONDS
        while not results and time.monotonic() < deadline:
            llm.generate([5, 6, 7], max_tokens=100, logit_bias=no_end(llm))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert results == [expected]
