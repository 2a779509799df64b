"""Child processes of a process that has run a model: every start method, a fork during a step of another thread and of
the same thread; and a process in a control group limited to one core.
"""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import phi_c
from tiny_gguf import write_tiny

# Raised by os.fork since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
SECONDS = 60
TOKENS = list(range(3, 60))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0", n_ctx=2048)


def generate_tokens(llm: phi_c.LLM, n: int = 24) -> tuple[int, ...]:
    ban = dict.fromkeys(llm.tokenizer.eog_ids, -1e9)
    return tuple(llm.generate(TOKENS, max_tokens=n, temperature=0, logit_bias=ban).tokens)


def send_tokens(sender: Connection, model: "phi_c.LLM | Path") -> None:
    """Run in the child: generate with a model inherited from the parent, or loaded from a path."""
    if isinstance(model, phi_c.LLM):
        sender.send(generate_tokens(model))
    else:
        with phi_c.load(model, n_threads=2) as llm:
            sender.send(generate_tokens(llm))


def in_child(method: str, model: "phi_c.LLM | Path") -> tuple[int, ...]:
    """Return what a child process generates from TOKENS; fails after SECONDS."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_tokens, args=(sender, model))
    child.start()
    try:
        assert receiver.poll(SECONDS), "the child does not answer"
        tokens = receiver.recv()
        child.join(SECONDS)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    return tuple(tokens)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_start_methods(path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"start method {method} is not supported by this system")
    with phi_c.load(path, n_threads=2) as llm:
        expected = generate_tokens(llm)
        assert len(expected) == 24
        assert in_child(method, path) == expected
        if method == "fork":  # the inherited model, whose threads do not exist in the child
            assert in_child(method, llm) == expected
        assert generate_tokens(llm) == expected


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks while another thread runs")
def test_fork_during_a_step_of_another_thread(path: Path, tmp_path: Path) -> None:
    """The engine's thread is in a step most of the time; the child has none, and an empty KV cache."""
    with phi_c.load(path, n_threads=2, prefix_cache=tmp_path / "prefix") as llm:
        expected = generate_tokens(llm)
        stop = threading.Event()
        counts = [0]

        def generate_until_stopped() -> None:
            while not stop.is_set():
                generate_tokens(llm, 40)
                counts[0] += 1

        thread = threading.Thread(target=generate_until_stopped)
        thread.start()
        try:
            for _ in range(10):
                assert in_child("fork", llm) == expected
            before = counts[0]
            deadline = time.monotonic() + SECONDS
            while counts[0] < before + 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert counts[0] >= before + 2, "the parent's thread does not continue"
        finally:
            stop.set()
            thread.join()


SIGNALS = """
    import os, signal, sys, threading
    import phi_c
    from phi_c._core import ForkLock
    from phi_c.engine import engine

    def fork(*_):
        if forking:  # a fork in a handler that interrupts a fork is a deadlock in concurrent.futures
            return
        forking.append(True)
        child = os.fork()
        if child == 0:
            os._exit(0)
        results.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        forking.clear()

    def call(*_):
        if not results:
            results.append("called")
            results.append(generate() == expected)

    def continue_in_child(*_):
        if not forking:
            forking.append(True)
            results.append(os.fork())

    def interrupt(*_):
        raise KeyboardInterrupt

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    def generate(n=4):
        ban = dict.fromkeys(llm.tokenizer.eog_ids, float("-inf"))
        return llm.generate([5, 6, 7], max_tokens=n, temperature=0, logit_bias=ban).tokens

    results, forking = [], []
    with phi_c.load(sys.argv[1], n_threads=2) as idle, phi_c.load(sys.argv[1], n_threads=2) as llm:
        expected, real = generate(), engine.forward
        engine.forward = signalled
        for handler in (fork, call):
            signal.signal(signal.SIGUSR1, handler)
            assert generate() == expected
            print(*dict.fromkeys(results))
            results.clear()

        # The child returns from the handler to a call whose sequence only its parent runs.
        signal.signal(signal.SIGUSR1, continue_in_child)
        try:
            assert len(generate(1000)) == 1000  # far from complete when the first step forks
        except phi_c.PhiError as error:
            assert results == [0]
            engine.forward = real
            assert generate() == expected
            print(error, flush=True)
            os._exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(results[0], 0)[1]))

        # Ctrl-C while a fork waits for a lock that another thread holds: the fork completes.
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with ForkLock():
                entered.set()
                leave.wait()

        engine.forward = real
        holder = threading.Thread(target=hold)
        holder.start()
        entered.wait()
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        sys.unraisablehook = lambda unraisable: print(unraisable.exc_type.__name__)
        results.clear()
        forking.clear()
        fork()
        print(*results)
        leave.set()
        holder.join()
        assert generate() == expected
        assert idle.generate([5, 6, 7], max_tokens=1, temperature=0).tokens == expected[:1]
"""


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks while another thread runs")
def test_signal_handlers_during_a_step(path: Path) -> None:
    """A signal handler may fork and may call the model; a call does not continue in a forked child."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(SIGNALS), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    error = "a call that began before os.fork does not continue in the child process"
    assert done.stdout.splitlines() == ["0", "called True", error, "3", "KeyboardInterrupt", "0"]


@pytest.fixture
def one_core() -> Iterator[Path]:
    """Return `cgroup.procs` of a new control group with a quota of one core; skip if it cannot be created."""
    quotas = {"cpu.cfs_period_us": "50000", "cpu.cfs_quota_us": "50000"}  # cgroup version 1
    root = Path("/sys/fs/cgroup/cpu")
    if not root.exists():
        root, quotas = Path("/sys/fs/cgroup"), {"cpu.max": "50000 50000"}  # cgroup version 2
    group = root / f"phi-c-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a control group cannot be created: {error}")
    try:
        for name, value in quotas.items():
            if not (group / name).exists():
                pytest.skip(f"{root} has no CPU controller")
            (group / name).write_text(value)
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def test_quota_of_one_core_gives_one_thread(one_core: Path, path: Path) -> None:
    code = """
        import os, sys
        with open(sys.argv[1], "w") as file:
            file.write(str(os.getpid()))
        import phi_c
        with phi_c.load(sys.argv[2]) as llm:
            llm.generate([5, 6, 7], max_tokens=2)
            print(llm.n_threads, len(os.listdir("/proc/self/task")))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(one_core), str(path)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "2"]  # the caller's and the engine's
