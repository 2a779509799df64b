"""Everything that reads a model file, on any bytes: what the loader's fuzzer calls, and the tests on its corpus."""

from pathlib import Path

from one_token import run_one_token
from phi_c.errors import PhiError
from phi_c.gguf.reader import GGUFFile
from phi_c.text.tokenizer import load_tokenizer

TEXT = "ab a<|end|>\n<|so|> b\u00e9"


def load_any(path: Path) -> tuple[str, str]:
    """Run the model and the tokenizer of a file; return how far each went: the error's kind, or `ran`."""
    return run_one_token(path), run_tokenizer(path)


def run_tokenizer(path: Path) -> str:
    """Build the tokenizer of a file, encode and decode with it; raises all but a PhiError of one line that names it."""
    try:
        with GGUFFile(path) as file:
            tokenizer = load_tokenizer(file.metadata, path=path)
    except PhiError as error:
        assert "\n" not in str(error), f"more than one line: {error!r}"
        assert str(path) in str(error), f"the file is not named: {error!r}"
        return type(error).__name__
    for parse_special in (False, True):
        ids = tokenizer.encode(TEXT, parse_special=parse_special)
        assert all(0 <= i < tokenizer.n_vocab for i in ids), f"ids outside the vocabulary: {ids}"
        tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.n_vocab), special=True)
    return "ran"
