"""Safetensors files: valid ones are read as the format defines, corrupt ones raise only PhiError."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_files import write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi_c.convert.safetensors_file import MAX_HEADER_BYTES, read_header
from phi_c.convert.values import DTYPES
from phi_c.errors import ModelFileError, PhiError

TENSORS = {
    "a": ("F32", np.arange(12, dtype=np.float32).reshape(3, 4)),
    "b": ("BF16", np.arange(6, dtype=np.uint16).reshape(2, 3)),
    "c": ("F16", np.arange(5, dtype=np.float16)),
    "d": ("I8", np.arange(4, dtype=np.int8)),
}


def read_all(path: Path) -> None:
    for tensor in read_header(path).values():
        if tensor.dtype in DTYPES and tensor.shape:
            tensor.rows(0, tensor.shape[0])


def test_rows_equal_what_was_written(tmp_path: Path) -> None:
    stored = read_header(write_safetensors(tmp_path / "t", TENSORS))
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        name: (dtype, values.shape) for name, (dtype, values) in TENSORS.items()
    }
    assert np.array_equal(stored["a"].rows(1, 3), TENSORS["a"][1][1:])
    assert np.array_equal(stored["b"].rows(0, 2), TENSORS["b"][1])
    assert np.array_equal(stored["c"].rows(2, 4), [[2], [3]])


def test_file_of_the_safetensors_package(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed: the extra `reference`")
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones(3, np.float16)}
    library.save_file(values, tmp_path / "t", metadata={"format": "np"})
    for name, tensor in read_header(tmp_path / "t").items():
        assert np.array_equal(tensor.rows(0, tensor.shape[0]).reshape(tensor.shape), values[name])


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    whole = write_safetensors(tmp_path / "t", TENSORS).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "t").write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            read_all(tmp_path / "t")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_any_header_byte_changed(tmp_path: Path, index: int, byte: int) -> None:
    content = bytearray(write_safetensors(tmp_path / "t", TENSORS).read_bytes())
    content[index % (8 + int.from_bytes(content[:8], "little"))] = byte
    (tmp_path / "t").write_bytes(content)
    try:
        read_all(tmp_path / "t")
    except PhiError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]},
        {"dtype": 5, "shape": [1], "data_offsets": [0, 4]},
    ],
)
def test_corrupt_header_entry(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelFileError, match="x"):
        read_header(tmp_path / "t")


@pytest.mark.parametrize("header", [b"", b"[]", b"nonsense", b"[" * 100_000, b"\xff\xfe"])
def test_corrupt_header(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelFileError):
        read_header(tmp_path / "t")


def test_header_larger_than_the_file(tmp_path: Path) -> None:
    for size in (MAX_HEADER_BYTES + 1, 2**63):
        (tmp_path / "t").write_bytes(size.to_bytes(8, "little") + bytes(100))
        with pytest.raises(ModelFileError, match="not a safetensors file"):
            read_header(tmp_path / "t")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path / "missing")
