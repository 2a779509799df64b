"""Settings of the whole suite, and shared fixtures: Phi-3's real vocabulary and a small real model."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from phi_c.errors import DownloadError

# No deadlines: how long an example takes depends on the machine and its load.
settings.register_profile("phi-c", deadline=None)
settings.load_profile("phi-c")

# A shell starts background jobs with SIGINT ignored. The processes that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests of tuning turn it on, with a cache folder of their own; other tests neither measure nor write a profile.
os.environ["PHI_C_TUNE"] = "off"

_DESELECTED = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the exhaustive tests that this run deselects."""
    if items:
        stash = items[0].config.stash
        n_exhaustive = sum(item.get_closest_marker("exhaustive") is not None for item in items)
        stash[_DESELECTED] = stash.get(_DESELECTED, 0) + n_exhaustive


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print, as the last line, how to run the exhaustive tests."""
    n_deselected = config.stash.get(_DESELECTED, 0)
    if n_deselected and not config.option.collectonly:
        print(f"{n_deselected} exhaustive tests were not run: `nox -s exhaustive` or `pytest -m exhaustive` runs them")


@pytest.fixture(scope="session")
def phi3_vocab() -> Path:
    """Return a GGUF file with Phi-3's vocabulary and no tensors (ggml-vocab-phi-3.gguf of llama.cpp)."""
    default = Path(__file__).parents[2] / "shared/data/ggml-vocab-phi-3.gguf"
    path = Path(os.environ.get("PHI_C_TEST_VOCAB", default))
    if not path.is_file():
        pytest.skip("no Phi-3 vocabulary: set PHI_C_TEST_VOCAB to the path of ggml-vocab-phi-3.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return SmolLM2-135M-Instruct in Q4_1: 93 MB, downloaded once into the user's cache."""
    from phi_c.hub import resolve

    try:
        return resolve("smollm2")
    except DownloadError as error:
        pytest.skip(f"no network, and smollm2 is not in the cache: {error}")
