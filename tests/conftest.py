"""Fixtures shared by all tests: the real Phi-3 vocabulary, and a small model with real weights."""

import os
import signal
from pathlib import Path

import pytest

from phi_c.errors import DownloadError

# A shell starts background jobs with SIGINT ignored, and child processes inherit that. Some tests send SIGINT to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
        pytest.skip(f"smollm2 is not cached and cannot be downloaded: {error}")
