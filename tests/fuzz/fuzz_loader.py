"""Fuzzes the loader with atheris: any bytes as a model file either run or raise a PhiError of one line.

    PYTHONPATH=tests:tests/model python tests/fuzz/fuzz_loader.py NEW_INPUTS tests/fuzz/corpus/loader -max_total_time=60

Arguments are libFuzzer's; `nox -s fuzz` passes them. Coverage is measured in Python code.
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

# The file that every input is written to, in memory if the system has /dev/shm.
_FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
_PATH = _FOLDER / f"phi-c-fuzz-{os.getpid()}"


def test_one_input(data: bytes) -> None:
    """Write an input to a file and load it."""
    _PATH.write_bytes(data)
    load_any(_PATH)


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """Mutate an input, as a GGUF file if it is one."""
    return mutate(data, max_size, seed, atheris.Mutate)


if __name__ == "__main__":
    warnings.simplefilter("error")  # as in the tests, since users would see a NumPy warning
    atheris.Setup(sys.argv, test_one_input, custom_mutator=custom_mutator)
    try:
        atheris.Fuzz()
    finally:
        _PATH.unlink(missing_ok=True)
