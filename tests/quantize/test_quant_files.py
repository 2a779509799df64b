"""Quantised files: tensors, metadata, importance, errors and memory use."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType
from weights import TYPES, error_of, quantized, values_of

import gguf
import phi_c
import raw_gguf as raw
from phi_c.errors import ModelFileError, ModelNotFoundError, OptionError, OutputError, UnsupportedModelError
from phi_c.gguf.reader import GGUFFile
from phi_c.quantize import run
from phi_c.quantize.mix import FILE_TYPES
from phi_c.quantize.plan import Importance
from tiny_gguf import write_and_close, write_tiny

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", "F32", n_layers=8, seed=3)


def read(path: Path) -> dict[str, tuple[str, Floats]]:
    """Return type and values of each tensor, read by the gguf package."""
    return {
        t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def write(path: Path, tensors: dict[str, tuple[str, Floats]]) -> Path:
    """Write a GGUF file. tensors: (type, values) by name."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (type_name, values) in tensors.items():
        data = values if type_name == "F32" else gguf.quants.quantize(values, GGMLQuantizationType[type_name])
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[type_name])
    write_and_close(writer)
    return path


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q3_K_M", "Q4_0", "F16", "BF16"])
def test_tensors_have_the_types_of_the_mix_and_quantised_data(tiny: Path, tmp_path: Path, file_type: str) -> None:
    result = phi_c.quantize_model(tiny, tmp_path / "out.gguf", file_type, n_threads=2)
    before, after = read(tiny), read(tmp_path / "out.gguf")
    assert list(before) == list(after)
    assert result.path.stat().st_size == result.plan.n_bytes
    for step in result.plan.steps:
        name = step.source.name
        type_name, values = after[name]
        assert type_name == step.target_type
        source = before[name][1]
        if type_name == "F32":
            np.testing.assert_array_equal(values, source)
        else:
            np.testing.assert_array_equal(values, values_of(type_name, quantized(type_name, source)))
    with GGUFFile(result.path) as file:
        n_bytes = sum(info.n_bytes for info in file.tensors.values())
        n_weights = sum(np.prod(info.shape) for info in file.tensors.values())
    assert result.plan.bits_per_weight == pytest.approx(8 * n_bytes / n_weights)


def test_every_file_type_runs(tiny: Path, tmp_path: Path) -> None:
    sizes = {}
    for file_type in FILE_TYPES:
        path = phi_c.quantize_model(tiny, tmp_path / f"{file_type}.gguf", file_type.lower()).path
        sizes[file_type] = path.stat().st_size
        with phi_c.load(path, n_ctx=64) as llm:
            assert np.isfinite(llm.logits([1, 5, 9])).all()
    assert sizes["F32"] > sizes["F16"] > sizes["Q8_0"] > sizes["Q6_K"] > sizes["Q5_K_M"] > sizes["Q4_K_M"]
    assert sizes["Q4_K_M"] > sizes["Q4_K_S"] > sizes["Q3_K_L"] > sizes["Q3_K_M"] > sizes["Q3_K_S"] > sizes["Q2_K"]


@pytest.mark.parametrize("source_type", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_source_types(tmp_path: Path, source_type: str) -> None:
    source = write(tmp_path / "in.gguf", {"blk.0.ffn_up.weight": (source_type, random(24, 512))})
    phi_c.quantize_model(source, tmp_path / "out.gguf", "Q4_K_M", allow_requantize=True)
    expected = values_of("Q4_K", quantized("Q4_K", read(source)["blk.0.ffn_up.weight"][1]))
    np.testing.assert_array_equal(read(tmp_path / "out.gguf")["blk.0.ffn_up.weight"][1], expected)


def test_tensors_that_have_the_target_type_are_copied(tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_up.weight": ("Q8_0", random(24, 512)), "blk.0.ffn_gate.weight": ("F32", random(24, 512))}
    source = write(tmp_path / "in.gguf", tensors)
    result = phi_c.quantize_model(source, tmp_path / "out.gguf", "Q8_0")
    assert [step.is_copied for step in result.plan.steps] == [True, False]
    with GGUFFile(source) as before, GGUFFile(result.path) as after:
        assert before.data("blk.0.ffn_up.weight").tobytes() == after.data("blk.0.ffn_up.weight").tobytes()


def test_requantising_needs_permission(tmp_path: Path) -> None:
    source = write(tmp_path / "in.gguf", {"blk.0.ffn_up.weight": ("Q8_0", random(24, 512))})
    with pytest.raises(
        OptionError, match=r"'blk.0.ffn_up.weight' is already quantised to Q8_0, .* \(--allow-requantize\)"
    ):
        phi_c.quantize_model(source, tmp_path / "out.gguf", "Q4_0")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("n_weights", [1, 777, 4096])
def test_chunks_and_threads_do_not_change_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_weights: int
) -> None:
    tiny = write_tiny(tmp_path / "tiny.gguf", "phi3", "F16", n_layers=1)
    whole = phi_c.quantize_model(tiny, tmp_path / "whole.gguf", "Q5_K_M", n_threads=1).path.read_bytes()
    monkeypatch.setattr(run, "_CHUNK_WEIGHTS", n_weights)
    assert phi_c.quantize_model(tiny, tmp_path / "chunks.gguf", "Q5_K_M", n_threads=3).path.read_bytes() == whole


def test_metadata_is_copied_byte_for_byte(tmp_path: Path) -> None:
    keys = {
        "general.architecture": (raw.STRING, "llama"),
        "general.file_type": (raw.I32, 1),
        "small": (raw.U8, 200),
        "short": (raw.I16, -3),
        "long": (raw.I64, -(2**40)),
        "double": (raw.F64, 0.1),
        "yes": (raw.BOOL, True),
        "text": (raw.STRING, "a\nb \u00e9"),
        "halves": (raw.ARRAY, (raw.F32, [0.1, 0.2])),
        "counts": (raw.ARRAY, (raw.U64, [2**63, 1])),
        "signs": (raw.ARRAY, (raw.I8, [-1, 1])),
        "words": (raw.ARRAY, (raw.STRING, ["a", "", "\u4e16"])),
        "nested": (raw.ARRAY, (raw.ARRAY, [(raw.I32, [1, -2]), (raw.STRING, ["x"])])),
        "empty": (raw.ARRAY, (raw.I32, [])),
        "general.alignment": (raw.U32, 64),
    }
    entries = [raw.key(name, *value) for name, value in keys.items()]
    values = random(4, 32)
    tensors = [raw.tensor("blk.0.ffn_up.weight", (32, 4)), raw.tensor("a_norm.weight", (3,), offset=512)]
    source = tmp_path / "in.gguf"
    source.write_bytes(raw.gguf(entries, tensors, values.tobytes() + random(3).tobytes(), alignment=64, version=2))
    target = phi_c.quantize_model(source, tmp_path / "out.gguf", "Q8_0").path
    keys["general.file_type"] = (raw.U32, 7)
    keys["general.quantization_version"] = (raw.U32, 2)
    expected = b"".join(raw.key(name, *value) for name, value in keys.items())
    assert target.read_bytes()[24:].startswith(expected)
    with GGUFFile(target) as file:
        assert (file.version, file.alignment) == (3, 64)
        assert [info.offset % 64 for info in file.tensors.values()] == [0, 0]
        np.testing.assert_array_equal(file.data("a_norm.weight").view(np.float32), random(3))


def test_each_expert_has_its_own_importance(tmp_path: Path) -> None:
    values = random(3, 8, 512)
    name = "blk.0.ffn_up_exps.weight"
    source = write(tmp_path / "in.gguf", {name: ("F32", values)})
    mean_squares = np.random.default_rng(1).lognormal(0, 2, (3, 512)).astype(np.float32)
    for stored in (mean_squares, mean_squares.reshape(1, -1)):
        importance = Importance({name: stored}, "some/imatrix.gguf", "wiki.txt", 17)
        result = phi_c.quantize_model(source, tmp_path / "out.gguf", "Q4_K_S", imatrix=importance, force=True)
        values_in_file = read(result.path)[name][1]
        for expert in range(3):
            expected = values_of("Q4_K", quantized("Q4_K", values[expert], mean_squares[expert]))
            np.testing.assert_array_equal(values_in_file[expert], expected)
    assert result.n_without_importance == 0
    with GGUFFile(result.path) as file:
        added = {key: value for key, value in file.metadata.items() if key.startswith("quantize.")}
    assert added == {
        "quantize.imatrix.file": "some/imatrix.gguf",
        "quantize.imatrix.dataset": "wiki.txt",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 17,
    }


def test_importance_from_an_imatrix_file(tiny: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_down.weight"
    mean_squares = np.random.default_rng(1).lognormal(0, 2, 512).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor(f"{name}.in_sum2", mean_squares[None] * 1024)
    writer.add_tensor(f"{name}.counts", np.full((1, 1), 1024, np.float32))
    write_and_close(writer)
    result = phi_c.quantize_model(tiny, tmp_path / "out.gguf", "Q6_K", imatrix=tmp_path / "imatrix.gguf")
    rows = read(tiny)[name][1]
    np.testing.assert_array_equal(read(result.path)[name][1], values_of("Q6_K", quantized("Q6_K", rows, mean_squares)))
    n_matrices = sum(step.target_type == "Q6_K" for step in result.plan.steps)
    assert result.n_without_importance == n_matrices - 2  # the embedding is not counted, it has no input


@pytest.mark.parametrize(
    ("mean_squares", "message"),
    [
        (np.ones((1, 500), np.float32), r"has 500 values for 'blk.0.ffn_down.weight', expected 512"),
        (np.full((1, 512), np.nan, np.float32), "negative or non-finite values for 'blk.0.ffn_down.weight'"),
        (np.full((1, 512), -1, np.float32), "negative or non-finite values for 'blk.0.ffn_down.weight'"),
    ],
)
def test_bad_importance(tiny: Path, tmp_path: Path, mean_squares: Floats, message: str) -> None:
    importance = Importance({"blk.0.ffn_down.weight": mean_squares})
    with pytest.raises(ModelFileError, match=message):
        phi_c.quantize_model(tiny, tmp_path / "out.gguf", imatrix=importance)
    assert names(tmp_path) == []


def test_importance_of_another_model(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="belongs to another model"):
        phi_c.quantize_model(tiny, tmp_path / "out.gguf", imatrix=Importance({"x.weight": np.ones((1, 8), np.float32)}))
    # Values for the embedding are the inputs of a tied output matrix; a different size is ignored.
    other_size = {
        "token_embd.weight": np.ones((1, 8), np.float32),
        "blk.0.ffn_down.weight": np.ones((1, 512), np.float32),
    }
    assert phi_c.quantize_model(tiny, tmp_path / "out.gguf", imatrix=Importance(other_size)).path.exists()


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_name: str, value: float
) -> None:
    monkeypatch.setattr(run, "_CHUNK_WEIGHTS", 512)
    values = random(24, 512)
    values[17, 300] = value
    data = values.astype(np.float16) if type_name == "F16" else values
    if type_name == "BF16":
        data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", random(24, 512))
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=GGMLQuantizationType[type_name])
    write_and_close(writer)
    with pytest.raises(ModelFileError, match=rf"'blk.0.ffn_down.weight' has {value} in row 17, column 300"):
        phi_c.quantize_model(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q6_K")
    assert names(tmp_path) == ["in.gguf"]


def test_non_finite_values_of_a_copied_tensor_are_reported(tmp_path: Path) -> None:
    norm = np.array([1, np.nan, 1], np.float32)
    tensors = {"blk.0.ffn_up.weight": ("F32", random(4, 32)), "output_norm.weight": ("F32", norm)}
    source = write(tmp_path / "in.gguf", tensors)
    with pytest.raises(ModelFileError, match="'output_norm.weight' has nan"):
        phi_c.quantize_model(source, tmp_path / "out.gguf", "Q8_0")


def test_bad_targets(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"out.gguf already exists; replace it with force \(--force\)"):
        phi_c.quantize_model(tiny, target)
    assert target.read_bytes() == b"old"
    with pytest.raises(OutputError, match="is the source file"):
        phi_c.quantize_model(tiny, tiny, force=True)
    with pytest.raises(OutputError, match="is a folder"):
        phi_c.quantize_model(tiny, tmp_path, force=True)
    assert phi_c.quantize_model(tiny, target, force=True).path.read_bytes()[:4] == b"GGUF"
    assert names(tmp_path) == ["out.gguf"]


def test_a_full_disk_is_reported_before_writing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = run.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs 0.00 GB, its disk has 0.00 GB free"):
        phi_c.quantize_model(tiny, tmp_path / "out.gguf")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_keeps_the_existing_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    quantize_rows, n_calls = run.quantize_rows, 0

    def fail_at_third_call(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise error
        return quantize_rows(*arguments)

    monkeypatch.setattr(run, "quantize_rows", fail_at_third_call)
    with pytest.raises(error):
        phi_c.quantize_model(tiny, target, "Q8_0", force=True)
    assert target.read_bytes() == b"old" and names(tmp_path) == ["out.gguf"]


def test_bad_sources(tmp_path: Path, phi3_vocab: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        phi_c.quantize_model(tmp_path / "none.gguf", tmp_path / "out.gguf")
    with pytest.raises(UnsupportedModelError, match="the file has no weight matrices, expected a model"):
        phi_c.quantize_model(phi3_vocab, tmp_path / "out.gguf")


def test_truncated_sources(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    source = tmp_path / "truncated.gguf"
    for size in (0, 3, 24, 1000, len(whole) // 2, len(whole) - 40):
        source.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            phi_c.quantize_model(source, tmp_path / "out.gguf")
        assert names(tmp_path) == ["truncated.gguf"]


@pytest.mark.parametrize("n_threads", [0, -1, 5000])
def test_bad_threads(tiny: Path, tmp_path: Path, n_threads: int) -> None:
    with pytest.raises(OptionError, match="n_threads"):
        phi_c.quantize_model(tiny, tmp_path / "out.gguf", n_threads=n_threads)


def test_an_unknown_option_is_a_type_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        phi_c.quantize_model(tiny, tmp_path / "out.gguf", imatrx="x")  # type: ignore[call-arg]


def test_importance_lowers_the_weighted_error_of_a_file(tiny: Path, tmp_path: Path) -> None:
    name = "blk.3.ffn_up.weight"
    mean_squares = np.random.default_rng(1).lognormal(0, 2, 256).astype(np.float32)
    rows = read(tiny)[name][1]
    errors = []
    for imatrix in (None, Importance({name: mean_squares[None]})):
        path = phi_c.quantize_model(tiny, tmp_path / "out.gguf", "Q4_K_S", imatrix=imatrix, force=True).path
        with GGUFFile(path) as file:
            errors.append(error_of("Q4_K", file.data(name).reshape(len(rows), -1), rows, mean_squares))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
@pytest.mark.parametrize("type_name", ["F32", "BF16"])
def test_memory_use_does_not_grow_with_the_file(tmp_path: Path, type_name: str) -> None:
    """Quantising 240 MB of weights raises the peak memory of an idle process by less than 100 MB."""
    source = tmp_path / "in.gguf"
    n_rows = 240_000_000 // 2048 // (4 if type_name == "F32" else 2)
    rows = random(n_rows // 64, 2048).astype(np.float32)
    data = rows if type_name == "F32" else (rows.view(np.uint32) >> 16).astype(np.uint16)
    tensor = raw.tensor("blk.0.ffn_up.weight", (2048, n_rows // 64 * 64), TYPES[type_name].type_id)
    with source.open("wb") as file:
        file.write(raw.gguf([raw.key("general.architecture", raw.STRING, "llama")], [tensor]))
        for _ in range(64):
            file.write(data.tobytes())
    program = (
        "import re, sys, phi_c\n"
        "import phi_c.quantize.run\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "phi_c.quantize_model(sys.argv[1], sys.argv[2], 'Q8_0')\n"
        "print(peak() - before)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, source, tmp_path / "out.gguf"], capture_output=True, text=True, check=True
    )
    assert int(process.stdout) * 1024 < 100e6
    assert (tmp_path / "out.gguf").stat().st_size > n_rows * 2048


def test_result_fields(tiny: Path, tmp_path: Path) -> None:
    result = phi_c.quantize_model(tiny, tmp_path / "out.gguf", "Q8_0")
    assert result.seconds > 0 and result.path == tmp_path / "out.gguf"
    assert dataclasses.is_dataclass(result) and result.plan.source_bytes == tiny.stat().st_size
