"""Writes a converted GGUF file. Tensors are converted in chunks of rows, so memory use is constant."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phi_c.convert.plan import ConversionPlan, Target
from phi_c.convert.safetensors_file import StoredTensor
from phi_c.convert.values import cast
from phi_c.errors import OutputError, UnsupportedModelError
from phi_c.gguf import writer
from phi_c.storage import atomic_write

Progress = Callable[[int, int], None]  # called with (bytes written, total bytes)

_CHUNK_ELEMENTS = 4 << 20


def write_gguf(path: Path, plan: ConversionPlan, metadata: dict[str, Any], progress: Progress) -> None:
    """Write the GGUF file of a conversion, atomically.

    metadata: all keys except general.architecture. A value is a bool, an int (stored as uint32), a float (stored as
    float32), a str, a list of str or float, or the list of int (stored as int32) of tokenizer.ggml.token_type.

    Raises OutputError if the disk is full or the file cannot be written, ModelFileError if a source file is corrupt,
    UnsupportedModelError if a value exceeds the range of the target type.
    """
    encoded = {"general.architecture": writer.string(plan.architecture.name)}
    encoded |= {key: _encode(key, value) for key, value in metadata.items()}
    tensors = tuple(writer.TensorSpec(target.name, target.shape, target.out_type) for target in plan.targets)
    output = writer.Plan(encoded, tensors)
    n_free = shutil.disk_usage(next(p for p in path.resolve().parents if p.is_dir())).free
    if n_free < output.n_bytes:
        raise OutputError(
            f"{path} needs {output.n_bytes / 1e9:.1f} GB, its disk has {n_free / 1e9:.1f} GB free; free some space"
        )
    with atomic_write(path) as file:
        writer.write(file, output, map(_data, plan.targets), progress)


def _encode(key: str, value: Any) -> bytes:
    if isinstance(value, list):
        if key == "tokenizer.ggml.token_type":
            return writer.i32_array(value)
        return writer.f32_array(value) if any(isinstance(item, float) for item in value) else writer.strings(value)
    if isinstance(value, bool):
        return writer.boolean(value)
    if isinstance(value, int):
        return writer.u32(value)
    return writer.f32(value) if isinstance(value, float) else writer.string(value)


def _data(target: Target) -> Iterator[bytes]:
    """Yield the data of a tensor in chunks of rows."""
    if target.values is not None:
        yield target.values.astype("<f4").tobytes()
    for part in target.parts:
        yield from _part_data(part, target)


def _part_data(part: StoredTensor, target: Target) -> Iterator[bytes]:
    rows_per_head = target.paired_rows or 1  # a chunk contains whole heads
    rows_per_chunk = max(_CHUNK_ELEMENTS // (part.row_elements * rows_per_head), 1) * rows_per_head
    for first in range(0, part.shape[0], rows_per_chunk):
        rows = part.rows(first, min(first + rows_per_chunk, part.shape[0]))
        if target.paired_rows:
            halves = rows.reshape(-1, 2, rows_per_head // 2, part.row_elements)
            rows = halves.swapaxes(1, 2).reshape(rows.shape)
        try:
            yield cast(rows, part.dtype, target.out_type).tobytes()
        except OverflowError:
            raise UnsupportedModelError(
                f"{part.path}: {part.name!r} has values beyond the range of {target.out_type}; choose another type"
            ) from None
