"""Quantising a model file: read by slabs of rows, written as it goes, so that memory does not grow with the file."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from phi_c import machine
from phi_c._core import TENSOR_TYPES, dequantize, quantize_rows
from phi_c.errors import ModelFileError, OptionError, OutputError, UnsupportedModelError
from phi_c.gguf import writer as gguf_writer
from phi_c.gguf.reader import GGUFFile, TensorInfo, short
from phi_c.quantize.mix import FLOATS, TYPES, Mix, is_quantised, make_mix, read_model
from phi_c.storage import atomic_write

Floats = npt.NDArray[np.float32]

QUANTIZATION_VERSION = 2  # of ggml's block formats (general.quantization_version)
_SLAB_WEIGHTS = 1 << 22  # 16 MiB as float32, a fraction of a second of work


@dataclass(frozen=True)
class Step:
    """What becomes of one tensor; types by name."""

    info: TensorInfo
    type_now: str
    type_then: str
    n_bytes: int  # then

    @property
    def n_weights(self) -> int:
        """Elements of the tensor."""
        return int(np.prod(self.info.shape, dtype=np.int64))

    @property
    def is_copied(self) -> bool:
        """Whether its bytes stay as they are."""
        return self.type_then == self.type_now

    @property
    def is_requantised(self) -> bool:
        """Whether it loses precision a second time."""
        return not self.is_copied and self.type_now not in FLOATS


@dataclass(frozen=True)
class Plan:
    """The file to be written: its tensors in the order of the source, its size and its header in bytes."""

    steps: tuple[Step, ...]
    header: bytes
    alignment: int
    n_bytes: int
    n_bytes_now: int

    @property
    def bits_per_weight(self) -> float:
        """Mean over all tensors."""
        return 8 * sum(step.n_bytes for step in self.steps) / sum(step.n_weights for step in self.steps)


@dataclass(frozen=True)
class Importance:
    """An importance matrix: by tensor name, float32 [n_experts or 1, n_cols]; and where it comes from."""

    columns: Mapping[str, Floats]
    file: str = "imatrix"
    dataset: str = ""
    n_chunks: int = 0

    def of(self, info: TensorInfo) -> Floats | None:
        """Return what weighs a tensor's columns, [n_experts, n_cols]; None where nothing is known.

        Raises ModelFileError for a matrix of another size, or whose values are no mean squares.
        """
        found = self.columns.get(info.name)
        n_experts, n_cols = (info.shape[0] if len(info.shape) == 3 else 1), info.shape[-1]
        if found is None:
            return None
        if found.size != n_experts * n_cols:
            if info.name == "token_embd.weight":  # fed with ids: what a tied output was fed lies under its name
                return None
            raise ModelFileError(
                f"{self.file}: the importance matrix has {found.size} values for {short(info.name)}, "
                f"expected {n_experts * n_cols}"
            )
        values = np.ascontiguousarray(found, np.float32).reshape(n_experts, n_cols)
        if not np.isfinite(values).all() or values.min() < 0:
            raise ModelFileError(f"{self.file}: the values for {short(info.name)} are no mean squares")
        return values


def read_importance(path: str | os.PathLike[str]) -> Importance:
    """Return the importance matrix of a file, GGUF or .dat; raises what `load_imatrix` does."""
    from phi_c.quantize.imatrix import load_imatrix  # noqa: PLC0415 - most files are quantised without

    imatrix = load_imatrix(path)
    dataset = imatrix.datasets[0] if imatrix.datasets else ""
    return Importance(imatrix.means(), os.fspath(path), dataset, imatrix.n_chunks)


def make_plan(file: GGUFFile, mix: Mix, importance: Importance | None = None) -> Plan:
    """Return what quantising a file will write.

    Raises UnsupportedModelError for a file that holds no model, OptionError for types that do not fit.
    """
    if not any(is_quantised(info.name, info.shape) for info in file.tensors.values()):
        raise UnsupportedModelError(f"{file.path}: the file holds no matrices, expected a model")
    model = read_model(file.metadata, tuple(file.tensors), has_imatrix=importance is not None)
    steps = tuple(
        _step(info, mix.type_of(info.name, info.shape, _type_of(info), model)) for info in file.tensors.values()
    )
    header = gguf_writer.header(
        _metadata(file, mix, importance),
        [(step.info.name, step.info.shape, TYPES[step.type_then].type_id, step.n_bytes) for step in steps],
        file.alignment,
    )
    n_data = sum(step.n_bytes + gguf_writer.padding(step.n_bytes, file.alignment) for step in steps)
    return Plan(steps, header, file.alignment, len(header) + n_data, file.n_bytes)


def _type_of(info: TensorInfo) -> str:
    return TENSOR_TYPES[info.type_id].name


def _step(info: TensorInfo, type_then: str) -> Step:
    kind = TYPES[type_then]
    n_weights = int(np.prod(info.shape, dtype=np.int64))
    return Step(info, _type_of(info), type_then, n_weights // kind.block_elements * kind.block_bytes)


def _metadata(file: GGUFFile, mix: Mix, importance: Importance | None) -> dict[str, bytes]:
    """The source's own values, byte for byte, and llama.cpp's notes on how the file was made."""
    metadata = file.raw_metadata()
    metadata["general.file_type"] = gguf_writer.u32(mix.file_type.number)
    metadata["general.quantization_version"] = gguf_writer.u32(QUANTIZATION_VERSION)
    if importance is not None:
        metadata["quantize.imatrix.file"] = gguf_writer.text(importance.file)
        if importance.dataset:
            metadata["quantize.imatrix.dataset"] = gguf_writer.text(importance.dataset)
        metadata["quantize.imatrix.entries_count"] = gguf_writer.u32(len(importance.columns))
        if importance.n_chunks:
            metadata["quantize.imatrix.chunks_count"] = gguf_writer.u32(importance.n_chunks)
    return metadata


def write_plan(
    file: GGUFFile,
    plan: Plan,
    out: IO[bytes],
    weights: Mapping[str, Floats],
    n_threads: int,
    progress: Callable[[int], object] = lambda n_weights: None,
) -> None:
    """Write the planned file.

    weights: by tensor name, [n_experts, n_cols], how much the squares of errors matter. progress is told how many
    elements are through since it was told last. Raises ModelFileError for weights that are not finite.
    """
    out.write(plan.header)
    for step in plan.steps:
        for data in _converted(file, step, weights.get(step.info.name), n_threads, progress):
            out.write(data.data)
            file.release()
        out.write(bytes(gguf_writer.padding(step.n_bytes, plan.alignment)))


def _converted(
    file: GGUFFile, step: Step, importance: Floats | None, n_threads: int, progress: Callable[[int], object]
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield a tensor's bytes in its new type, slab by slab; a slab never crosses from one expert to the next."""
    info, kind = step.info, TENSOR_TYPES[step.info.type_id]
    n_cols = info.shape[-1]
    row_bytes = n_cols // kind.block_elements * kind.block_bytes
    rows = file.data(info.name).reshape(-1, row_bytes)
    n_experts = len(importance) if importance is not None else 1
    per_expert, per_slab = len(rows) // n_experts, max(1, _SLAB_WEIGHTS // n_cols)
    for expert in range(n_experts):
        columns = importance[expert] if importance is not None else None
        for start in range(0, per_expert, per_slab):
            first = expert * per_expert + start
            slab = rows[first : min(first + per_slab, (expert + 1) * per_expert)]
            if step.is_copied:
                if step.type_now in FLOATS:
                    _floats(slab, info, first, file.path)  # refuses what is not finite
                yield slab
            else:
                values = _floats(slab, info, first, file.path)
                yield quantize_rows(TYPES[step.type_then].type_id, values, columns, n_threads)
            progress(len(slab) * n_cols)


def _floats(slab: npt.NDArray[np.uint8], info: TensorInfo, first_row: int, path: Path) -> Floats:
    """Return rows as float32 [n_rows, n_cols]; raises ModelFileError for what is not finite."""
    n_cols = info.shape[-1]
    if _type_of(info) == "F32":
        values = slab.view("<f4")
    else:
        values = dequantize(info.type_id, slab.reshape(-1), len(slab) * n_cols).reshape(-1, n_cols)
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.unravel_index(int(np.argmin(finite)), finite.shape)
        raise ModelFileError(
            f"{path}: tensor {short(info.name)} holds {values[row, column]} in row {first_row + row}, column {column}, "
            "expected finite weights"
        )
    return values


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote. seconds: the time it took; n_unweighted: matrices that the importance matrix left out."""

    path: Path
    plan: Plan
    seconds: float
    n_unweighted: int


def quantize_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    file_type: str = "Q4_K_M",
    *,
    imatrix: str | os.PathLike[str] | Importance | None = None,
    output_type: str | None = None,
    embedding_type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    pure: bool = False,
    allow_requantize: bool = False,
    force: bool = False,
    n_threads: int | None = None,
    progress: bool = False,
) -> Quantized:
    """Store the GGUF file `source` in fewer bits a weight, as `target`, which appears when it is whole.

    file_type: a row of FILE_TYPES, such as Q8_0, Q6_K, Q5_K_M, Q4_K_M. imatrix: an importance matrix (`phi-c imatrix`),
    by which errors are weighed. output_type, embedding_type, tensor_types: types of the output matrix, the embedding,
    and of tensors whose names match a regular expression, in place of the mix's. pure: no mix. allow_requantize: take
    weights that are quantised already; they lose a second time. force: replace target. progress: a bar on stderr.

    Raises OptionError, OutputError, ModelNotFoundError, ModelFileError, UnsupportedModelError.
    """
    path = Path(target)
    mix = make_mix(file_type, output_type, embedding_type, tensor_types, pure=pure)
    if n_threads is not None and not 1 <= n_threads <= 1024:
        raise OptionError(f"n_threads is {n_threads}, expected 1 to 1024")
    started = time.perf_counter()
    importance = read_importance(imatrix) if isinstance(imatrix, str | os.PathLike) else imatrix
    with GGUFFile(source) as file:
        plan = make_plan(file, mix, importance)
        check_plan(file, plan, allow_requantize=allow_requantize)
        _check_target(file.path, path, plan.n_bytes, force=force)
        weights = _weights(plan, importance) if importance is not None else {}
        n_weights = sum(step.n_weights for step in plan.steps)
        with _bar(path.name, n_weights, shown=progress) as advance, atomic_write(path) as out:
            write_plan(file, plan, out, weights, n_threads or machine.default_threads(), advance)
    quantised = {step.info.name for step in plan.steps if step.type_then not in FLOATS and not step.is_copied}
    n_unweighted = len(quantised - weights.keys() - {"token_embd.weight"}) if importance is not None else 0
    return Quantized(path, plan, time.perf_counter() - started, n_unweighted)


def _weights(plan: Plan, importance: Importance) -> dict[str, Floats]:
    found = {step.info.name: importance.of(step.info) for step in plan.steps}
    weights = {name: values for name, values in found.items() if values is not None}
    if not weights:
        raise ModelFileError(f"{importance.file}: no tensor of the model is in it, it belongs to another model")
    return weights


def check_plan(file: GGUFFile, plan: Plan, *, allow_requantize: bool) -> None:
    """Raise OptionError where quantised weights would be quantised again and nobody allowed it."""
    again = next((step for step in plan.steps if step.is_requantised), None)
    if again is not None and not allow_requantize:
        raise OptionError(
            f"{file.path}: {short(again.info.name)} is {again.type_now} already, expected F32, F16 or BF16: "
            f"{again.type_then} would lose a second time; allow_requantize (--allow-requantize) takes it nonetheless"
        )


def _check_target(source: Path, target: Path, n_bytes: int, *, force: bool) -> None:
    if target.is_dir():
        raise OutputError(f"{target} is a folder, expected the name of a file")
    if target.exists():
        if target.samefile(source):
            raise OutputError(f"{target} is the file that is read, expected another name")
        if not force:
            raise OutputError(f"{target} exists already; force (--force) replaces it")
    if target.parent.is_dir():
        free = shutil.disk_usage(target.parent).free
        if free < n_bytes:
            raise OutputError(f"{target} takes {n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk")


@contextlib.contextmanager
def _bar(name: str, n_weights: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    if not shown:
        yield lambda n_done: None
        return
    from rich.console import Console  # noqa: PLC0415 - for terminals
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name, total=n_weights)
        yield lambda n_done: bars.advance(task, n_done)
