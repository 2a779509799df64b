"""The GGUF reader: values, tensors, lifetime of views, and the error message for each kind of corruption."""

import errno
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gguf as reference
from phi_c import errors
from phi_c.gguf import reader
from phi_c.gguf.reader import GGUFFile, TensorInfo, short
from raw_gguf import ARRAY, BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64, gguf, key, tensor
from tiny_gguf import write_and_close

Q8_0 = 8
HUGE = 2**64 - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def open_bytes(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return GGUFFile(path)


class TestRead:
    def test_every_scalar_type(self, path: Path) -> None:
        values = {
            "u8": (U8, 255),
            "i8": (I8, -128),
            "u16": (U16, 65535),
            "i16": (I16, -32768),
            "u32": (U32, 2**32 - 1),
            "i32": (I32, -(2**31)),
            "f32": (F32, 0.5),
            "yes": (BOOL, True),
            "no": (BOOL, False),
            "text": (STRING, "naïve 猫"),
            "empty": (STRING, ""),
            "u64": (U64, HUGE),
            "i64": (I64, -(2**63)),
            "f64": (F64, 1e300),
        }
        with open_bytes(path, gguf([key(name, *value) for name, value in values.items()])) as file:
            assert file.metadata == {name: value for name, (_, value) in values.items()}
            assert [type(file.metadata[name]) for name in ("yes", "u8", "f32")] == [bool, int, float]
            assert (file.version, file.alignment, file.tensors) == (3, 32, {})
            assert file.n_bytes == path.stat().st_size

    def test_arrays(self, path: Path) -> None:
        keys = [
            key("ints", ARRAY, (I32, [-1, 2, 3])),
            key("floats", ARRAY, (F64, [0.25, -1.0])),
            key("bools", ARRAY, (BOOL, [True, False])),
            key("strings", ARRAY, (STRING, ["a", "", "ü"])),
            key("empty", ARRAY, (U8, [])),
            key("no strings", ARRAY, (STRING, [])),
            key("nested", ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"])])),
            key("after", U8, 7),
        ]
        metadata = open_bytes(path, gguf(keys)).metadata
        ints, bools, nested = metadata["ints"], metadata["bools"], metadata["nested"]
        assert isinstance(ints, np.ndarray) and ints.dtype == np.int32 and ints.tolist() == [-1, 2, 3]
        assert isinstance(bools, np.ndarray) and bools.dtype == np.bool_ and bools.tolist() == [True, False]
        assert np.array_equal(np.asarray(metadata["floats"]), [0.25, -1.0])
        assert metadata["strings"] == ["a", "", "ü"]
        assert len(np.asarray(metadata["empty"])) == 0 and metadata["no strings"] == []
        assert isinstance(nested, list) and np.asarray(nested[0]).tolist() == [1, 2] and nested[1] == ["x"]
        assert metadata["after"] == 7
        with pytest.raises(ValueError, match="read-only"):
            ints[0] = 5

    def test_tensors(self, path: Path) -> None:
        data = bytes(range(64)) + bytes(128)
        tensors = [tensor("f", (4, 2)), tensor("q", (32, 2), Q8_0, 32), tensor("v", (1,), 0, 128)]
        file = open_bytes(path, gguf([], tensors, data))
        first = file.data_offset
        assert first % 32 == 0
        assert file.tensors == {
            "f": TensorInfo("f", 0, (2, 4), first, 32),
            "q": TensorInfo("q", Q8_0, (2, 32), first + 32, 68),
            "v": TensorInfo("v", 0, (1,), first + 128, 4),
        }
        view = file.data("q")
        assert view.dtype == np.uint8 and view.shape == (68,)
        assert view.tobytes() == data[32:100]
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1

    def test_version_2(self, path: Path) -> None:
        assert open_bytes(path, gguf([key("a", U8, 1)], version=2)).version == 2

    def test_alignment_from_metadata(self, path: Path) -> None:
        data = gguf([key("general.alignment", U32, 64)], [tensor("a", (1,), 0, 64)], bytes(128), alignment=64)
        file = open_bytes(path, data)
        assert file.alignment == 64
        assert file.tensors["a"].offset % 64 == 0

    def test_agrees_with_the_reference_reader(self, path: Path) -> None:
        writer = reference.GGUFWriter(path, "phi3")
        writer.add_array("words", ["one", "two"])
        writer.add_float32("x", 0.5)
        writer.add_tensor("m", np.arange(12, dtype=np.float32).reshape(3, 4))
        writer.add_tensor("h", np.arange(6, dtype=np.float16).reshape(2, 3))
        write_and_close(writer)
        file = GGUFFile(path)
        assert file.metadata == {"general.architecture": "phi3", "words": ["one", "two"], "x": 0.5}
        for expected in reference.GGUFReader(path).tensors:
            info = file.tensors[expected.name]
            assert (info.offset, info.n_bytes) == (expected.data_offset, expected.n_bytes)
            assert info.shape == tuple(reversed(expected.shape.tolist()))
            assert file.data(info.name).tobytes() == expected.data.tobytes()


class TestLifetime:
    def test_views_outlive_the_file(self, path: Path) -> None:
        with open_bytes(path, gguf([], [tensor("a", (2,))], struct.pack("<2f", 1, 2))) as file:
            view = file.data("a")
        assert view.view("<f4").tolist() == [1, 2]
        with pytest.raises(errors.ModelClosedError, match="was closed"):
            file.data("a")
        file.close()

    def test_fileno_is_open_until_close(self, path: Path) -> None:
        file = open_bytes(path, gguf())
        descriptor = file.fileno()
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        file.close()
        with pytest.raises(errors.ModelClosedError, match="was closed"):
            file.fileno()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)

    def test_no_such_tensor(self, path: Path) -> None:
        with pytest.raises(errors.ModelFileError, match="no tensor 'b'"):
            open_bytes(path, gguf()).data("b")

    def test_metadata_does_not_keep_the_mapping_open(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        maps: list[tuple[mmap.mmap, int, int]] = []
        original = reader._map_file
        monkeypatch.setattr(reader, "_map_file", lambda p: maps.append(original(p)) or maps[-1])
        file = open_bytes(path, gguf([key("ints", ARRAY, (I32, [1, 2])), key("t", ARRAY, (STRING, ["a"]))]))
        file.close()
        assert maps[0][0].closed
        with pytest.raises(errors.ModelFileError):
            open_bytes(path, gguf(n_keys=1))
        assert maps[1][0].closed  # also closed after an error


class TestBadPaths:
    def test_missing(self, path: Path) -> None:
        with pytest.raises(errors.ModelNotFoundError, match=r"model\.gguf: no such file"):
            GGUFFile(path)
        path.write_bytes(b"")
        with pytest.raises(errors.PhiError, match="inside"):
            GGUFFile(path / "inside")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(errors.ModelFileError, match="found a folder"):
            GGUFFile(tmp_path)

    def test_empty(self, path: Path) -> None:
        with pytest.raises(errors.ModelFileError, match="empty file"):
            open_bytes(path, b"")

    def test_null_character(self) -> None:
        with pytest.raises(errors.PhiError, match="cannot be read"):
            GGUFFile("a\0b")

    def test_unreadable(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        path.write_bytes(gguf())
        monkeypatch.setattr(Path, "open", refuse)  # not by file mode: root can read every file
        with pytest.raises(errors.ModelFileError, match="cannot be read: Permission denied"):
            GGUFFile(path)

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in the file system")
    def test_pipe_does_not_block(self, path: Path) -> None:
        os.mkfifo(path)
        with pytest.raises(errors.ModelFileError, match="a pipe or a device"):
            GGUFFile(path)


CASES = {
    "magic": (gguf(magic=b"GGML"), "not a GGUF file"),
    "short magic": (b"GGU", "the magic number"),
    "no version": (b"GGUF", "the version"),
    "no counts": (b"GGUF\3\0\0\0\0", "the number of tensors"),
    "tensor count": (gguf(n_tensors=HUGE), "number of tensors"),
    "key count": (gguf(n_keys=HUGE), "number of metadata keys"),
    "one key too many": (gguf([key("a", U8, 1)], n_keys=2), "metadata key 1"),
    "one tensor too many": (gguf(n_tensors=1), "number of tensors"),
    "no key name": (gguf([key("", U8, 1)]), "name of metadata key 0 is empty"),
    "no tensor name": (gguf([], [tensor("", (1,))], bytes(32)), "name of a tensor is empty"),
    "key twice": (gguf([key("a", U8, 1), key("a", U8, 2)]), "'a' appears twice"),
    "key not UTF-8": (gguf([key("a", U8, 1).replace(b"a", b"\xff")]), "not UTF-8"),
    "key length": (gguf([struct.pack("<Q", HUGE) + bytes(20)]), "length of the name of metadata key 0"),
    "value type": (gguf([key("a", U8, 1)[:-5] + struct.pack("<IB", 13, 1)]), "unknown value type 13"),
    "bool": (gguf([key("a", BOOL, True)[:-1] + b"\2"]), "expected the byte 0 or 1, found 2"),
    "bools": (gguf([key("a", ARRAY, (BOOL, [True]))[:-1] + b"\2"]), "expected bytes 0 or 1, found 2"),
    "string not UTF-8": (gguf([key("a", STRING, b"ok\xc3(")]), "'a' is not UTF-8 text: byte 0xc3"),
    "strings not UTF-8": (
        gguf([key("a", ARRAY, (STRING, [b"x", b"\xff"]))]),
        "'a' is not an array of 2 strings",
    ),
    "string length": (gguf([key("a", STRING, "")[:-8] + struct.pack("<Q", 2**40)]), "length of"),
    "element type": (gguf([key("a", ARRAY, (U8, []))[:-12] + struct.pack("<IQ", 99, 0)]), "element type 99"),
    "element count": (gguf([key("a", ARRAY, (U8, []))[:-8] + struct.pack("<Q", HUGE)]), "element count of"),
    "wrapping count": (
        gguf([key("a", ARRAY, (U64, []))[:-8] + struct.pack("<Q", 2**61 + 1)]),
        "element count of",
    ),
    "string count": (
        gguf([key("a", ARRAY, (STRING, []))[:-8] + struct.pack("<Q", HUGE)]),
        "element count of",
    ),
    "string in array": (
        gguf([key("a", ARRAY, (STRING, ["abc"]))[:-11] + struct.pack("<Q", 2**63) + b"abc"]),
        "'a' is not an array of 1 strings",
    ),
    "deep nesting": (
        gguf([key("a", ARRAY, (ARRAY, [(ARRAY, [(ARRAY, [(ARRAY, [(U8, [])])])])]))]),
        "nests arrays",
    ),
    "alignment 0": (gguf([key("general.alignment", U32, 0)]), "general.alignment is 0"),
    "alignment 48": (gguf([key("general.alignment", U32, 48)]), "general.alignment is 48"),
    "alignment 4": (gguf([key("general.alignment", U32, 4)]), "general.alignment is 4"),
    "alignment string": (gguf([key("general.alignment", STRING, "32")]), "general.alignment is '32'"),
    "alignment bool": (gguf([key("general.alignment", BOOL, True)]), "general.alignment is True"),
    "tensor twice": (gguf([], [tensor("a", (1,)), tensor("a", (1,), 0, 32)], bytes(64)), "'a' appears twice"),
    "no dimensions": (gguf([], [tensor("abcdefgh", ())], bytes(64)), "'abcdefgh' has 0 dimensions"),
    "5 dimensions": (gguf([], [tensor("a", (1,) * 5)], bytes(64)), "'a' has 5 dimensions"),
    "empty tensor": (gguf([], [tensor("a", (0, 4))], bytes(64)), r"'a' has the shape \(4, 0\)"),
    "part of a block": (gguf([], [tensor("a", (33,), Q8_0)], bytes(128)), "'a' has rows of 33 elements"),
    "unaligned": (gguf([], [tensor("a", (1,), 0, 16)], bytes(64)), "offset 16, expected a multiple of 32"),
    "past the end": (gguf([], [tensor("a", (17,))], bytes(64)), "'a' needs 68 bytes"),
    "offset past the end": (gguf([], [tensor("a", (1,), 0, 2**63)], bytes(64)), "'a' needs 4 bytes"),
    "wrapping offset": (gguf([], [tensor("a", (1,), 0, 2**64 - 32)], bytes(64)), "'a' needs 4 bytes"),
    "wrapping shape": (gguf([], [tensor("a", (2**32, 2**32))], bytes(64)), "'a' needs 73786976294838206464"),
    "overlap": (
        gguf([], [tensor("a", (16,)), tensor("b", (1,), 0, 32)], bytes(64)),
        "'a' and 'b' overlap",
    ),
}


@pytest.mark.parametrize(("data", "message"), CASES.values(), ids=CASES.keys())
def test_corrupt_headers_are_reported(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(errors.ModelFileError, match=message) as caught:
        open_bytes(path, data)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


UNSUPPORTED = {
    "version 1": (gguf(version=1), "GGUF version 1 is not supported, expected 2 or 3"),
    "version 4": (gguf(version=4), "GGUF version 4"),
    "big endian": (gguf(version=3 << 24), "big-endian"),
    "known type": (gguf([], [tensor("a", (256,), 16)], bytes(128)), "'a' is of type IQ2_XXS"),
    "unknown type": (gguf([], [tensor("a", (256,), 77)], bytes(128)), r"'a' is of type 77 \(unknown\)"),
    "split": (gguf([key("split.count", U16, 3)]), "one part of a model split into 3 files"),
}


@pytest.mark.parametrize(("data", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_files_are_reported(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=message):
        open_bytes(path, data)


def test_every_truncation_is_detected(path: Path) -> None:
    keys = [
        key("a", STRING, "text"),
        key("b", ARRAY, (STRING, ["x", "yz"])),
        key("c", ARRAY, (I16, [1, 2, 3])),
        key("d", F64, 1.0),
    ]
    data = gguf(keys, [tensor("m", (8, 2)), tensor("v", (3,), 0, 64)], bytes(64) + bytes(12))
    open_bytes(path, data).close()
    for n_bytes in range(len(data)):
        with pytest.raises(errors.ModelFileError):
            open_bytes(path, data[:n_bytes])


def test_huge_counts_in_a_huge_file_allocate_no_memory(path: Path) -> None:
    """In a file of gigabytes a corrupt count can fit the file; the limits on counts reject it before allocation."""
    for element_type in (STRING, U8, F64, ARRAY):
        head = gguf([key("a", ARRAY, (element_type, []))[:-8] + struct.pack("<Q", 2**25)])
        path.write_bytes(head)
        try:
            os.truncate(path, 2**33)  # sparse: uses no disk space
        except OSError:
            pytest.skip("the file system does not support sparse files of this size")
        with pytest.raises(errors.ModelFileError, match="is 33554432, expected at most"):
            GGUFFile(path)


def test_phi3_vocabulary_file(phi3_vocab: Path) -> None:
    with GGUFFile(phi3_vocab) as file:
        tokens, scores = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"]
    assert isinstance(tokens, list) and isinstance(scores, np.ndarray)
    assert len(tokens) == scores.size == 32064
    assert tokens[1] == "<s>" and tokens[32000] == "<|endoftext|>" and tokens[32007] == "<|end|>"


def test_opening_is_fast(phi3_vocab: Path) -> None:
    """A file with a 32k vocabulary opens in about 3 ms, gguf.GGUFReader needs a second. Compares CPU times."""

    def seconds(open_file: Callable[[], object]) -> float:
        start = time.process_time()
        open_file()
        return time.process_time() - start

    ours = min(seconds(lambda: GGUFFile(phi3_vocab).close()) for _ in range(5))
    assert ours < seconds(lambda: reference.GGUFReader(phi3_vocab)) / 20


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\nb'"),
        ("x" * 99, "'" + "x" * 56 + "..."),
        (np.zeros(3), "an array of 3 elements"),
        ([1, 2], "an array of 2 elements"),
        (None, "None"),
    ],
)
def test_values_in_messages_are_short(value: object, text: str) -> None:
    assert short(value) == text
