"""The loader under atheris: any bytes as a model file end in a PhiError of one line, or run.

    PYTHONPATH=tests:tests/model python tests/fuzz/fuzz_loader.py NEW_INPUTS tests/fuzz/corpus/loader -max_total_time=60

Arguments are libFuzzer's; `nox -s fuzz` gives them. Coverage is counted in Python.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
from gguf_mutator import mutate

with atheris.instrument_imports(include=["phi_c.model", "phi_c.text"]):
    from load_any import load_any

# One file, in memory where the system has a folder for it: mapped anew for every input.
_FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
_PATH = _FOLDER / f"phi-c-fuzz-{os.getpid()}"


def test_one_input(data: bytes) -> None:
    """Write an input, and load it."""
    _PATH.write_bytes(data)
    load_any(_PATH)


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """Change an input, as a GGUF file where it is one."""
    return mutate(data, max_size, seed, atheris.Mutate)


if __name__ == "__main__":
    warnings.simplefilter("error")  # as in the tests: a warning of numpy's would be the user's to read
    atheris.Setup(sys.argv, test_one_input, custom_mutator=custom_mutator)
    try:
        atheris.Fuzz()
    finally:
        _PATH.unlink(missing_ok=True)
