"""`phi-c inspect`: metadata, tensors and memory of a model file, and the kernels that run it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import cloup
import numpy as np
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from phi_c import _core, hub
from phi_c.cli import options as opt
from phi_c.cli.output import name_value_table
from phi_c.errors import OptionError, PhiError
from phi_c.gguf.reader import GGUFFile, MetadataValue
from phi_c.model.config import ModelConfig, read_config

_DEFAULT_N_CTX = 4096  # of `phi_c.load`, for models whose own context is longer
_MAX_N_CTX = 2**31 - 1
_MAX_ITEMS = 6  # of an array that are shown
_MAX_CHARACTERS = 200  # of a string that are shown in tables

_EPILOG = """\b
Examples:
  phi-c inspect -m smollm2
  phi-c inspect -m Phi-3-mini-4k-instruct-q4.gguf -c 2048 --tensors
  phi-c inspect --kernels
"""


@cloup.command("inspect", epilog=_EPILOG)
@cloup.option_group(
    "What to show",
    opt.model_option(),
    cloup.option("--tensors", is_flag=True, help="List every tensor."),
    cloup.option("--kernels", is_flag=True, help="List the tier that multiplies each tensor type; needs no model."),
)
@cloup.option_group(
    "Memory estimate options",
    opt.ctx_size_option(
        "Context size in tokens.  [default: the model's maximum, at most 4096]", minimum=1, maximum=_MAX_N_CTX
    ),
    opt.kv_type(),
)
@cloup.option_group("Output options", opt.json_flag())
def command(
    model: str | None, n_ctx: int | None, kv_type: str | None, tensors: bool, kernels: bool, as_json: bool
) -> None:
    """Show the metadata of a model file, its tensors by type, and the memory that the model needs.

    A file that phi-c can read but not run is shown as well; the exit code is then 1.
    """
    if model is None and not kernels:
        raise click.UsageError("missing option '-m' / '--model', or --kernels")
    if model is None and (tensors or n_ctx is not None):
        raise click.UsageError("--tensors and --ctx-size need -m/--model")
    report: dict[str, Any] = {}
    refusal: PhiError | None = None
    if model is not None:
        with GGUFFile(hub.resolve(model, progress=True)) as file:
            try:
                config = read_config(file)
            except PhiError as error:
                config, refusal = None, error
            report = describe_file(file, config, n_ctx, kv_type or "f16", tensors=tensors)
        report["error"] = str(refusal) if refusal else None
    if kernels:
        report["kernels"] = _core.kernel_table()
    if as_json:
        click.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        _print_report(Console(highlight=False), report)
    if refusal is not None:
        raise refusal


def describe_file(
    file: GGUFFile, config: ModelConfig | None, n_ctx: int | None = None, kv_type: str = "f16", *, tensors: bool = False
) -> dict[str, Any]:
    """Return the report on a file, ready for JSON.

    config: None if phi-c cannot run the file. n_ctx, kv_type: see `memory`. tensors: include a list of all tensors.
    """
    by_type: dict[str, dict[str, int]] = {}
    for info in file.tensors.values():
        row = by_type.setdefault(_core.TENSOR_TYPES[info.type_id].name, {"count": 0, "n_bytes": 0})
        row["count"] += 1
        row["n_bytes"] += info.n_bytes
    report: dict[str, Any] = {
        "path": str(file.path),
        "n_bytes": file.n_bytes,
        "version": file.version,
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "tensor_types": by_type,
        "config": dataclasses.asdict(config) if config else None,
        "memory": memory(file, config, n_ctx, kv_type) if config else None,
    }
    if tensors:
        report["tensors"] = [
            {
                "name": info.name,
                "type": _core.TENSOR_TYPES[info.type_id].name,
                "shape": list(info.shape),
                "n_bytes": info.n_bytes,
            }
            for info in file.tensors.values()
        ]
    return report


def memory(file: GGUFFile, config: ModelConfig, n_ctx: int | None, kv_type: str = "f16") -> dict[str, int]:
    """Return an estimate of the memory that a model needs, in bytes: weights (mapped from the file) and KV cache.

    n_ctx: context size in tokens; None: the default of `phi_c.load`. kv_type: "f16" or "q8". The KV cache is allocated
    in whole pages. Raises OptionError if n_ctx is above the model's maximum.
    """
    if n_ctx is not None and n_ctx > config.n_ctx_train:
        raise OptionError(f"--ctx-size is {n_ctx}, expected at most {config.n_ctx_train}, the model's maximum")
    n_ctx = n_ctx or min(config.n_ctx_train, _DEFAULT_N_CTX)
    weights = sum(info.n_bytes for info in file.tensors.values())
    kv_bytes = math.ceil(n_ctx / _core.PAGE_TOKENS) * _core.kv_page_bytes(config, kv_type)
    return {"n_ctx": n_ctx, "weights_bytes": weights, "kv_bytes": kv_bytes, "total_bytes": weights + kv_bytes}


def _plain(value: MetadataValue) -> Any:
    """Return a metadata value for JSON; a long array becomes its length and its first items."""
    if isinstance(value, np.ndarray | list):
        items = [_plain(item) for item in value[:_MAX_ITEMS]]
        return items if len(value) <= _MAX_ITEMS else {"n_items": len(value), "first": items}
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print_report(console: Console, report: Mapping[str, Any]) -> None:
    if "path" in report:
        console.print(_overview(report))
        console.print(_metadata_table(report["metadata"]))
        console.print(_types_table(report["tensor_types"]))
    if "tensors" in report:
        console.print(_tensors_table(report["tensors"]))
    if "kernels" in report:
        console.print(kernels_table(report["kernels"]))


def _overview(report: Mapping[str, Any]) -> Table:
    config, memory_ = report["config"], report["memory"]
    rows = [
        ("file", Path(report["path"]).name),
        ("size", f"{decimal(report['n_bytes'])}, GGUF version {report['version']}"),
    ]
    if config:
        rows += [
            ("model", f"{config['name']} ({config['architecture']})"),
            (
                "shape",
                f"{config['n_layers']} layers, hidden {config['n_embd']}, feed-forward {config['n_ffn']}, "
                f"{config['n_heads']} heads and {config['n_kv_heads']} KV heads of {config['head_dim']}, "
                f"vocabulary {config['n_vocab']}",
            ),
            ("context", f"{config['n_ctx_train']} tokens, sliding window {config['window'] or 'none'}"),
            (
                "memory",
                f"{decimal(memory_['total_bytes'])} at a context of {memory_['n_ctx']} tokens: weights "
                f"{decimal(memory_['weights_bytes'])} (mapped), KV cache {decimal(memory_['kv_bytes'])}",
            ),
        ]
    else:
        rows.append(("model", "phi-c cannot run this file"))
    return name_value_table((name, _printable(value)) for name, value in rows)


def _metadata_table(metadata: Mapping[str, Any]) -> Table:
    table = _table("Metadata", "key", "value")
    for key, value in metadata.items():
        if isinstance(value, dict):
            first = json.dumps(value["first"], ensure_ascii=False)[:-1]
            shown = f"{first}, ...] ({value['n_items']} items)"
        else:
            shown = _scalar(value)
        if len(shown) > _MAX_CHARACTERS:
            shown = f"{shown[:_MAX_CHARACTERS]}... ({len(shown)} characters)"
        table.add_row(_text(key), _text(shown))
    return table


def _scalar(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"  # float32 in most files
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _types_table(types: Mapping[str, Mapping[str, int]]) -> Table:
    table = _table("Tensors by type", "type", "tensors", "size")
    for name, row in types.items():
        table.add_row(name, str(row["count"]), decimal(row["n_bytes"]))
    table.add_row(
        "all",
        str(sum(row["count"] for row in types.values())),
        decimal(sum(row["n_bytes"] for row in types.values())),
    )
    return table


def _tensors_table(tensors: list[dict[str, Any]]) -> Table:
    table = _table("Tensors", "name", "type", "shape", "size")
    for row in tensors:
        table.add_row(_text(row["name"]), row["type"], " x ".join(map(str, row["shape"])), decimal(row["n_bytes"]))
    return table


def kernels_table(kernels: Mapping[str, Mapping[str, str]]) -> Table:
    """Return the table of tensor type x tier: "native", or the lower tier whose kernel is used."""
    table = _table("Kernels", "type", *kernels)
    for type_name in next(iter(kernels.values()), {}):
        providers = ((tier, types[type_name]) for tier, types in kernels.items())
        table.add_row(type_name, *("native" if tier == by else f"from {by}" for tier, by in providers))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(
            column, overflow="fold", no_wrap=i == 0
        )  # names are not broken, so that they can be searched for
    return table


def _text(text: str) -> Text:
    """Return a string of a file for a table: without rich's markup, control characters escaped."""
    return Text(_printable(text))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
