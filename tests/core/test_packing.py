"""Packing a model: from the file or from its mapping, in the order of Weights.packed_sizes, and interrupted."""

import _thread
import dataclasses
import functools
import io
import itertools
import signal
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from phi_c import _core
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import read_config
from phi_c.model.weights import load_weights
from tiny_gguf import write_tiny

pytestmark = pytest.mark.skipif(_core.default_tier() == "scalar", reason="the scalar tier packs no weights")


def pack(path: Path, n_threads: int = 2, **replaced: Any) -> bytes:
    """Return the packed weights of a model. replaced: attributes of the file."""
    with GGUFFile(path) as file:
        config = read_config(file)
        weights = load_weights(file, config)
        attributes = {name: getattr(file, name) for name in ("all_data", "data_offset", "fileno", "release")}
        weights = dataclasses.replace(weights, file=SimpleNamespace(**attributes | replaced))
        model = _core.Model(config, weights, n_threads=n_threads)
        packed = io.BytesIO()
        model.write_panels(packed)
        assert len(packed.getvalue()) == model.packed_bytes == sum(weights.packed_sizes(None))
        return packed.getvalue()


@pytest.mark.parametrize("architecture", ["phi3", "phi2", "phimoe"])
def test_file_and_mapping_have_the_same_packed_bytes(tmp_path: Path, architecture: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", architecture)
    from_file = pack(path)
    assert pack(path, n_threads=1) == from_file
    assert pack(path, fileno=lambda: -1) == from_file
    with (tmp_path / "empty").open("wb+") as empty:  # read to its end, the rest through the mapping
        assert pack(path, fileno=empty.fileno) == from_file


def test_mapped_pages_are_released_once(tmp_path: Path) -> None:
    events: list[str] = []
    pack(write_tiny(tmp_path / "tiny.gguf"), release=lambda: events.append("release"))
    assert events == ["release"]


def test_interrupt_ends_packing(tmp_path: Path) -> None:
    """A signal that arrives while the C code packs is handled there: before `release`, which follows it."""
    events: list[str] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        events.append("signal")
        raise KeyboardInterrupt

    # C functions only: a Python function would handle the signal before packing starts. Yields one descriptor.
    fileno = functools.partial(next, itertools.filterfalse(_thread.interrupt_main, [int(signal.SIGINT)]))
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            pack(write_tiny(tmp_path / "tiny.gguf"), fileno=fileno, release=functools.partial(events.append, "release"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == ["signal", "release"]
