"""`phi-c score` in its own process."""

import json
from pathlib import Path

import pytest
from run_cli import run_cli

import phi_c
from tiny_gguf import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0")


def test_json_matches_the_library(model: Path) -> None:
    continuations = [" the", " and the", " é"]
    with phi_c.load(model) as llm:
        expected = llm.score("in of", continuations)
    for prompt, stdin in (("in of", ""), ("-", "in of")):
        done = run_cli("score", "-m", model, "--json", prompt, *continuations, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert (report["model"], report["prompt"]) == ("tiny phi3", "in of")
        for row, continuation, score in zip(report["scores"], continuations, expected, strict=True):
            assert row["continuation"] == continuation
            assert row["logprob"] == pytest.approx(score.logprob)
            assert row["logprob"] == pytest.approx(sum(token["logprob"] for token in row["tokens"]))
            assert row["is_greedy"] is score.is_greedy
            assert [token["id"] for token in row["tokens"]] == score.tokens
    assert [token["piece"] for token in report["scores"][0]["tokens"]] == [" the"]


def test_table_has_one_row_per_continuation(model: Path) -> None:
    done = run_cli("score", "-m", model, "in", " the", ' "x"')
    header, *rows = (line.split(maxsplit=3) for line in done.stdout.splitlines())
    assert header == ["logprob", "greedy", "tokens", "continuation"]
    assert [row[3] for row in rows] == ['" the"', r'" \"x\""']
    assert all(float(row[0]) < 0 and row[1] in ("yes", "no") for row in rows)


def test_smollm2_prefers_paris(smollm2_path: Path) -> None:
    done = run_cli("score", "-m", smollm2_path, "The capital of France is", " Rome", " Paris")
    rome, paris = (float(line.split()[0]) for line in done.stdout.splitlines()[1:])
    assert paris > rome


def test_errors_are_one_line(model: Path) -> None:
    cases: list[tuple[tuple[str, ...], bytes, int]] = [
        (("in", ""), b"", 2),
        (("-c", "8", "in", " the" * 20), b"", 2),
        (("-", " the"), b"\xff", 2),
        (("--tier", "z80", "in", " the"), b"", 2),
    ]
    for arguments, stdin, code in cases:
        done = run_cli("score", "-m", model, *arguments, stdin=stdin)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        assert done.stderr.startswith("phi-c: error: ")
        assert done.returncode == (1 if "-c" in arguments else code), done.stderr
