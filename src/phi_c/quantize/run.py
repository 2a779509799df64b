"""Quantises a model file. Tensors are read, converted and written in chunks of rows, so memory use is constant."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_c import machine
from phi_c._core import TENSOR_TYPES, dequantize, quantize_rows
from phi_c.errors import ModelFileError, OptionError, OutputError
from phi_c.gguf import writer
from phi_c.gguf.reader import GGUFFile, TensorInfo, short
from phi_c.gguf.types import TENSOR_TYPES_BY_NAME
from phi_c.quantize.mix import FLOAT_TYPES, make_mix
from phi_c.quantize.plan import Floats, Importance, QuantizePlan, Step, check_plan, make_plan, read_importance
from phi_c.storage import atomic_write

_CHUNK_WEIGHTS = 1 << 22  # 16 MiB as float32, a fraction of a second of work


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize_model`."""

    path: Path
    plan: QuantizePlan
    seconds: float  # run time
    n_without_importance: int  # quantised tensors, other than the embedding, that the importance matrix lacks


def quantize_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    file_type: str = "Q4_K_M",
    *,
    imatrix: str | os.PathLike[str] | Importance | None = None,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    pure: bool = False,
    allow_requantize: bool = False,
    force: bool = False,
    n_threads: int | None = None,
    progress: bool = False,
) -> Quantized:
    """Quantise the GGUF file `source` and write the result to `target`, atomically.

    file_type: a key of FILE_TYPES, such as Q8_0, Q6_K, Q5_K_M or Q4_K_M.
    imatrix: importance matrix from `phi-c imatrix`, by which quantisation errors are weighted.
    output_tensor_type, token_embedding_type: types of the output matrix and of the token embedding.
    tensor_types: (regular expression, type) pairs for tensors whose names match; the first match applies.
    pure: use the file type's default type for all matrices instead of a mix.
    allow_requantize: accept source weights that are already quantised, which loses precision twice.
    force: replace `target` if it exists.
    n_threads: None: the number of physical cores.
    progress: show a progress bar on stderr.

    Raises OptionError, OutputError, ModelNotFoundError, ModelFileError, UnsupportedModelError.
    """
    path = Path(target)
    mix = make_mix(file_type, output_tensor_type, token_embedding_type, tensor_types, pure=pure)
    if n_threads is not None and not 1 <= n_threads <= 1024:
        raise OptionError(f"n_threads is {n_threads}, expected 1 to 1024")
    start = time.perf_counter()
    importance = read_importance(imatrix) if isinstance(imatrix, str | os.PathLike) else imatrix
    with GGUFFile(source) as file:
        plan = make_plan(file, mix, importance)
        check_plan(file.path, plan, allow_requantize=allow_requantize)
        _check_target(file.path, path, plan.n_bytes, force=force)
        column_weights = _column_weights(plan, importance) if importance is not None else {}
        n_threads = n_threads or machine.default_threads()
        with _progress_bar(path.name, shown=progress) as report, atomic_write(path) as out:
            data = (_convert(file, step, column_weights.get(step.source.name), n_threads) for step in plan.steps)
            writer.write(out, plan.output, data, report)
    quantised = {step.source.name for step in plan.steps if step.target_type not in FLOAT_TYPES and not step.is_copied}
    n_without = len(quantised - column_weights.keys() - {"token_embd.weight"}) if importance is not None else 0
    return Quantized(path, plan, time.perf_counter() - start, n_without)


def _check_target(source: Path, target: Path, n_bytes: int, *, force: bool) -> None:
    if target.is_dir():
        raise OutputError(f"{target} is a folder, expected a file name")
    if target.exists():
        if target.samefile(source):
            raise OutputError(f"{target} is the source file, expected another file name")
        if not force:
            raise OutputError(f"{target} already exists; replace it with force (--force)")
    if target.parent.is_dir():
        n_free = shutil.disk_usage(target.parent).free
        if n_free < n_bytes:
            raise OutputError(
                f"{target} needs {n_bytes / 1e9:.2f} GB, its disk has {n_free / 1e9:.2f} GB free; free some space"
            )


def _column_weights(plan: QuantizePlan, importance: Importance) -> dict[str, Floats]:
    weights = {step.source.name: importance.column_weights(step.source) for step in plan.steps}
    found = {name: values for name, values in weights.items() if values is not None}
    if not found:
        raise ModelFileError(
            f"{importance.file}: the importance matrix belongs to another model: it has none of the model's tensors"
        )
    return found


def _convert(file: GGUFFile, step: Step, column_weights: Floats | None, n_threads: int) -> Iterator[memoryview]:
    """Yield a tensor's data in its target type, in chunks of rows of one expert.

    Raises ModelFileError for weights that are not finite.
    """
    n_experts = len(column_weights) if column_weights is not None else 1
    for first_row, rows, expert in _row_chunks(file, step.source, n_experts):
        if step.is_copied:
            if step.source_type in FLOAT_TYPES:
                _read_floats(rows, step.source, first_row, file.path)  # raises for non-finite weights
            yield rows.data
        else:
            values = _read_floats(rows, step.source, first_row, file.path)
            weights = column_weights[expert] if column_weights is not None else None
            type_id = TENSOR_TYPES_BY_NAME[step.target_type].type_id
            yield quantize_rows(type_id, values, weights, n_threads).data
        file.release()


def _row_chunks(file: GGUFFile, info: TensorInfo, n_experts: int) -> Iterator[tuple[int, npt.NDArray[np.uint8], int]]:
    """Yield (first row, rows uint8 [n_rows, row_bytes], expert); the tensor's rows are those of n_experts matrices."""
    rows = file.data(info.name).reshape(-1, _row_bytes(info))
    rows_per_expert, rows_per_chunk = len(rows) // n_experts, max(1, _CHUNK_WEIGHTS // info.shape[-1])
    for expert in range(n_experts):
        end = (expert + 1) * rows_per_expert
        for first_row in range(expert * rows_per_expert, end, rows_per_chunk):
            yield first_row, rows[first_row : min(first_row + rows_per_chunk, end)], expert


def _row_bytes(info: TensorInfo) -> int:
    tensor_type = TENSOR_TYPES[info.type_id]
    return info.shape[-1] // tensor_type.block_elements * tensor_type.block_bytes


def _read_floats(rows: npt.NDArray[np.uint8], info: TensorInfo, first_row: int, path: Path) -> Floats:
    """Return rows as float32 [n_rows, n_cols]; raises ModelFileError for values that are not finite."""
    n_cols = info.shape[-1]
    if info.type_name == "F32":
        values = rows.view("<f4")
    else:
        values = dequantize(info.type_id, rows.reshape(-1), len(rows) * n_cols).reshape(-1, n_cols)
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.unravel_index(int(np.argmin(finite)), finite.shape)
        raise ModelFileError(
            f"{path}: tensor {short(info.name)} has {values[row, column]} in row {first_row + row}, column {column}, "
            "expected finite weights"
        )
    return values


@contextlib.contextmanager
def _progress_bar(name: str, *, shown: bool) -> Iterator[writer.Progress]:
    if not shown:
        yield lambda n_written, n_total: None
        return
    from rich.console import Console  # noqa: PLC0415 - only for terminals
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name, total=None)
        yield lambda n_written, n_total: bars.update(task, completed=n_written, total=n_total)
