"""Feeds mutated GGUF headers to the loader, guided by what they reach (atheris, which is libFuzzer for Python).

    python tests/fuzz/fuzz_header.py NEW_INPUTS tests/fuzz/corpus/header -max_total_time=60

The header is read in Python, from the file's map to tokens and sizes; only strings and weights are read in C.
"""

import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

with atheris.instrument_imports(include=["phi_c"]):
    from load_header import load_header
    from mutate import mutations

    import phi_c.llm  # noqa: F401 - what phi_c.load imports when it is called

_MEMORY = Path("/dev/shm")
_file = Path(tempfile.mkdtemp(prefix="phi-c-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None)) / "m.gguf"


def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
    """Return data damaged as files are, or as libFuzzer thinks fit."""
    rng = random.Random(seed)
    if len(data) < 16 or rng.random() < 0.5:
        return bytes(atheris.Mutate(data, max_bytes))
    *_, damaged = mutations(data, len(data), seed, rng.randrange(1, 5))
    return damaged[:max_bytes]


def test_one_input(data: bytes) -> None:
    """Any exception that load_header raises is a finding."""
    load_header(data, _file)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()
