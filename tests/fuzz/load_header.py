"""What the fuzzer of headers runs on each input, and pytest on the corpus."""

from pathlib import Path

import phi_c
from phi_c.errors import PhiError

DATA = b"\x3c" * (64 << 10)  # behind the header: weights of which each type makes small numbers


def load_header(header: bytes, path: Path) -> str:
    """Write a file with this header, load it and generate a token; return how far that went: an error's kind, or `ran`.

    Raises AssertionError for an error of several lines or one that does not name the file, and whatever else comes out
    of the loader but a PhiError.
    """
    path.write_bytes(header + DATA)
    try:
        with phi_c.load(path, n_ctx=32, n_threads=1) as llm:
            done = llm.generate([1], max_tokens=1, temperature=0)
    except PhiError as error:
        assert "\n" not in str(error), f"more than one line: {error!r}"
        assert str(path) in str(error), f"the file is not named: {error!r}"
        return type(error).__name__
    assert len(done.tokens) == 1
    return "ran"
