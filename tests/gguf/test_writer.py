"""The writer: files that our reader and the gguf package read, exact sizes, streaming."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gguf as reference
from phi_c.gguf import writer
from phi_c.gguf.reader import GGUFFile
from phi_c.gguf.writer import Plan, TensorSpec

METADATA = {
    "general.architecture": writer.string("phi3"),
    "a.u32": writer.u32(2**32 - 1),
    "a.f32": writer.f32(1e-5),
    "a.true": writer.boolean(True),
    "a.false": writer.boolean(False),
    "a.string": writer.string("na\u00efve \u732b"),
    "a.strings": writer.strings(["a", "", "\u00fc"]),
    "a.i32s": writer.i32_array([-1, 2, 3]),
    "a.f32s": writer.f32_array([0.5, -1e-3]),
    "a.empty": writer.strings([]),
}
TENSORS = (
    TensorSpec("m.weight", (3, 64), "Q8_0"),
    TensorSpec("e.weight", (2, 3, 4), "F32"),
    TensorSpec("n", (5,), "F16"),
)


def random_data(plan: Plan) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [rng.bytes(spec.n_bytes) for spec in plan.tensors]


def write(path: Path, plan: Plan, data: list[bytes]) -> None:
    with path.open("wb") as file:
        writer.write(file, plan, ([chunk] for chunk in data))


def test_our_reader_returns_what_was_written(tmp_path: Path) -> None:
    plan = Plan(METADATA, TENSORS)
    data = random_data(plan)
    write(tmp_path / "m.gguf", plan, data)
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert (file.version, file.alignment, file.data_offset) == (3, 32, len(plan.header))
        assert file.n_bytes == plan.n_bytes == (tmp_path / "m.gguf").stat().st_size
        assert file.raw_metadata() == METADATA
        assert {name: (info.shape, info.type_name) for name, info in file.tensors.items()} == {
            spec.name: (spec.shape, spec.type_name) for spec in TENSORS
        }
        assert [file.data(name).tobytes() for name in file.tensors] == data


def test_the_gguf_package_reads_the_file(tmp_path: Path) -> None:
    plan = Plan(METADATA, TENSORS)
    data = random_data(plan)
    write(tmp_path / "m.gguf", plan, data)
    reader = reference.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields.pop("a.f32") == pytest.approx(1e-5)
    assert fields.pop("a.f32s") == pytest.approx([0.5, -1e-3])
    assert fields == {
        "general.architecture": "phi3",
        "a.u32": 2**32 - 1,
        "a.true": True,
        "a.false": False,
        "a.string": "na\u00efve \u732b",
        "a.strings": ["a", "", "\u00fc"],
        "a.i32s": [-1, 2, 3],
        "a.empty": [],
    }
    assert [(t.name, t.tensor_type.name) for t in reader.tensors] == [(spec.name, spec.type_name) for spec in TENSORS]
    assert [t.data.tobytes() for t in reader.tensors] == data
    assert [tuple(reversed(t.shape.tolist())) for t in reader.tensors] == [spec.shape for spec in TENSORS]


def test_tensor_data_is_aligned(tmp_path: Path) -> None:
    plan = Plan({"general.alignment": writer.u32(64)}, TENSORS, 64)
    data = random_data(plan)
    write(tmp_path / "m.gguf", plan, data)
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.alignment == 64 and file.n_bytes == plan.n_bytes
        assert [info.offset % 64 for info in file.tensors.values()] == [0, 0, 0]
        assert [file.data(name).tobytes() for name in file.tensors] == data


def test_chunks_are_consumed_as_they_are_written() -> None:
    file = io.BytesIO()
    plan = Plan({}, (TensorSpec("a", (4, 8), "F32"), TensorSpec("b", (3,), "F32")))
    seen, calls = [], []

    def chunks(n_chunks: int, n_bytes: int) -> Iterator[memoryview]:
        for i in range(n_chunks):
            seen.append(file.tell() - len(plan.header))
            yield np.full(n_bytes // 4, i, "<f4").data

    data = (chunks(*arguments) for arguments in ((4, 32), (1, 12)))
    writer.write(file, plan, data, lambda n_written, n_total: calls.append((n_written, n_total)))
    assert seen == [0, 32, 64, 96, 128]
    n_header = len(plan.header)
    assert calls == [(n_header + n, n_header + 160) for n in (32, 64, 96, 128, 140, 160)]
    expected = np.repeat(np.arange(4, dtype="<f4"), 8).tobytes()
    assert file.getvalue() == plan.header + expected + bytes(32)


@pytest.mark.parametrize("n_bytes", [0, 12, 20])
def test_a_tensor_with_the_wrong_number_of_bytes_is_an_error(n_bytes: int) -> None:
    plan = Plan({}, (TensorSpec("a", (4,), "F32"),))
    with pytest.raises(ValueError, match=f"a has {n_bytes} bytes of data, expected 16"):
        writer.write(io.BytesIO(), plan, [[bytes(n_bytes)]])


@pytest.mark.parametrize("n_tensors", [0, 2])
def test_a_wrong_number_of_tensors_is_an_error(n_tensors: int) -> None:
    plan = Plan({}, (TensorSpec("a", (4,), "F32"),))
    with pytest.raises(ValueError, match="zip"):
        writer.write(io.BytesIO(), plan, [[bytes(16)]] * n_tensors)


def test_a_shape_that_does_not_fit_the_type_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a has rows of 33 elements, expected a multiple of 32 \(Q8_0\)"):
        TensorSpec("a", (4, 33), "Q8_0")
    for shape in ((), (1,) * 5):
        with pytest.raises(ValueError, match=f"a has {len(shape)} dimensions, expected 1 to 4"):
            TensorSpec("a", shape, "F32")


def test_file_names_that_are_not_utf8_can_be_written() -> None:
    assert writer.string("a\udc80") == writer.string("a?")
