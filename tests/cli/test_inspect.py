"""`phi-c inspect`: tables, JSON, memory estimate, kernel table, errors."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import gguf
from phi_c import _core, errors
from phi_c.cli.inspect import command
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import read_config
from tiny_gguf import write_and_close, write_tiny


@pytest.fixture(params=["phi3", "llama"])
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, architecture=request.param, weight_type="Q8_0", seed=1)
    return path


def run(*arguments: object, columns: int = 200) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


def report(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def write_keys(path: Path, **keys: str) -> None:
    writer = gguf.GGUFWriter(path, "phi3")
    for key, value in keys.items():
        writer.add_string(key, value)
    write_and_close(writer)


def test_json_matches_the_file(tiny: Path) -> None:
    found = report("-m", tiny)
    with GGUFFile(tiny) as file:
        config = read_config(file)
        assert found["n_bytes"] == file.n_bytes == tiny.stat().st_size
        assert found["config"] == dataclasses.asdict(config)
        assert found["metadata"].keys() == file.metadata.keys()
        weights = sum(info.n_bytes for info in file.tensors.values())
        n_tensors = len(file.tensors)
    assert found["metadata"]["general.architecture"] == config.architecture
    assert found["error"] is None
    assert "tensors" not in found and "kernels" not in found
    assert {"F32", "Q8_0"} <= found["tensor_types"].keys()
    assert sum(row["count"] for row in found["tensor_types"].values()) == n_tensors
    assert sum(row["n_bytes"] for row in found["tensor_types"].values()) == weights
    assert found["memory"]["weights_bytes"] == weights


def test_memory_estimate(tiny: Path) -> None:
    with GGUFFile(tiny) as file:
        config = read_config(file)
    page_bytes = config.n_layers * config.n_kv_heads * config.head_dim * 2 * 2 * _core.PAGE_TOKENS
    for n_ctx, n_pages in ((1, 1), (_core.PAGE_TOKENS, 1), (_core.PAGE_TOKENS + 1, 2)):
        memory = report("-m", tiny, "--ctx-size", n_ctx)["memory"]
        assert memory["n_ctx"] == n_ctx
        assert memory["kv_bytes"] == n_pages * page_bytes
        assert memory["total_bytes"] == memory["kv_bytes"] + memory["weights_bytes"]
    assert report("-m", tiny)["memory"]["n_ctx"] == min(config.n_ctx_train, 4096)
    # q8: one scale of 2 bytes per 32 dimensions, rounded up.
    n_scales = -(-config.head_dim // 32)
    position_bytes = config.n_layers * config.n_kv_heads * 2 * (config.head_dim + 2 * n_scales)
    assert (
        report("-m", tiny, "--kv-type", "q8", "--ctx-size", 1)["memory"]["kv_bytes"]
        == position_bytes * _core.PAGE_TOKENS
    )


def test_memory_estimate_of_smollm2(smollm2_path: Path) -> None:
    """30 layers x 3 KV heads x 64 dimensions x keys and values x 2 bytes are 23040 bytes per position."""
    found = report("-m", smollm2_path)
    memory = found["memory"]
    assert (memory["n_ctx"], memory["kv_bytes"]) == (4096, 4096 * 23040)
    assert 0.97 * found["n_bytes"] < memory["weights_bytes"] < found["n_bytes"]
    assert re.search(r"layer_norm_rms_epsilon +1e-05", run("-m", smollm2_path, columns=80).stdout)


def test_long_arrays_are_shortened(phi3_vocab: Path) -> None:
    result = run("-m", phi3_vocab, "--json")
    tokens = json.loads(result.stdout)["metadata"]["tokenizer.ggml.tokens"]
    assert tokens["n_items"] == 32064
    assert tokens["first"][:3] == ["<unk>", "<s>", "</s>"] and len(tokens["first"]) < 10
    text = run("-m", phi3_vocab).stdout
    assert '["<unk>", "<s>", "</s>"' in text and "(32064 items)" in text
    assert len(text) < 20_000


def test_unsupported_file_is_shown_with_exit_code_1(phi3_vocab: Path) -> None:
    for flags in ([], ["--json"]):
        result = run("-m", phi3_vocab, *flags)
        assert result.exit_code == 1
        assert isinstance(result.exception, errors.UnsupportedModelError)
        assert "phi3.context_length" in result.stdout
    parsed = json.loads(result.stdout)
    assert parsed["config"] is parsed["memory"] is None
    assert "has no tensors" in parsed["error"]
    assert "cannot run" in run("-m", phi3_vocab).stdout


def test_tables_without_options(tiny: Path) -> None:
    text = run("-m", tiny).stdout
    assert "general.architecture" in text
    assert re.search(r"^\s*Q8_0 +\d+ +[\d.]+ (bytes|kB|MB)", text, re.MULTILINE)
    assert re.search(r"memory +[\d.,]+ (kB|MB) at a context of \d+ tokens: weights", text)
    assert "blk.0.ffn_down.weight" not in text


def test_tensors_option(tiny: Path) -> None:
    text = run("-m", tiny, "--tensors").stdout
    with GGUFFile(tiny) as file:
        config = read_config(file)
        infos = list(file.tensors.values())
    for info in infos:
        assert info.name in text
    assert re.search(rf"token_embd\.weight +\w+ +{config.n_vocab} x {config.n_embd} ", text)
    rows = report("-m", tiny, "--tensors")["tensors"]
    assert [(row["name"], tuple(row["shape"]), row["n_bytes"]) for row in rows] == [
        (info.name, info.shape, info.n_bytes) for info in infos
    ]


def test_kernels_without_a_model() -> None:
    found = report("--kernels")
    assert found == {"kernels": _core.kernel_table()}
    lines = {words[0]: words[1:] for words in map(str.split, run("--kernels").stdout.splitlines()) if words}
    assert lines["type"] == _core.tiers()
    for tensor_type in _core.TENSOR_TYPES.values():
        cells = " ".join(lines[tensor_type.name])
        expected = [
            "native"
            if found["kernels"][tier][tensor_type.name] == tier
            else f"from {found['kernels'][tier][tensor_type.name]}"
            for tier in _core.tiers()
        ]
        assert cells == " ".join(expected)


def test_kernels_with_a_model(tiny: Path) -> None:
    assert {"path", "kernels"} <= report("-m", tiny, "--kernels").keys()


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--kernels", "--tensors"], ["--kernels", "--ctx-size", "9"]])
def test_usage_errors(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "--model" in result.stderr


@pytest.mark.parametrize("n_ctx", ["0", "-5", "many", "9999999999"])
def test_invalid_context_size(tiny: Path, n_ctx: str) -> None:
    result = run("-m", tiny, "--ctx-size", n_ctx)
    assert result.exit_code == 2 and "--ctx-size" in result.stderr


def test_context_size_above_the_maximum(tiny: Path) -> None:
    result = run("-m", tiny, "--ctx-size", 10**9)
    assert isinstance(result.exception, errors.OptionError)
    assert "--ctx-size is 1000000000, expected at most" in str(result.exception)


def test_missing_and_truncated_files(tmp_path: Path, tiny: Path) -> None:
    assert isinstance(run("-m", tmp_path / "none.gguf").exception, errors.ModelNotFoundError)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-40])
    assert isinstance(run("-m", cut).exception, errors.ModelFileError)


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    write_keys(path, odd="a\x1b[31mred\nline [bold]not markup[/bold] [/]")
    text = run("-m", path).stdout
    assert "\x1b" not in text
    assert r"a\x1b[31mred\nline [bold]not markup[/bold] [/]" in text


def test_long_strings_are_shortened(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    write_keys(path, long="x" * 5000)
    assert "(5000 characters)" in run("-m", path).stdout
    assert len(run("-m", path).stdout) < 3000
    assert json.loads(run("-m", path, "--json").stdout)["metadata"]["long"] == "x" * 5000
