"""The seed corpus of the loader's fuzzer and all inputs that exposed a bug, without a fuzzer."""

import shutil
from pathlib import Path

import pytest
from load_any import load_any

CORPUS = Path(__file__).with_name("corpus")
# Inputs that exposed a bug, and the expected results of the model and of the tokenizer.
FOUND = {
    "score-is-not-a-number": ("ModelFileError", "ModelFileError"),  # a header only
    "token-id-is-an-array": ("ModelFileError", "ModelFileError"),
    "token-type-is-infinite": ("ran", "ModelFileError"),
}


@pytest.mark.parametrize("path", sorted((CORPUS / "loader").iterdir()), ids=lambda path: path.name)
def test_seed_corpus_runs(path: Path) -> None:
    assert load_any(path) == ("ran", "ran")


@pytest.mark.parametrize("name", FOUND)
def test_found_bugs_stay_fixed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "found.gguf"
    shutil.copy(CORPUS / "loader-found" / name, path)
    assert load_any(path) == FOUND[name]


def test_corpus_is_complete_and_small() -> None:
    assert {path.name for path in (CORPUS / "loader-found").iterdir()} == set(FOUND)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 100_000
