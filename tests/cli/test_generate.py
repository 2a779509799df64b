"""`phi-c generate` in its own process: pipes, signals, JSON."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_cli import command, run_cli

from tiny_gguf import write_tiny

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and pipes")
GREEDY = ("--temperature", "0", "--repeat-penalty", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0", n_ctx=65536)


@pytest.fixture(scope="module")
def endless(model: Path) -> list[str]:
    """Return options that ban the end tokens, so that generation only ends at a limit."""
    names = ("</s>", "<|endoftext|>", "<|end|>")
    ids = [json.loads(run_cli("tokens", "-m", model, "--json", "--no-bos", "--parse-special", n).stdout) for n in names]
    return [part for tokens in ids for part in ("--logit-bias", f"{tokens[0]['id']}=-inf")]


def test_stdout_has_only_the_generated_text(model: Path) -> None:
    done = run_cli("generate", "-m", model, "--raw", *GREEDY, "--max-tokens", "12", "Once upon")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.endswith("\n")
    result = json.loads(
        run_cli("generate", "-m", model, "--raw", *GREEDY, "--sample-len", "12", "--json", "Once upon").stdout
    )
    assert done.stdout in (result["text"], result["text"] + "\n")
    assert result["usage"]["completion_tokens"] == len(result["tokens"]) <= 12
    assert result["finish_reason"] in ("stop", "length")


def test_all_options_together(model: Path) -> None:
    options = {"temperature": 0.9, "top-k": 50, "top-p": 0.9, "min-p": 0.01, "repeat-penalty": 1.2, "repeat-last-n": 32}
    options |= {"presence-penalty": 0.1, "frequency-penalty": 0.1, "seed": 4, "max-tokens": 8, "ctx-size": 300}
    options |= {
        "logprobs": 2,
        "system": "Be brief.",
        "threads": 1,
        "tier": "scalar",
        "batch-size": 16,
        "prompt": "Hi",
        "stop": "zzz",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    first, second = (run_cli("generate", "-m", model, "--json", *arguments, "--logit-bias", "5=-1") for _ in range(2))
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["seed"] == 4
    assert len(result["logprobs"]) == len(result["tokens"])
    assert all(len(item["top"]) == 2 and item["logprob"] <= 0 for item in result["logprobs"])
    assert json.loads(second.stdout)["tokens"] == result["tokens"]


def test_all_layouts(model: Path, tmp_path: Path) -> None:
    for layout in ("packed", "packed-cache", "packed-cache", "mmap"):
        arguments = ("--layout", layout, "--raw", *GREEDY, "--max-tokens", "1", "the")
        done = run_cli("generate", "-m", model, *arguments, PHI_C_CACHE=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")


def test_prompt_from_stdin(model: Path) -> None:
    arguments = ("generate", "-m", model, "--raw", *GREEDY, "--max-tokens", "6")
    expected = run_cli(*arguments, "the and é").stdout
    assert run_cli(*arguments, "-", stdin="the and é").stdout == expected
    assert run_cli(*arguments, stdin="the and é").stdout == expected
    assert run_cli(*arguments, "--prompt", "the and é").stdout == expected


BAD: list[tuple[list[str], int, str]] = [
    (["--temperature", "nan", "x"], 2, "temperature is nan, expected a finite number"),
    (["--max-tokens", "0", "x"], 2, "max_tokens is 0"),
    (["--ctx-size", "99999", "x"], 2, "n_ctx is 99999, expected 1 to 65536"),
    (["-c", "8", "the and in of to is it"], 1, "more than the context size of 8: shorten it"),
    (["--logprobs", "1", "x"], 2, "--logprobs needs --json"),
    (["--tier", "z80", "x"], 2, "tier is 'z80', expected one that this machine runs: scalar"),
    (["--raw", "--system", "s", "x"], 2, "raw=True skips"),
    (["--prompt", "a", "b"], 2, "the prompt was given twice"),
    ([""], 2, "the prompt is empty"),
    (["-"], 2, "the prompt on stdin is empty"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_option_errors(model: Path, arguments: list[str], code: int, message: str) -> None:
    done = run_cli("generate", "-m", model, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_stdin_that_is_not_utf8(model: Path) -> None:
    done = run_cli("generate", "-m", model, "-", stdin=b"ab\xff")
    assert (done.returncode, done.stderr) == (
        2,
        "phi-c: error: stdin is not UTF-8 text: invalid byte 0xff at offset 2\n",
    )


def test_full_context_is_reported(model: Path, endless: list[str]) -> None:
    done = run_cli("generate", "-m", model, "--raw", "-c", "40", *endless, "the")
    assert done.returncode == 0
    assert done.stderr == "phi-c: stopped because the context of 40 tokens is full (--ctx-size sets it)\n"


def test_stats_go_to_stderr(model: Path) -> None:
    done = run_cli("generate", "-m", model, "--stats", "--max-tokens", "3", "Hi")
    assert "tok/s" in done.stderr
    assert "tok/s" not in done.stdout


@posix
def test_ctrl_c_keeps_what_was_printed(model: Path, endless: list[str]) -> None:
    arguments = command("generate", "-m", model, "--raw", "-c", "0", *endless, "the")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(first) == 20
    assert rest.endswith(b"\n")
    assert errors == b""


@posix
def test_ctrl_c_with_json_prints_the_partial_result(model: Path, endless: list[str]) -> None:
    arguments = command("generate", "-m", model, "--raw", "--json", "-c", "0", *endless, "the " * 200)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    result = json.loads(output)
    assert result["finish_reason"] == "cancelled"
    assert result["tokens"]


@posix
def test_closed_pipe_prints_no_traceback(model: Path, endless: list[str]) -> None:
    arguments = command("generate", "-m", model, "--raw", "-c", "0", *endless, "the")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_smollm2_knows_the_capital_of_france(smollm2_path: Path) -> None:
    prompt = "The capital of France is the city of"
    done = run_cli("generate", "-m", smollm2_path, *GREEDY, "--raw", "--max-tokens", "6", prompt)
    assert "Paris" in done.stdout


def test_cache_options(model: Path, tmp_path: Path) -> None:
    """Valid values generate text; invalid ones are rejected by the library."""
    base = ("generate", "-m", model, "--raw", "--json", *GREEDY, "--max-tokens", "4", "the and " * 60)
    plain = json.loads(run_cli(*base).stdout)
    for options in (("--kv-type", "q8"), ("--kv-cache-tokens", "65600"), ("--rope", "auto")):
        done = run_cli(*base, *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(json.loads(done.stdout)["tokens"]) == len(plain["tokens"])
    for options, message in (
        (("--kv-type", "q4"), "'q4' is not one of 'f16', 'q8'"),
        (("--rope", "long"), "rope is 'long', expected auto: tiny phi3 has no LongRoPE factors to choose from"),
        (("--kv-cache-tokens", "9"), "kv_cache_tokens is 9, expected at least 4096"),
    ):
        done = run_cli(*base, *options)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stdout == ""


def test_prefix_cache_across_processes(model: Path, tmp_path: Path) -> None:
    command_line = ("generate", "-m", model, "--raw", "--json", *GREEDY, "--max-tokens", "4", "the and " * 60)
    results = [
        json.loads(run_cli(*command_line, *options, PHI_C_CACHE=str(tmp_path)).stdout)
        for options in ((), ("--prefix-cache",), ("--prefix-cache",), ())
    ]
    cached = [result["usage"]["cached_tokens"] for result in results]
    assert cached[2] == (results[0]["usage"]["prompt_tokens"] - 1) // 32 * 32 > 0
    assert (cached[0], cached[1], cached[3]) == (0, 0, 0)
    assert len({tuple(result["tokens"]) for result in results}) == 1
    doctor = json.loads(run_cli("doctor", "--json", PHI_C_CACHE=str(tmp_path)).stdout)
    assert doctor["cache"]["prefix_bytes"] == sum(f.stat().st_size for f in tmp_path.glob("prefix/*/*.pages")) > 0


@posix
def test_large_kv_cache_is_reported_on_a_terminal(tmp_path: Path) -> None:
    import pty

    large = write_tiny(
        tmp_path / "m.gguf", weight_type="Q4_K", n_ctx=131072, n_layers=1, n_embd=256, n_heads=32, n_kv_heads=32
    )
    for n_ctx, is_reported in (("131072", True), ("1000", False)):
        leader, follower = pty.openpty()
        arguments = command("generate", "-m", large, "--raw", "--max-tokens", "2", "--ctx-size", n_ctx, "the")
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=follower, check=False, timeout=120)
        os.close(follower)
        output = ""
        with contextlib.suppress(OSError):  # nothing was written before the terminal was closed
            output = os.read(leader, 10_000).decode()
        os.close(leader)
        assert done.returncode == 0
        line = "KV cache: up to 1.0 GiB for 131072 tokens (0.5 GiB with --kv-type q8)"
        assert (line in output) is is_reported
