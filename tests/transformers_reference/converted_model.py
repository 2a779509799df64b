"""A model in both forms: transformers' folder and our GGUF file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass
class Converted:
    """A model's folder and its GGUF file."""

    folder: Path
    gguf: Path
    n_tokens: int  # of the vocabulary
    logits: dict[tuple[int, ...], Floats] = field(default_factory=dict)

    def expected(self, tokens: Sequence[int]) -> Floats:
        """Return transformers' logits."""
        from reference_models import reference_logits

        key = tuple(tokens)
        if key not in self.logits:
            self.logits[key] = reference_logits(self.folder, tokens)
        return self.logits[key]


Convert = Callable[..., Converted]
