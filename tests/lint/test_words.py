"""The search for words: every pattern finds its words, and common words in other senses pass."""

import subprocess
import sys
from pathlib import Path

import pytest

from lint.words import ROOT, WORDS, find, main, tracked

# One sentence for each pattern, in the order of WORDS.
SENTENCES = (
    "a batch of 8 texts",
    "texts that run together",
    "it reads a prompt at 187 tok/s",
    "prompts are read in one pass",
    "the first text comes after 0.4 s",
    "the next line is asked for",
    "ask_for(line)",
    "tiers that have to be asked for",
    "rows are had a few at a time",
    "the sequence goes on",
    "the file lies in the cache folder",
    "as many rows as they like",
    'layout="cached"',
    "a side file",
    "touches the pages",
    "wide activations",
    "class Shelf",
    "pool.take()",
    "n_unpromised",
    "rows_from=0",
    "phi_head(model)",
    "phi_activation_kind",
    "PHI_ROPE_NORM",
    "soften",
    "few_tokens",
    "the likeliest token",
    "how likely a continuation is",
    "class Piece",
    "how far two models are apart",
    "same_top",
    "n_cache",
    "--n-ctx 512",
    "what it takes is said before",
    "a file that says how it was made",
    "dropped in silence",
    "leaves out the rest",
    "a damaged file",
    "this is no GGUF file",
    "a matrix of so many rows",
    "pages are at home only there",
)
PLAIN = (
    "plain text, the text of a file, two text files",
    "the last token, the first token",
    "there is no such file; it is no longer there",
    "the file is asked, and says hello",
    "Path.touch() makes an empty file",
    "a wide table, the widest row",
    "layout mmap, layout packed-cache",
)


@pytest.mark.parametrize(("pattern", "sentence"), list(zip([pattern for pattern, _ in WORDS], SENTENCES, strict=True)))
def test_each_pattern_finds_its_words(pattern: str, sentence: str) -> None:
    instead = dict(WORDS)[pattern]
    assert instead in {found for _, _, found in find(sentence)}


@pytest.mark.parametrize("sentence", PLAIN)
def test_common_words_pass(sentence: str) -> None:
    assert list(find(sentence)) == []


def test_words_split_by_the_end_of_a_line() -> None:
    assert [number for number, _, _ in find("a line\n# that is asked\n# for by all\n")] == [2]


in_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: its files are not known")


@in_checkout
def test_every_kind_of_file_is_searched() -> None:
    suffixes = {path.suffix for path in tracked([])}
    assert {".py", ".pyx", ".pxi", ".pyi", ".c", ".h", ".md", ".toml", ".yml"} <= suffixes


def test_a_word_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lint.words.ROOT", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "good.md").write_text("A batch of 8 sequences.\n")
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    assert main([]) == 0
    (tmp_path / "bad.md").write_text("A batch of\n8 texts.\n")
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    assert main([]) == 1
    assert "bad.md:2: '8 texts' -> sequence(s)" in capsys.readouterr().out


@in_checkout
def test_the_script_runs_on_its_own() -> None:
    script = Path(__file__).with_name("words.py")
    result = subprocess.run(
        [sys.executable, str(script), "--", "no-such-folder"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "0 files searched" in result.stderr
