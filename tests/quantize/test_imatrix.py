"""Importance matrix files: llama.cpp's GGUF and .dat formats, our own files, merging and corrupt files."""

import os
import stat
import struct
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gguf
from phi_c.errors import ModelFileError, ModelNotFoundError, OutputError, PhiError
from phi_c.gguf import writer
from phi_c.quantize.imatrix import Entry, Imatrix, load_imatrix, read_imatrix
from tiny_gguf import write_and_close, write_tiny

RNG = np.random.default_rng(0)
PLAIN = "blk.0.attn_q.weight"
EXPERTS = "blk.0.ffn_up_exps.weight"


class LlamaCppWriter(gguf.GGUFWriter):
    """Omits general.architecture, as llama.cpp does."""

    def add_architecture(self) -> None:
        pass


def write_llama_cpp(path: Path, tensors: dict[str, npt.NDArray[Any]], keys: dict[str, Any] | None = None) -> Path:
    """Write a file as llama.cpp does. keys: metadata to replace, or to remove if None."""
    metadata = {"general.type": "imatrix", "imatrix.datasets": ["a.txt", "b.txt"]}
    metadata |= {"imatrix.chunk_count": 2, "imatrix.chunk_size": 512, **(keys or {})}
    writer = LlamaCppWriter(path, "")
    for key, value in metadata.items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}
        if value is not None:
            add[type(value)](key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    write_and_close(writer)
    return path


def f32(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def dat_file(entries: list[tuple[bytes, int, npt.NDArray[np.float32]]], tail: bytes = b"") -> bytes:
    raw = struct.pack("<i", len(entries))
    for name, n_calls, values in entries:
        raw += struct.pack("<i", len(name)) + name + struct.pack("<ii", n_calls, len(values))
        raw += values.astype("<f4").tobytes()
    return raw + tail


def sample() -> Imatrix:
    entries = {
        PLAIN: Entry(RNG.uniform(0, 9, (1, 40)), np.array([128])),
        "output.weight": Entry(RNG.uniform(0, 9, (1, 5)), np.array([128])),
        EXPERTS: Entry(RNG.uniform(0, 9, (4, 40)) * [[1], [1], [0], [1]], np.array([100, 28, 0, 128])),
    }
    return Imatrix(64, ["a.txt"], entries)


def one_entry(name: str, sums: npt.NDArray[np.float64], *counts: int) -> Imatrix:
    return Imatrix(entries={name: Entry(sums, np.array(counts))})


def test_llama_cpp_file(tmp_path: Path) -> None:
    sums, expert_sums = f32(512, 1024, 0), RNG.uniform(0, 9, (4, 3)).astype(np.float32)
    tensors = {
        PLAIN + ".in_sum2": sums,
        PLAIN + ".counts": f32(1024),
        EXPERTS + ".in_sum2": expert_sums,
        EXPERTS + ".counts": f32(10, 0, 3, 1)[:, None],
        PLAIN + ".in_sum": -sums,  # newer files also have sums
    }
    means = read_imatrix(write_llama_cpp(tmp_path / "i.gguf", tensors))
    assert set(means) == {PLAIN, EXPERTS}
    assert means[PLAIN].dtype == np.float32
    assert means[PLAIN].tolist() == [[0.5, 1, 0]]
    expected = expert_sums / f32(10, 1, 3, 1)[:, None]
    expected[1] = 1  # an expert without tokens has ones, as in llama.cpp
    np.testing.assert_allclose(means[EXPERTS], expected, rtol=1e-6)
    imatrix = load_imatrix(tmp_path / "i.gguf")
    assert (imatrix.datasets, imatrix.chunk_size, imatrix.n_chunks) == (["a.txt", "b.txt"], 512, 2)


def test_one_count_for_all_experts(tmp_path: Path) -> None:
    tensors = {EXPERTS + ".in_sum2": np.full((2, 3), 8, np.float32), EXPERTS + ".counts": f32(4)}
    assert read_imatrix(write_llama_cpp(tmp_path / "i.gguf", tensors))[EXPERTS].tolist() == [[2, 2, 2]] * 2


def test_save_and_load(tmp_path: Path) -> None:
    imatrix = sample()
    imatrix.save(tmp_path / "i.gguf")
    loaded = load_imatrix(tmp_path / "i.gguf")
    assert (loaded.datasets, loaded.chunk_size, loaded.n_chunks) == (["a.txt"], 64, 2)
    assert set(loaded.entries) == set(imatrix.entries)
    for name, entry in imatrix.entries.items():
        assert np.array_equal(loaded.entries[name].sums, entry.sums.astype(np.float32))
        assert np.array_equal(loaded.entries[name].counts, entry.counts)
    loaded.save(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "i.gguf").read_bytes()


def test_saved_file_has_the_layout_of_llama_cpp(tmp_path: Path) -> None:
    imatrix = sample()
    imatrix.save(tmp_path / "i.gguf")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    expected = {"general.type": "imatrix", "imatrix.datasets": ["a.txt"]}
    assert fields == expected | {"imatrix.chunk_count": 2, "imatrix.chunk_size": 64}
    types = [reader.fields[f"imatrix.chunk_{key}"].types for key in ("count", "size")]
    assert types == [[gguf.GGUFValueType.UINT32]] * 2  # llama.cpp rejects other types
    tensors = {t.name: (t.shape.tolist(), t.data) for t in reader.tensors}
    assert list(tensors) == [n + s for n in sorted(imatrix.entries) for s in (".in_sum2", ".counts")]
    assert tensors[PLAIN + ".in_sum2"][0] == [40]  # row length first, axes of size 1 removed
    assert tensors[PLAIN + ".counts"][0] == [1]
    assert tensors[EXPERTS + ".in_sum2"][0] == [40, 4]
    assert tensors[EXPERTS + ".counts"][0] == [1, 4]
    assert np.array_equal(tensors[EXPERTS + ".in_sum2"][1], imatrix.entries[EXPERTS].sums.astype(np.float32))


def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imatrix = sample()
    imatrix.save(tmp_path / "i.gguf")
    before = (tmp_path / "i.gguf").read_bytes()

    def interrupted(file: IO[bytes], *arguments: Any) -> None:
        file.write(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imatrix.save(tmp_path / "i.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]
    assert (tmp_path / "i.gguf").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_saved_file_follows_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        sample().save(tmp_path / "i.gguf")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "i.gguf").stat().st_mode) == 0o640


def test_save_to_a_folder_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, Path(tmp_path.anchor)):
        with pytest.raises(OutputError):
            sample().save(folder)
    assert not list(tmp_path.parent.glob("*.part"))


@pytest.mark.parametrize("tail", [b"", struct.pack("<i", 3), struct.pack("<ii", 3, 5) + b"a.txt"])
def test_dat_file(tmp_path: Path, tail: bytes) -> None:
    values = RNG.uniform(0, 9, 7).astype(np.float32)
    (tmp_path / "i.dat").write_bytes(dat_file([(b"blk.0.a.weight", 3, values), (b"b", 0, values)], tail))
    means = read_imatrix(tmp_path / "i.dat")
    assert np.array_equal(means["blk.0.a.weight"], [values / np.float32(3)])
    assert np.array_equal(means["b"], [values])  # n_calls 0: the values are means, as in llama.cpp
    imatrix = load_imatrix(tmp_path / "i.dat", 128)
    assert imatrix.n_chunks == 3
    assert imatrix.entries["blk.0.a.weight"].counts.tolist() == [384]
    assert imatrix.datasets == (["a.txt"] if len(tail) > 4 else [])


def test_merge() -> None:
    a, b = sample(), sample()
    total = Imatrix(64)
    total.merge(a)
    total.merge(b)
    assert total.datasets == ["a.txt", "a.txt"]
    assert total.n_chunks == 4
    for name in a.entries:
        assert np.array_equal(total.entries[name].sums, a.entries[name].sums + b.entries[name].sums)
        assert np.array_equal(total.entries[name].counts, a.entries[name].counts + b.entries[name].counts)
    assert a.entries[PLAIN].counts.tolist() == [128]  # unchanged
    before = dict(total.entries)
    other = one_entry("blk.0.new.weight", np.ones((1, 2)), 1)
    other.merge(one_entry(PLAIN, np.ones((1, 41)), 1))
    with pytest.raises(ValueError, match="blk.0.attn_q.weight has 41 columns, expected 40"):
        total.merge(other)
    assert total.entries == before  # unchanged by the failed merge


def test_merge_of_experts_from_a_dat_file(tmp_path: Path) -> None:
    flat = np.arange(12, dtype=np.float32)
    (tmp_path / "i.dat").write_bytes(dat_file([(EXPERTS.encode(), 2, flat)]))
    imatrix = load_imatrix(tmp_path / "i.dat", 10)
    per_expert = one_entry(EXPERTS, np.ones((4, 3)), 1, 2, 3, 4)
    for first, second in ((imatrix, per_expert), (per_expert, imatrix)):
        total = Imatrix()
        total.merge(first)
        total.merge(second)
        entry = total.entries[EXPERTS]
        assert np.array_equal(entry.sums, flat.reshape(4, 3) * 10 + 1)
        assert entry.counts.tolist() == [21, 22, 23, 24]
    with pytest.raises(ValueError, match="2 experts, expected 4"):
        total.merge(one_entry(EXPERTS, np.ones((2, 6)), 1, 1))
    with pytest.raises(ValueError, match="5 experts, expected 1"):
        imatrix.merge(one_entry(EXPERTS, np.ones((1, 12)), 1, 1, 1, 1, 1))


SUMS, COUNTS = {PLAIN + ".in_sum2": f32(1, 2)}, {PLAIN + ".counts": f32(1)}
CORRUPT = {
    "no counts": (SUMS, {}, "no tensor 'blk.0.attn_q.weight.counts'"),
    "no sums": (COUNTS, {}, "expected an importance matrix, found no tensor NAME.in_sum2"),
    "a model": (SUMS | COUNTS, {"general.type": "model"}, "expected an importance matrix, found a model"),
    "not a number": ({PLAIN + ".in_sum2": f32(1, np.nan)} | COUNTS, {}, "holds nan, expected sums of squares"),
    "infinite": ({PLAIN + ".in_sum2": f32(1, np.inf)} | COUNTS, {}, "holds inf, expected sums of squares"),
    "negative": ({PLAIN + ".in_sum2": f32(1, -2)} | COUNTS, {}, "holds -2.0, expected sums of squares"),
    "a negative count": (SUMS | {PLAIN + ".counts": f32(-1)}, {}, "holds -1.0, expected counts"),
    "a count that is not a number": (SUMS | {PLAIN + ".counts": f32(np.nan)}, {}, "holds nan, expected counts"),
    "counts that do not divide": (SUMS | {PLAIN + ".counts": f32(1, 1, 1)}, {}, "sums of shape (2,) and 3 counts"),
    "half precision": ({PLAIN + ".in_sum2": np.ones(2, np.float16)} | COUNTS, {}, "is of type F16, expected F32"),
    "chunk size 0": (SUMS | COUNTS, {"imatrix.chunk_size": 0}, "chunk_size is 0, expected a positive integer"),
    "datasets is not an array": (
        SUMS | COUNTS,
        {"imatrix.datasets": "a.txt"},
        "datasets is 'a.txt', expected an array of strings",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_reported_in_one_line(tmp_path: Path, case: str) -> None:
    tensors, keys, message = CORRUPT[case]
    with pytest.raises(ModelFileError) as caught:
        read_imatrix(write_llama_cpp(tmp_path / "i.gguf", tensors, keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_without_metadata(tmp_path: Path) -> None:
    keys = dict.fromkeys(("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"))
    assert read_imatrix(write_llama_cpp(tmp_path / "i.gguf", SUMS | COUNTS, keys))[PLAIN].tolist() == [[1, 2]]


def test_other_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="found no tensor"):
        read_imatrix(write_tiny(tmp_path / "m.gguf"))
    with pytest.raises(ModelNotFoundError):
        read_imatrix(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="found a folder"):
        read_imatrix(tmp_path)
    for raw in (b"", b"hello, world", bytes(64)):
        (tmp_path / "i.gguf").write_bytes(raw)
        with pytest.raises(ModelFileError):
            read_imatrix(tmp_path / "i.gguf")


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    whole = tmp_path / "i.gguf"
    write_llama_cpp(whole, SUMS | COUNTS)
    files = [whole.read_bytes(), dat_file([(b"first", 1, f32(1, 2)), (b"second", 1, f32(3))])]
    for raw in files:
        # Without trailing zeros, which may be padding.
        for n in range(len(raw.rstrip(b"\0"))):
            whole.write_bytes(raw[:n])
            with pytest.raises(ModelFileError):
                read_imatrix(whole)
    for tail in (b"\1", struct.pack("<i", 3) + b"\1", struct.pack("<ii", 3, 5) + b"a.tx"):
        whole.write_bytes(files[1] + tail)
        with pytest.raises(ModelFileError):
            read_imatrix(whole)


@given(st.data())
def test_flipped_bits_raise_only_phi_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "imatrix"
    folder.mkdir(exist_ok=True)
    if not (folder / "i.gguf").exists():
        write_llama_cpp(folder / "i.gguf", SUMS | COUNTS)
    files = [(folder / "i.gguf").read_bytes(), dat_file([(b"first", 1, f32(1, 2)), (b"second", 1, f32(3))])]
    raw = bytearray(data.draw(st.sampled_from(files)))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "corrupt").write_bytes(raw)
    try:
        means = read_imatrix(folder / "corrupt")
    except PhiError as error:
        assert "\n" not in str(error)
    else:
        assert all(np.isfinite(mean).all() and (mean >= 0).all() for mean in means.values())
