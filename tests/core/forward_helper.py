"""A model ready for `_core.forward`, and a sequence on pages in random order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_c import _core
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import read_config
from phi_c.model.weights import load_weights

Floats = npt.NDArray[np.float32]


class Runner:
    """Runs a sequence of tokens through a file's model."""

    def __init__(
        self, path: Path, *, tier: str | None = None, n_threads: int = 2, n_pages: int = 64, kv_type: str = "f16"
    ) -> None:
        self.file = GGUFFile(path)
        self.config = read_config(self.file)
        weights = load_weights(self.file, self.config)
        self.model = _core.Model(self.config, weights, n_threads=n_threads, tier=tier)
        self.kv = _core.KvCache(self.model, n_pages, kv_type)

    def table(self, seed: int = 0, start: int = 0, end: int | None = None) -> npt.NDArray[np.int32]:
        """Return a page table: pages start to end - 1 of the cache in random order."""
        pages = np.arange(start, self.kv.n_pages if end is None else end, dtype=np.int32)
        return np.random.default_rng(seed).permutation(pages).astype(np.int32)

    def run(
        self,
        tokens: Sequence[int],
        start: int = 0,
        *,
        table: npt.NDArray[np.int32] | None = None,
        long_rope: bool = False,
        cancel: _core.CancelFlag | None = None,
        observer: _core.Observer | None = None,
        timings: _core.Timings | None = None,
    ) -> Floats:
        """Return the logits of tokens at positions start, start + 1, ...: float32 [n_tokens, n_vocab]."""
        n = len(tokens)
        return _core.forward(
            self.model,
            self.kv,
            np.asarray(tokens, np.int32),
            np.arange(start, start + n, dtype=np.int32),
            np.zeros(n, np.int32),
            [self.table() if table is None else table],
            [long_rope],
            np.arange(n, dtype=np.int32),
            cancel,
            observer,
            timings=timings,
        )
