"""A model as a transformers folder and as the converted GGUF file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass
class Converted:
    """A model folder, its GGUF file, and a cache of transformers' logits."""

    folder: Path
    gguf: Path
    n_tokens: int  # size of the tokenizer's vocabulary
    logits: dict[tuple[int, ...], Floats] = field(default_factory=dict)

    def expected(self, tokens: Sequence[int]) -> Floats:
        """Return transformers' logits, float32 [n_tokens, n_vocab]."""
        from reference_models import reference_logits

        key = tuple(tokens)
        if key not in self.logits:
            self.logits[key] = reference_logits(self.folder, tokens)
        return self.logits[key]


Convert = Callable[..., Converted]
