"""The fuzzer's first inputs, and every one that it ever broke the loader with, without a fuzzer."""

import shutil
from pathlib import Path

import pytest
from load_any import load_any

CORPUS = Path(__file__).with_name("corpus")
# How far model and tokenizer of each get. The first inputs run.
FOUND = {
    "score-is-not-a-number": ("ModelFileError", "ModelFileError"),  # a header alone
    "token-id-is-an-array": ("ModelFileError", "ModelFileError"),
    "token-type-is-infinite": ("ran", "ModelFileError"),
}


@pytest.mark.parametrize("path", sorted((CORPUS / "loader").iterdir()), ids=lambda path: path.name)
def test_first_inputs_run(path: Path) -> None:
    assert load_any(path) == ("ran", "ran")


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_fixed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "found.gguf"
    shutil.copy(CORPUS / "loader-found" / name, path)
    assert load_any(path) == FOUND[name]


def test_corpus_is_complete_and_small() -> None:
    assert {path.name for path in (CORPUS / "loader-found").iterdir()} == set(FOUND)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 100_000
