"""Two models in a process, calls from several threads, forks, and free-threaded Python."""

import os
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest
from forward_helper import Runner

from tiny_gguf import write_tiny

TOKENS = list(range(5, 60))


def test_two_models_in_one_process(tmp_path: Path) -> None:
    first = Runner(write_tiny(tmp_path / "a.gguf", "phi3", seed=1))
    second = Runner(write_tiny(tmp_path / "b.gguf", "llama", seed=2))
    a, b = first.run(TOKENS), second.run(TOKENS)
    assert not np.array_equal(a, b)
    assert np.array_equal(first.run(TOKENS), a)
    assert np.array_equal(second.run(TOKENS), b)


def test_calls_from_several_threads(tmp_path: Path) -> None:
    """Two models run at the same time, each called from two threads."""
    runners = [Runner(write_tiny(tmp_path / f"{i}.gguf", seed=i)) for i in range(2)]
    expected = [runner.run(TOKENS) for runner in runners]
    wrong = []

    def work(i: int, half: int) -> None:
        table = runners[i].table(start=32 * half, end=32 * half + 32)
        for _ in range(20):
            if not np.array_equal(runners[i].run(TOKENS, table=table), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i, half)) for i in range(2) for half in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this interpreter always has the GIL")
def test_import_enables_the_gil_in_free_threaded_python() -> None:
    """_core is not declared safe without the GIL; forward passes release it anyway."""
    code = "import sys, phi_c._core; print(sys._is_gil_enabled())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "True"
    assert "phi_c._core" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_fork_after_a_forward_pass(tmp_path: Path) -> None:
    runner = Runner(write_tiny(tmp_path / "m.gguf"))
    expected = runner.run(TOKENS)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(runner.run(TOKENS), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(runner.run(TOKENS), expected)
