"""`phi-c bench`: JSON keys, checks of the figures, random models, errors."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_cli import command, invoke, invoke_json, run_cli

import phi_c
from phi_c import _core, errors, machine
from phi_c.bench import memory, speed
from phi_c.bench.random_model import make_plan, random_model
from phi_c.bench.shapes import SHAPES, Shape
from phi_c.cli import bench
from phi_c.gguf.reader import GGUFFile
from tiny_gguf import write_tiny

KEYS = {
    "model", "prefill_tok_s", "decode_tok_s", "batch", "batch_steps", "context", "read_gb_s", "weight_bytes_per_token",
    "bandwidth_share", "load_s", "first_token_s", "peak_rss_bytes", "tier", "n_threads", "tuning",
    "logits_hash",
}  # fmt: skip
QUICK = ("--prefill", "40", "--decode", "3", "--batch", "1,3", "--repeat", "2", "--threads", "1")
TINY = Shape("tiny", 8, 512, 768, 4, 2, 96, 300, 8192, 4096)
run = partial(invoke, bench.command)
report = partial(invoke_json, bench.command)


@pytest.fixture(autouse=True)
def quick_and_isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure bandwidth on little memory; write random models to a temporary folder."""
    monkeypatch.setattr(memory, "_MAX_READ_BYTES", 16 << 20)
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


def test_json_keys_and_ranges(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHI_C_ISA", raising=False)
    start = time.perf_counter()
    found = report("-m", tiny, *QUICK, "--context", "0,70")
    seconds = time.perf_counter() - start
    assert found.keys() == KEYS
    best = [tier for tier in _core.tiers() if _core.max_exact_batch(tier) is None][-1]  # inexact tiers are opt-in
    assert (found["tier"], found["n_threads"], found["model"]) == (best, 1, "tiny phi3")
    assert [row["n_seqs"] for row in found["batch"]] == [1, 3]
    assert [row["n_tokens"] for row in found["context"]] == [0, 70]
    assert found["decode_tok_s"] == found["batch"][0]["tok_s"] == found["context"][0]["tok_s"]
    assert 40 / seconds < found["prefill_tok_s"] < 1e7
    assert all(3 / seconds < row["tok_s"] < 1e6 for row in found["batch"] + found["context"])
    assert 0.1 < found["read_gb_s"] < 1e4
    share = found["decode_tok_s"] * found["weight_bytes_per_token"] / (found["read_gb_s"] * 1e9)
    assert found["bandwidth_share"] == pytest.approx(share, abs=1e-3)
    assert 0 < found["load_s"] <= found["first_token_s"] < seconds
    assert tiny.stat().st_size < found["peak_rss_bytes"] < machine.memory_total()


def test_weight_bytes_per_token(tiny: Path) -> None:
    with GGUFFile(tiny) as file:
        expected = sum(info.n_bytes for info in file.tensors.values() if len(info.shape) == 2)
        expected -= file.tensors["token_embd.weight"].n_bytes
    assert report("-m", tiny, *QUICK)["weight_bytes_per_token"] == expected


def test_phases(tiny: Path) -> None:
    """Prefill, one sequence, and each batch size, with the phases of a dense model, whose shares add up to 1."""
    found = report("-m", tiny, *QUICK, "--context", "50", "--phases")
    assert found.keys() == KEYS | {"phases"}
    cases = [(case["kind"], case["n_seqs"], case["n_tokens"], case["n_steps"]) for case in found["phases"]]
    assert cases == [("prefill", 1, 40, 1), ("decode", 1, 0, 3), ("decode", 3, 0, 3), ("decode", 1, 50, 3)]
    for case in found["phases"]:
        names = [row["phase"] for row in case["phases"]]
        assert names == [
            "start", "embed", "norm", "qkv", "attention", "attn_output", "gate_up", "down", "lm_head", "python",
        ]  # fmt: skip
        assert sum(row["share"] for row in case["phases"]) == pytest.approx(1, abs=0.01)
        assert sum(row["ms"] for row in case["phases"]) == pytest.approx(case["step_ms"], rel=0.01)
    weights = {row["phase"]: row["weight_bytes"] for row in found["phases"][1]["phases"] if "weight_bytes" in row}
    assert list(weights) == ["qkv", "attn_output", "gate_up", "down", "lm_head"]
    assert sum(weights.values()) == found["weight_bytes_per_token"]


def test_phase_tables(tiny: Path) -> None:
    text = run("-m", tiny, *QUICK, "--phases").stdout
    for title in ("prefill of 40 tokens: ", "decode, batch 1: ", "decode, batch 3: "):
        assert text.count(title) == 1
    assert text.count("attn_output") == 3 and text.count("imbalance") == 3


def test_ranges_of_batch_sizes(tiny: Path) -> None:
    found = report("-m", tiny, "--prefill", "8", "--decode", "2", "--batch", "1..3, 6,2..4", "--repeat", "2")
    assert [row["n_seqs"] for row in found["batch"]] == [1, 2, 3, 6, 4]
    assert all(row["tok_s_low"] <= row["tok_s"] <= row["tok_s_high"] for row in found["batch"])
    assert [(step["from"], step["to"]) for step in found["batch_steps"]] == [(1, 2), (2, 3), (3, 4), (4, 6)]
    assert found["batch_steps"][0].keys() == {"from", "to", "ratio", "low", "high", "cliff"}


def test_chart_of_batch_sizes(tiny: Path) -> None:
    quick = ("--prefill", "8", "--decode", "2", "--repeat", "1")
    lines = run("-m", tiny, *quick, "--batch", "1..5").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("batch "))
    assert [line.split()[0] for line in lines[start + 1 : start + 6]] == ["1", "2", "3", "4", "5"]
    assert "#" not in run("-m", tiny, *quick, "--batch", "1..4").stdout


def test_neighbouring_batch_sizes_are_measured_in_turns(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up in one repetition, down in the next."""
    order: list[int] = []
    decode = speed._Runner._decode

    def recording(self: Any, case: Any, prompts: Any) -> None:
        order.append(case.n_seqs)
        decode(self, case, prompts)

    monkeypatch.setattr(speed._Runner, "_decode", recording)
    report("-m", tiny, "--prefill", "8", "--decode", "2", "--batch", "1..3", "--repeat", "3")
    assert order == [1, 2, 3, 3, 2, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("workload", "n_ctx", "kv_cache_tokens"),
    [
        (speed.Workload(n_prefill=40, n_decode=3, batch_sizes=(1, 3)), 64, 96),
        (speed.Workload(n_prefill=40, n_decode=4, batch_sizes=tuple(range(1, 33))), 64, 32 * 32),
        (speed.Workload(n_prefill=8, n_decode=31, batch_sizes=(2, 1)), 32, 64),
        (speed.Workload(n_prefill=8, n_decode=32, batch_sizes=(2, 1)), 64, 128),  # 33 positions per sequence: 2 pages
        (speed.Workload(n_prefill=8, n_decode=8, batch_sizes=(1,), contexts=(100,)), 128, 128),
    ],
)
def test_context_and_cache_of_a_workload(workload: speed.Workload, n_ctx: int, kv_cache_tokens: int) -> None:
    assert (workload.n_ctx, workload.kv_cache_tokens) == (n_ctx, kv_cache_tokens)


def test_all_sequences_of_a_range_are_decoded_together(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds more tokens than the model's context, and no sequence waits for pages of another."""
    sizes: list[int] = []
    forward = _core.forward

    def counting(model: Any, kv: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(tokens))
        return forward(model, kv, tokens, *rest, **options)

    monkeypatch.setattr("phi_c.engine.engine.forward", counting)
    report("-m", tiny, "--prefill", "8", "--decode", "4", "--batch", "20,40", "--repeat", "1")
    assert sizes.count(20) == sizes.count(40) == 5  # the first token, and 4 timed ones


def test_few_tokens_are_decoded_if_there_are_many_batch_sizes() -> None:
    assert (speed.default_n_decode(8), speed.default_n_decode(9), speed.default_n_decode(32)) == (64, 4, 4)


def test_logits_hash_depends_on_the_weights_only(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", seed=1)
    first, again, different = (report("-m", path, *QUICK)["logits_hash"] for path in (tiny, tiny, other))
    assert first == again != different
    assert len(bytes.fromhex(first)) == 8


def test_timed_prompts_are_not_served_from_the_prefix_cache(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every repetition prefills its whole prompt; the prompt of a --context measurement is prefilled once."""
    n_forwarded: list[int] = []
    forward = _core.forward

    def counting(model: Any, kv: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        n_forwarded.append(len(tokens))
        return forward(model, kv, tokens, *rest, **options)

    monkeypatch.setattr("phi_c.engine.engine.forward", counting)
    report("-m", tiny, "--prefill", "96", "--decode", "2", "--batch", "2", "--repeat", "3", "--context", "65")
    assert n_forwarded.count(96) == 3
    assert n_forwarded.count(65) == 1


def test_context_length_is_the_same_in_every_repetition(tiny: Path) -> None:
    """If it grew by the tokens of earlier repetitions, it would not fit the KV cache."""
    quick = ("--prefill", "8", "--decode", "20", "--batch", "1", "--repeat", "4", "--threads", "1", "--kv-type", "q8")
    assert report("-m", tiny, *quick, "--context", "420")["context"][0]["tok_s"] > 0


def test_unknown_bandwidth(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "read_rate", lambda n_threads: None)
    found = report("-m", tiny, *QUICK)
    assert found["read_gb_s"] is None and found["bandwidth_share"] is None
    assert "not enough free memory to measure it" in run("-m", tiny, *QUICK).stdout


def test_table_rows(tiny: Path) -> None:
    result = run("-m", tiny, *QUICK, "--context", "50", "--layout", "mmap")
    assert result.exit_code == 0
    rows = ("tiny phi3", "1 threads", "prefill 40 ", "decode ", "batch 3 ", "decode after 50 tokens ", "read per token")
    for text in rows:
        assert text in result.stdout
    assert result.stderr == ""  # progress is shown on terminals only


def test_random_model_loads(tmp_path: Path) -> None:
    """The file loads, and its logits are finite and differ between tokens."""
    parts: list[tuple[int, int]] = []
    path = random_model("tiny", lambda done, total: parts.append((done, total)))
    assert path == tmp_path / "cache/random/tiny.gguf"
    assert parts[-1][0] == parts[-1][1] and sorted(parts) == parts
    with phi_c.load(path, n_ctx=64) as llm:
        config = llm.config
        assert (config.n_layers, config.n_embd, config.n_ffn, config.n_vocab) == (8, 512, 768, 300)
        assert (config.n_heads, config.n_kv_heads, config.head_dim, config.rope_dims) == (4, 2, 128, 96)
        assert config.long_rope and config.n_ctx_orig == 4096
        logits = llm.logits([1, 2, 3])
        assert 0.1 < logits.std() < 10 and abs(logits).max() < 100
        assert llm.tokenizer.decode(llm.tokenizer.encode("Hi there \u00e9")) == "Hi there \u00e9"
    before = path.stat()
    assert random_model("tiny") == path and path.stat() == before
    assert report("--random", "tiny", *QUICK)["model"] == "tiny, random weights"


def test_tensor_types_match_the_published_file() -> None:
    """Phi-3-mini's Q4_K_M file: the layers whose ffn_down is Q6_K, and the number of tensors of each type."""
    tensors = make_plan(SHAPES["phi-3-mini"]).tensors
    down = [i for i in range(32) for t in tensors if (t.name, t.type_name) == (f"blk.{i}.ffn_down.weight", "Q6_K")]
    assert down == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    types = [tensor.type_name for tensor in tensors]
    assert {kind: types.count(kind) for kind in set(types)} == {"F32": 65, "Q4_K": 81, "Q5_K": 32, "Q6_K": 17}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--batch", "1,x"],
            "--batch is '1,x', expected integers of at least 1, such as 1,16, or ranges, such as 1..16",
        ),
        (["--batch", "8..1"], "--batch is '8..1', expected integers of at least 1"),
        (["--batch", "1..2..3"], "--batch is '1..2..3', expected integers of at least 1"),
        (["--batch", "1.."], "--batch is '1..', expected integers of at least 1"),
        (["--batch", "1..99999"], "--batch is '1..99999', expected integers of at least 1"),
        (
            ["--kv-cache-tokens", "64", "--prefill", "8", "--decode", "2", "--batch", "3"],
            "kv_cache_tokens is 64, expected at least 96, which the workload needs",
        ),
        (["--batch", "0"], "--batch is '0', expected integers of at least 1"),
        (["--context", "-1"], "--context is '-1', expected integers of at least 0"),
        (
            ["--prefill", "600", "--batch", "1"],
            "the workload needs a context of 608 tokens, the model has 512: lower --prefill, --decode or --context",
        ),
        (
            ["--ctx-size", "64", "--prefill", "40", "--batch", "1"],
            "n_ctx is 64, expected at least 96, which the workload",
        ),
        (["--tier", "z80", "--batch", "1"], "tier is 'z80', expected one that this machine runs: scalar"),
        (["--threads", "0", "--batch", "1"], "n_threads is 0, expected an integer from 1 to 1024"),
    ],
)
def test_option_errors(tiny: Path, arguments: list[str], message: str) -> None:
    done = run_cli("bench", "-m", tiny, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"phi-c: error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["m"], ["--repeat", "0"], ["-m", "m", "--kernels"], ["-m", "m", "--random", "x"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    done = run_cli("bench", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: phi-c bench ") and done.stderr.count("\n") == 2


def test_unknown_random_model() -> None:
    result = run("--random", "phi-9")
    assert isinstance(result.exception, errors.OptionError)
    assert str(result.exception).startswith("there are no random weights for 'phi-9', expected one of phi-3-mini, ")


def wait_until_measuring(process: subprocess.Popen[bytes], model: Path) -> None:
    """Wait until a process has opened a model, where /proc shows that, then three seconds for loading it."""
    maps = Path(f"/proc/{process.pid}/maps")
    end = time.monotonic() + 60
    while maps.exists() and model.name not in maps.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(3)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_exits_with_130(tiny: Path) -> None:
    """Ctrl-C ends the command with exit code 130 and without a traceback."""
    arguments = command("bench", "-m", tiny, "--batch", "1", "--repeat", "100000")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        try:
            wait_until_measuring(process, tiny)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()  # else a failure would wait for it
    assert (process.returncode, out, err.strip()) == (130, b"", b"")
