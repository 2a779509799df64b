"""Writes the GGUF file, rows by rows: memory stays at some megabytes, whatever the model's size."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import gguf
from phi_c.convert.plan import ConversionPlan, Target
from phi_c.convert.safetensors_file import StoredTensor
from phi_c.convert.values import DTYPES, cast
from phi_c.errors import OutputError, UnsupportedModelError
from phi_c.storage import atomic_write

Progress = Callable[[int, int], None]  # is told how many bytes of all are written

_CHUNK_ELEMENTS = 4 << 20


def write_gguf(path: Path, plan: ConversionPlan, metadata: dict[str, Any], progress: Progress) -> None:
    """Write the file, which appears under its name when it is whole.

    Raises OutputError when there is no room or the folder cannot be written, ModelFileError when a source is damaged.
    """
    header = _header(plan, metadata)
    total = len(header) + sum(_n_bytes(target) for target in plan.targets)
    free = shutil.disk_usage(next(p for p in path.resolve().parents if p.is_dir())).free
    if free < total:
        raise OutputError(f"{path} takes {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
    with atomic_write(path) as file:
        _pad(file, file.write(header))
        for target in plan.targets:
            for chunk in _chunks(target):
                file.write(chunk)
                progress(min(file.tell(), total), total)
            _pad(file, file.tell())


def _header(plan: ConversionPlan, metadata: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="phi-c-") as folder:
        name = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(name, plan.architecture.name)
        for key, value in metadata.items():
            _add(writer, key, value)
        for target in plan.targets:
            kind = gguf.GGMLQuantizationType[target.out_type]
            writer.add_tensor_info(target.name, target.shape, DTYPES[target.out_type], _n_bytes(target), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return name.read_bytes()


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        item = "INT32" if key.endswith("token_type") else kinds[type(value[0])]
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[item])
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])


def _n_bytes(target: Target) -> int:
    return math.prod(target.shape) * DTYPES[target.out_type].itemsize


def _pad(file: IO[bytes], at: int) -> None:
    file.write(bytes(-at % gguf.GGUF_DEFAULT_ALIGNMENT))


def _chunks(target: Target) -> Iterator[bytes]:
    """Yield the bytes of a tensor."""
    if target.values is not None:
        yield target.values.astype("<f4").tobytes()
    for part in target.parts:
        yield from _part(part, target)


def _part(part: StoredTensor, target: Target) -> Iterator[bytes]:
    unit = target.paired_rows or 1  # heads are not cut
    step = max(_CHUNK_ELEMENTS // (part.row_elements * unit), 1) * unit
    for first in range(0, part.shape[0], step):
        rows = part.rows(first, min(first + step, part.shape[0]))
        if target.paired_rows:
            halves = rows.reshape(-1, 2, unit // 2, part.row_elements)
            rows = halves.swapaxes(1, 2).reshape(rows.shape)
        try:
            yield cast(rows, part.dtype, target.out_type).tobytes()
        except OverflowError:
            raise UnsupportedModelError(
                f"{part.path}: {part.name!r} has values beyond what {target.out_type} holds: choose another type"
            ) from None
