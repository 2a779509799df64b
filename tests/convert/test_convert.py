"""Conversion of safetensors folders to GGUF files: the files written, and the error for each kind of bad input."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_files import random_weights, shard, write_folder, write_safetensors

import gguf
from cli.run_cli import run_cli
from phi_c import llm
from phi_c.convert.run import convert
from phi_c.errors import (
    ModelFileError,
    ModelNotFoundError,
    OptionError,
    OutputError,
    PhiError,
    UnsupportedModelError,
)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and the tensors of a GGUF file, read by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def edit_json(folder: Path, file: str = "config.json", **changes: Any) -> None:
    settings = json.loads((folder / file).read_text(encoding="utf-8"))
    settings |= changes
    (folder / file).write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("outtype", ["auto", "f32", "f16", "bf16"])
def test_output_types(tmp_path: Path, stored: str, outtype: str) -> None:
    folder = write_folder(tmp_path / "model", dtype=stored)
    source = random_weights("Phi3", json.loads((folder / "config.json").read_text()), stored)
    metadata, tensors = read(convert(folder, tmp_path / "m.gguf", outtype=outtype))
    kind = stored if outtype == "auto" else outtype.upper()
    assert metadata["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[kind]
    for name, source_name in (
        ("blk.1.attn_qkv.weight", "model.layers.1.self_attn.qkv_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
    ):
        raw = source[source_name][1]
        floats = (raw.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else raw.astype(np.float32)
        expected_type = "F32" if "norm" in name else kind
        assert tensors[name].tensor_type.name == expected_type
        expected = gguf.quants.quantize(floats, gguf.GGMLQuantizationType[expected_type])
        assert np.array_equal(tensors[name].data.view(np.uint8), expected.view(np.uint8)), name


def test_bfloat16_rounding_equals_the_gguf_package() -> None:
    from phi_c.convert.values import cast

    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32)
    floats = np.concatenate([bits.view(np.float32), np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 1 + 2**-8])])
    floats = floats[np.isnan(floats) | np.isinf(floats) | (np.abs(floats) < 3.3e38)].reshape(1, -1)
    expected = gguf.quants.quantize(floats, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    assert np.array_equal(cast(floats, "F32", "BF16"), expected)


def test_llama_q_and_k_rows_are_interleaved(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "Llama")
    source = random_weights("Llama", json.loads((folder / "config.json").read_text()), "F32")
    _, tensors = read(convert(folder, tmp_path / "m.gguf"))
    for letter, n_heads in (("q", 4), ("k", 2)):
        rows = source[f"model.layers.0.self_attn.{letter}_proj.weight"][1].reshape(n_heads, 16, 64)
        got = tensors[f"blk.0.attn_{letter}.weight"].data.reshape(n_heads, 16, 64)
        for i in range(8):
            assert np.array_equal(got[:, 2 * i], rows[:, i])
            assert np.array_equal(got[:, 2 * i + 1], rows[:, i + 8])


def test_large_tensor_is_interleaved_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model", "Llama")
    whole = convert(folder, tmp_path / "whole.gguf").read_bytes()
    monkeypatch.setattr("phi_c.convert.write._CHUNK_ELEMENTS", 1500)  # 23 rows: more than a head, not a multiple of one
    assert convert(folder, tmp_path / "chunks.gguf").read_bytes() == whole


def test_shards_give_the_same_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    whole = convert(folder, tmp_path / "whole.gguf").read_bytes()
    shard(folder)
    assert convert(folder, tmp_path / "sharded.gguf").read_bytes() == whole


def test_metadata(tmp_path: Path) -> None:
    rope = {"type": "su", "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    folder = write_folder(
        tmp_path / "Phi-3-tiny",
        sliding_window=33,
        original_max_position_embeddings=32,
        rope_scaling=rope,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
    )
    edit_json(folder, "tokenizer_config.json", add_bos_token=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [852, 4]}))
    metadata, tensors = read(convert(folder, tmp_path / "m.gguf"))
    expected = {
        "general.architecture": "phi3",
        "general.name": "Phi-3-tiny",
        "phi3.context_length": 128,
        "phi3.rope.scaling.original_context_length": 32,
        "phi3.embedding_length": 64,
        "phi3.block_count": 2,
        "phi3.feed_forward_length": 96,
        "phi3.attention.head_count": 4,
        "phi3.attention.head_count_kv": 2,
        "phi3.rope.dimension_count": 12,
        "phi3.rope.freq_base": 10000.0,
        "phi3.attention.sliding_window": 33,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {key: metadata.get(key) for key in expected} == expected
    tokens = metadata["tokenizer.ggml.tokens"]
    assert metadata["tokenizer.ggml.eos_token_id"] == tokens.index("<|endoftext|>")
    assert metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(np.sqrt(1 + np.log(4) / np.log(32)))
    assert tensors["rope_factors_long.weight"].data.tolist() == [3.0] * 6
    assert "output.weight" not in tensors
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds[:4] == [3, 3, 4, 6]
    assert kinds[-3:] == [5] * 3
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    with llm.load(tmp_path / "m.gguf") as model:
        assert model.tokenizer.encode("<|user|>\nHi<|end|>", parse_special=True)[-1] == tokens.index("<|end|>")
        assert model.generate("Hello", max_tokens=3).usage.completion_tokens > 0


def remove_tensor(folder: Path, name: str) -> None:
    tensors = random_weights("Phi3", json.loads((folder / "config.json").read_text()), "F32")
    del tensors[name]
    write_safetensors(folder / "model.safetensors", tensors)


def add_tensor(folder: Path, name: str, dtype: str, values: Any) -> None:
    tensors = random_weights("Phi3", json.loads((folder / "config.json").read_text()), "F32")
    write_safetensors(folder / "model.safetensors", tensors | {name: (dtype, values)})


def delete_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def list_shard_outside_folder(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def delete_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def rename_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.layers.1.input_layernorm.weight"
INVALID: dict[str, tuple[Callable[[Path], Any], type[PhiError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ModelNotFoundError, "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), ModelFileError, "is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ModelFileError, "expected a JSON object"),
    "unknown architecture": (
        lambda f: edit_json(f, architectures=["GPT2LMHeadModel"]),
        UnsupportedModelError,
        "GPT2LMHeadModel",
    ),
    "no architecture": (lambda f: edit_json(f, architectures=None), UnsupportedModelError, "architectures is None"),
    "quantised": (lambda f: edit_json(f, quantization_config={"bits": 4}), UnsupportedModelError, "quantised"),
    "activation": (lambda f: edit_json(f, hidden_act="gelu"), UnsupportedModelError, "hidden_act is 'gelu'"),
    "size is a string": (lambda f: edit_json(f, hidden_size="64"), ModelFileError, "hidden_size is '64'"),
    "no size": (lambda f: edit_json(f, num_hidden_layers=None), ModelFileError, "num_hidden_layers is None"),
    "wrong size": (
        lambda f: edit_json(f, intermediate_size=97),
        ModelFileError,
        "expected (194, 64) according to config.json",
    ),
    "unknown rope_type": (
        lambda f: edit_json(f, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        UnsupportedModelError,
        "'yarn'",
    ),
    "rope_type of another architecture": (
        lambda f: edit_json(f, rope_scaling={"rope_type": "linear", "factor": 4.0}),
        UnsupportedModelError,
        "rope_type is 'linear'",
    ),
    "wrong number of LongRoPE factors": (
        lambda f: edit_json(f, rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}),
        ModelFileError,
        "short_factor has 1 positive numbers, expected a list of 8",
    ),
    "missing tensor": (lambda f: remove_tensor(f, NORM), ModelFileError, f"no tensor '{NORM}'"),
    "unexpected tensor": (
        lambda f: add_tensor(f, "model.layers.0.self_attn.qkv_proj.bias", "F32", np.zeros(128, np.float32)),
        UnsupportedModelError,
        "qkv_proj.bias' has no GGUF counterpart",
    ),
    "one layer more than in config.json": (
        lambda f: edit_json(f, num_hidden_layers=1),
        UnsupportedModelError,
        "layers.1",
    ),
    "integers": (
        lambda f: add_tensor(f, "lm_head.weight", "I8", np.zeros((1, 1), np.int8)),
        UnsupportedModelError,
        "'lm_head.weight' is I8",
    ),
    "missing shard": (delete_shard, ModelNotFoundError, "has no model-00002-of-00002.safetensors"),
    "index points outside the folder": (list_shard_outside_folder, ModelFileError, "weight_map is corrupt"),
    "no index": (delete_index, ModelNotFoundError, "which lists the shards"),
    "pickled weights": (rename_to_pickle, ModelNotFoundError, "save the model as safetensors first"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ModelNotFoundError, "neither tokenizer.json"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_folder_is_refused(tmp_path: Path, case: str) -> None:
    make_invalid, error, message = INVALID[case]
    folder = write_folder(tmp_path / "model")
    make_invalid(folder)
    with pytest.raises(error) as caught:
        convert(folder, tmp_path / "m.gguf")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


ODD_VALUES = (None, True, -1, 1.5, 2**70, float("nan"), "x", [], [1, 2], {"type": "longrope"})
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("config.json", None),
        ("config.json", "rope_scaling"),
        ("tokenizer.json", None),
        ("tokenizer.json", "model"),
        ("tokenizer_config.json", None),
        ("generation_config.json", None),
    ],
)
def test_odd_json_values_give_a_file_or_an_error(tmp_path: Path, file: str, section: str | None) -> None:
    """Each key set to each odd value either converts or raises a PhiError with a one-line message."""
    folder = write_folder(
        tmp_path / "model",
        rope_scaling=LONGROPE,
        sliding_window=20,
        hidden_act="silu",
        original_max_position_embeddings=64,
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    original = json.loads((folder / file).read_text(encoding="utf-8"))
    refused = 0
    for key in original[section] if section else original:
        for odd in ODD_VALUES:
            changed = json.loads(json.dumps(original))
            (changed[section] if section else changed)[key] = odd
            (folder / file).write_text(json.dumps(changed), encoding="utf-8")
            try:
                convert(folder, tmp_path / "m.gguf", force=True)
            except PhiError as error:
                assert "\n" not in str(error), (key, odd)
                refused += 1
    assert refused or file in ("generation_config.json", "tokenizer_config.json")  # whose keys are all optional


def test_more_tokens_than_embedding_rows(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", vocab_size=700)
    with pytest.raises(ModelFileError, match="expected 0 to 699"):
        convert(folder, tmp_path / "m.gguf")


def test_values_beyond_f16_range(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    tensors = random_weights("Phi3", json.loads((folder / "config.json").read_text()), "F32")
    tensors["lm_head.weight"][1][7, 7] = 1e6
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(UnsupportedModelError, match="beyond the range of F16"):
        convert(folder, tmp_path / "m.gguf", outtype="f16")
    assert not list(tmp_path.glob("m.gguf*"))
    convert(folder, tmp_path / "m.gguf", outtype="bf16")


def test_stored_copy_of_tied_embedding_is_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tie_word_embeddings=True)
    n_vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    add_tensor(folder, "lm_head.weight", "F32", np.zeros((n_vocab, 64), np.float32))
    _, tensors = read(convert(folder, tmp_path / "m.gguf"))
    assert "output.weight" not in tensors


def test_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    output = tmp_path / "m.gguf"
    output.write_bytes(b"existing")
    with pytest.raises(OptionError, match="already exists: use --force to replace it"):
        convert(folder, output)
    assert output.read_bytes() == b"existing"
    convert(folder, output, force=True)
    assert output.read_bytes()[:4] == b"GGUF"
    with pytest.raises(OptionError, match="is a folder"):
        convert(folder, tmp_path, force=True)


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="its disk has 0.0 GB free"):
        convert(folder, tmp_path / "m.gguf")


def test_output_folder_not_writable(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        convert(folder, tmp_path / "file" / "m.gguf")


def test_interrupt_leaves_no_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")

    def interrupt(done: int, total: int) -> None:
        assert 0 < done <= total
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "m.gguf", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_source_truncated_during_conversion(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    file = folder / "model.safetensors"

    def shrink(done: int, total: int) -> None:
        if file.stat().st_size > 100_000:
            with file.open("r+b") as opened:
                opened.truncate(100_000)

    with pytest.raises(ModelFileError, match="ends inside tensor"):
        convert(folder, tmp_path / "m.gguf", progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_convert_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model", dtype="BF16")
    monkeypatch.chdir(tmp_path)
    done = run_cli("convert", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "model-bf16.gguf\n", "")
    again = run_cli("convert", folder)
    assert again.returncode == 2
    assert again.stderr == "phi-c: error: model-bf16.gguf already exists: use --force to replace it\n"
    assert run_cli("convert", folder, "--force", "--quiet").returncode == 0
    assert run_cli("convert", folder, "--outtype", "q8_0").returncode == 2
    missing = run_cli("convert", tmp_path / "missing", "m.gguf")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="the test needs sparse files and the peak memory of a Unix process")
def test_peak_memory_is_below_the_model_size(tmp_path: Path) -> None:
    """A 250 MB model, mostly one matrix, is converted to 500 MB with a peak RSS below 200 MB, Python included."""
    import subprocess

    folder = write_folder(tmp_path / "model", dtype="BF16", hidden_size=1024, num_attention_heads=16)
    settings = json.loads((folder / "config.json").read_text())
    tensors = random_weights("Phi3", settings | {"vocab_size": 1}, "BF16")
    n_rows = 120_000
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        del tensors[name]
    file_path = write_safetensors(folder / "model.safetensors", tensors)
    content = file_path.read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + n_header]), content[8 + n_header :]
    n_bytes = n_rows * 1024 * 2
    header["model.embed_tokens.weight"] = {
        "dtype": "BF16",
        "shape": [n_rows, 1024],
        "data_offsets": [len(data), len(data) + n_bytes],
    }
    text = json.dumps(header).encode()
    with file_path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        file.truncate(file.tell() + n_bytes)
    edit_json(folder, vocab_size=n_rows, tie_word_embeddings=True)
    program = (
        "import sys; from phi_c import machine; from phi_c.convert.run import convert\n"
        "convert(sys.argv[1], sys.argv[2], outtype='f32'); print(machine.peak_rss())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "m.gguf")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert (tmp_path / "m.gguf").stat().st_size > 490_000_000
    assert int(done.stdout) < 200_000_000
    (tmp_path / "m.gguf").unlink()
