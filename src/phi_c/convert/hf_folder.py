"""A model's folder as Hugging Face publishes it: config.json, tokenizer files, and one or several safetensors files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_c.convert.safetensors_file import StoredTensor, read_header
from phi_c.errors import ModelFileError, ModelNotFoundError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The files of a repository that a conversion reads.
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
    """What is in a folder, each tensor once."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_folder(path: Path) -> HFFolder:
    """Return a folder's contents, tensors unread; raises ModelNotFoundError, ModelFileError."""
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} is no folder, expected one with config.json and safetensors files")
    config = read_json(path / "config.json")
    if config is None:
        raise ModelNotFoundError(f"{path} has no config.json, expected a model's folder from Hugging Face")
    return HFFolder(path, config, _tensors(path))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, None when there is no file; raises ModelFileError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is no JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _tensors(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path / INDEX)
    if index is not None:
        return _sharded(path, index)
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    parts = sorted(file.name for file in path.glob("*.safetensors"))
    if parts:
        raise ModelNotFoundError(f"{path} has {parts[0]} but no {INDEX}, which says what belongs together")
    others = sorted(file.name for file in path.glob("*.bin"))
    found = f", found {others[0]}: save the model as safetensors first" if others else ""
    raise ModelNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}{found}")


def _sharded(path: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise ModelFileError(f"{path / INDEX}: weight_map is damaged, expected a file's name for each tensor")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        if not (path / shard).is_file():
            raise ModelNotFoundError(f"{path} lacks {shard}, which {INDEX} names: the download is not complete")
        held = read_header(path / shard)
        tensors |= {name: tensor for name, tensor in held.items() if places.get(name, shard) == shard}
    for name, shard in places.items():
        if name not in tensors:
            raise ModelFileError(f"{path / shard} lacks the tensor {name!r}, which {INDEX} names")
    return tensors
