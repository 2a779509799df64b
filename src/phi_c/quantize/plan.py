"""Plans a quantised file: the type of every tensor, the importance of its columns, metadata and size."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_c.errors import ModelFileError, OptionError, UnsupportedModelError
from phi_c.gguf import writer
from phi_c.gguf.reader import GGUFFile, TensorInfo, short
from phi_c.quantize.mix import FLOAT_TYPES, Mix, is_quantised, read_model

Floats = npt.NDArray[np.float32]

QUANTIZATION_VERSION = 2  # version of ggml's block formats, general.quantization_version


@dataclass(frozen=True)
class Importance:
    """An importance matrix as the quantiser uses it."""

    mean_squares: Mapping[str, Floats]  # of each column's activations, by tensor name: [n_experts or 1, n_cols]
    file: str = "imatrix"
    dataset: str = ""
    n_chunks: int = 0

    def column_weights(self, tensor: TensorInfo) -> Floats | None:
        """Return the weights of a tensor's columns, [n_experts, n_cols], or None if the matrix has none for it.

        Raises ModelFileError if their number differs from the tensor's columns, or a value is negative or not finite.
        """
        values = self.mean_squares.get(tensor.name)
        if values is None:
            return None
        n_experts, n_cols = (tensor.shape[0] if len(tensor.shape) == 3 else 1), tensor.shape[-1]
        if values.size != n_experts * n_cols:
            if tensor.name == "token_embd.weight":  # of a tied model: these are the inputs of the output matrix
                return None
            raise ModelFileError(
                f"{self.file}: the importance matrix has {values.size} values for {short(tensor.name)}, "
                f"expected {n_experts * n_cols}"
            )
        values = np.ascontiguousarray(values, np.float32).reshape(n_experts, n_cols)
        if not np.isfinite(values).all() or values.min() < 0:
            raise ModelFileError(
                f"{self.file}: the importance matrix has negative or non-finite values for {short(tensor.name)}, "
                "expected mean squares"
            )
        return values


def read_importance(path: str | os.PathLike[str]) -> Importance:
    """Return the importance matrix in a GGUF or .dat file; raises the errors of `load_imatrix`."""
    from phi_c.quantize.imatrix import load_imatrix  # noqa: PLC0415 - needed only with an importance matrix

    imatrix = load_imatrix(path)
    dataset = imatrix.datasets[0] if imatrix.datasets else ""
    return Importance(imatrix.means(), os.fspath(path), dataset, imatrix.n_chunks)


@dataclass(frozen=True)
class Step:
    """The conversion of one tensor."""

    source: TensorInfo
    target: writer.TensorSpec

    @property
    def source_type(self) -> str:
        """Name of the type in the source file."""
        return self.source.type_name

    @property
    def target_type(self) -> str:
        """Name of the type in the quantised file."""
        return self.target.type_name

    @property
    def is_copied(self) -> bool:
        """Whether the data is copied unchanged."""
        return self.target_type == self.source_type

    @property
    def is_requantised(self) -> bool:
        """Whether data that is already quantised is quantised to another type."""
        return not self.is_copied and self.source_type not in FLOAT_TYPES


@dataclass(frozen=True)
class QuantizePlan:
    """What quantising a file writes."""

    steps: tuple[Step, ...]  # one per tensor, in the order of the source file
    output: writer.Plan
    source_bytes: int  # size of the source file

    @property
    def n_bytes(self) -> int:
        """Size of the quantised file in bytes."""
        return self.output.n_bytes

    @property
    def bits_per_weight(self) -> float:
        """Mean over all tensors."""
        tensors = self.output.tensors
        return 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors)


def make_plan(file: GGUFFile, mix: Mix, importance: Importance | None = None) -> QuantizePlan:
    """Return the plan for quantising a file.

    Raises UnsupportedModelError if the file has no weight matrices, OptionError if a type of the mix does not fit.
    """
    if not any(is_quantised(info.name, info.shape) for info in file.tensors.values()):
        raise UnsupportedModelError(f"{file.path}: the file has no weight matrices, expected a model")
    model = read_model(file.metadata, tuple(file.tensors), has_imatrix=importance is not None)
    tensors = tuple(
        writer.TensorSpec(info.name, info.shape, mix.type_of(info.name, info.shape, info.type_name, model))
        for info in file.tensors.values()
    )
    steps = tuple(map(Step, file.tensors.values(), tensors))
    return QuantizePlan(steps, writer.Plan(_metadata(file, mix, importance), tensors, file.alignment), file.n_bytes)


def _metadata(file: GGUFFile, mix: Mix, importance: Importance | None) -> dict[str, bytes]:
    """Return the source's metadata, byte for byte, and the keys that llama.cpp's quantiser sets."""
    metadata = file.raw_metadata()
    metadata["general.file_type"] = writer.u32(mix.file_type.number)
    metadata["general.quantization_version"] = writer.u32(QUANTIZATION_VERSION)
    if importance is not None:
        metadata["quantize.imatrix.file"] = writer.string(importance.file)
        if importance.dataset:
            metadata["quantize.imatrix.dataset"] = writer.string(importance.dataset)
        metadata["quantize.imatrix.entries_count"] = writer.u32(len(importance.mean_squares))
        if importance.n_chunks:
            metadata["quantize.imatrix.chunks_count"] = writer.u32(importance.n_chunks)
    return metadata


def check_plan(path: Path, plan: QuantizePlan, *, allow_requantize: bool) -> None:
    """Raise OptionError if a tensor of the file at `path` would be requantised and that is not allowed."""
    step = next((step for step in plan.steps if step.is_requantised), None)
    if step is not None and not allow_requantize:
        raise OptionError(
            f"{path}: {short(step.source.name)} is already quantised to {step.source_type}, expected F32, F16 or BF16: "
            f"requantising to {step.target_type} loses precision twice; allow it with allow_requantize "
            "(--allow-requantize)"
        )
