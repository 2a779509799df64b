"""A Hugging Face model folder: config.json, tokenizer files, and one or several safetensors files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_c.convert.safetensors_file import StoredTensor, read_header
from phi_c.errors import ModelFileError, ModelNotFoundError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Patterns of the repository files that a conversion reads.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
    "model*.safetensors",
)


@dataclass(frozen=True)
class HFFolder:
    """A model folder: config.json and the headers of all tensors, by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_folder(path: Path) -> HFFolder:
    """Return the content of a folder without reading tensor data; raises ModelNotFoundError, ModelFileError."""
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} is not a folder, expected one with config.json and safetensors files")
    config = read_json(path / "config.json")
    if config is None:
        raise ModelNotFoundError(f"{path} has no config.json, expected a Hugging Face model folder")
    return HFFolder(path, config, _tensors(path))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None if the file does not exist; raises ModelFileError for other content."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} contains a {type(value).__name__}, expected a JSON object")
    return value


def _tensors(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path / INDEX)
    if index is not None:
        return _sharded(path, index)
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    parts = sorted(file.name for file in path.glob("*.safetensors"))
    if parts:
        raise ModelNotFoundError(f"{path} has {parts[0]} but no {INDEX}, which lists the shards of a model")
    others = sorted(file.name for file in path.glob("*.bin"))
    found = f", found {others[0]}: save the model as safetensors first" if others else ""
    raise ModelNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}{found}")


def _sharded(path: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shard_of.values()):
        raise ModelFileError(f"{path / INDEX}: weight_map is corrupt, expected a file name for each tensor")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        if not (path / shard).is_file():
            raise ModelNotFoundError(f"{path} has no {shard}, which {INDEX} lists: the download is incomplete")
        stored = read_header(path / shard)
        tensors |= {name: tensor for name, tensor in stored.items() if shard_of.get(name, shard) == shard}
    for name, shard in shard_of.items():
        if name not in tensors:
            raise ModelFileError(f"{path / shard} has no tensor {name!r}, which {INDEX} lists")
    return tensors
