"""The inputs that fuzzing begins with, and those that it found: each loads, or is refused with one line."""

from pathlib import Path

import pytest
from load_header import load_header

HEADERS = Path(__file__).with_name("corpus") / "header"
SEEDS = {"phi3", "phi3-longrope", "llama", "phi2", "phimoe"}


@pytest.mark.parametrize("name", sorted(path.name for path in HEADERS.iterdir()))
def test_header(name: str, tmp_path: Path) -> None:
    outcome = load_header((HEADERS / name).read_bytes(), tmp_path / "m.gguf")
    if name in SEEDS:
        assert outcome == "ran"


def test_the_seeds_are_there() -> None:
    assert {path.name for path in HEADERS.iterdir()} >= SEEDS


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in HEADERS.parent.rglob("*") if path.is_file()) < 200_000
