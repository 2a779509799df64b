"""Loads arbitrary bytes as a model file: the target of the loader's fuzzer and of the tests on its corpus."""

from pathlib import Path

from one_token import run_one_token
from phi_c.errors import PhiError
from phi_c.gguf.reader import GGUFFile
from phi_c.text.tokenizer import load_tokenizer

TEXT = "ab a<|end|>\n<|so|> b\u00e9"


def load_any(path: Path) -> tuple[str, str]:
    """Run the model and the tokenizer of a file; return for each the name of the PhiError it raised, or "ran"."""
    return run_one_token(path), run_tokenizer(path)


def run_tokenizer(path: Path) -> str:
    """Load the tokenizer of a file, encode and decode with it.

    Returns the name of the PhiError, or "ran". Raises AssertionError if the PhiError has more than one line or does not
    name the file, and any other exception.
    """
    try:
        with GGUFFile(path) as file:
            tokenizer = load_tokenizer(file.metadata, path=path)
    except PhiError as error:
        assert "\n" not in str(error), f"the message has more than one line: {error!r}"
        assert str(path) in str(error), f"the message does not name the file: {error!r}"
        return type(error).__name__
    for parse_special in (False, True):
        ids = tokenizer.encode(TEXT, parse_special=parse_special)
        assert all(0 <= i < tokenizer.n_vocab for i in ids), f"token ids outside the vocabulary: {ids}"
        tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.n_vocab), special=True)
    return "ran"
