"""Run Microsoft's Phi models from GGUF files on a CPU.

>>> import phi_c
>>> llm = phi_c.load("smollm2")
>>> print(llm.generate("Why is the sky blue?").text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi_c._core import CancelFlag
    from phi_c.engine.saved_state import StateSummary
    from phi_c.errors import PhiError
    from phi_c.evaluate import compare, perplexity
    from phi_c.llm import LLM, load
    from phi_c.quantize.calibration import collect_imatrix
    from phi_c.quantize.run import quantize_model
    from phi_c.results import Chunk, Completion, Score, Usage
    from phi_c.sampling.params import SamplingParams
    from phi_c.sampling.sampler import TokenLogprob

__all__ = [
    "LLM",
    "CancelFlag",
    "Chunk",
    "Completion",
    "PhiError",
    "SamplingParams",
    "Score",
    "StateSummary",
    "TokenLogprob",
    "Usage",
    "collect_imatrix",
    "compare",
    "load",
    "perplexity",
    "quantize_model",
]

_MODULES = {
    "CancelFlag": "phi_c._core",
    "collect_imatrix": "phi_c.quantize.calibration",
    "compare": "phi_c.evaluate",
    "perplexity": "phi_c.evaluate",
    "PhiError": "phi_c.errors",
    "Completion": "phi_c.results",
    "Chunk": "phi_c.results",
    "Score": "phi_c.results",
    "SamplingParams": "phi_c.sampling.params",
    "StateSummary": "phi_c.engine.saved_state",
    "TokenLogprob": "phi_c.sampling.sampler",
    "Usage": "phi_c.results",
    "quantize_model": "phi_c.quantize.run",
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `phi-c --help` starts without NumPy and tokenizers.
    if name in __all__:
        return getattr(importlib.import_module(_MODULES.get(name, "phi_c.llm")), name)
    raise AttributeError(f"module 'phi_c' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
