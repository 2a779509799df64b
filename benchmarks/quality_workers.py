"""Compare an engine's logits with float32 logits, position by position. quality.py runs this once per engine.

    python benchmarks/quality_workers.py NAME    # a Task as JSON on stdin; the result is the last line of stdout

Engines are imported inside functions: apart from its engine, a worker's interpreter needs only NumPy.
"""

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """What to measure."""

    model: str  # path of a GGUF file
    windows: list[list[int]]  # token ids, each window an independent sequence
    n_threads: int
    metrics: str  # path of phi_c.evaluate.metrics
    reference: str  # path of the reference logits, .npy, float32 [n_windows, n_tokens, n_vocab]


def phi_c(task: Task) -> Iterator[Floats]:
    """Yield phi-c's logits of each window, float32 [n_tokens, n_vocab]. PHI_C_ISA sets the tier."""
    import phi_c

    with phi_c.load(task.model, n_ctx=len(task.windows[0]), n_threads=task.n_threads) as llm:
        for window in task.windows:
            yield llm.logits(window)


def llama_cpp_python(task: Task) -> Iterator[Floats]:
    """Yield llama.cpp's logits of each window, float32 [n_tokens, n_vocab], with its default f16 KV cache."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(task.model.encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {task.model}")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    n_tokens = len(task.windows[0])
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
    params.n_threads = params.n_threads_batch = task.n_threads
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(n_tokens, 0, 1)
    for window in task.windows:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = n_tokens
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        yield np.ctypeslib.as_array(lib.llama_get_logits(context), (n_tokens, n_vocab)).copy()


def write_reference(task: Task) -> dict[str, Any]:
    """Write phi-c's logits to the reference file."""
    out = None
    for i, logits in enumerate(phi_c(task)):
        if out is None:
            shape = (len(task.windows), *logits.shape)
            out = np.lib.format.open_memmap(task.reference, "w+", np.float32, shape)
        out[i] = logits
    if out is not None:
        out.flush()
    return {}


def compare(engine: Callable[[Task], Iterator[Floats]], task: Task) -> dict[str, Any]:
    """Return an engine's distances from the reference, lists [n_windows][n_tokens] by name (phi_c.evaluate.metrics)."""
    token_metrics = _load_metrics(task.metrics)
    reference = np.load(task.reference, mmap_mode="r")
    results: dict[str, Any] = {"kl": [], "top1_agreement": [], "nll": [], "reference_nll": []}
    for window, expected, logits in zip(task.windows, reference, engine(task), strict=True):
        for name, values in token_metrics(expected, logits, np.asarray(window[1:])).items():
            results[name].append(values.tolist())
    return results


def _load_metrics(path: str) -> Callable[..., dict[str, npt.NDArray[Any]]]:
    """Load phi_c.evaluate.metrics.token_metrics from its file, since the interpreter may not have phi_c."""
    spec = importlib.util.spec_from_file_location("metrics", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., dict[str, npt.NDArray[Any]]] = module.token_metrics
    return function


ENGINES: dict[str, Callable[[Task], Iterator[Floats]]] = {
    "phi-c": phi_c,
    "llama-cpp-python": llama_cpp_python,
}


def main() -> None:
    name, task = sys.argv[1], Task(**json.load(sys.stdin))
    result = write_reference(task) if name == "reference" else compare(ENGINES[name], task)
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # does not wait for threads that an engine left running


if __name__ == "__main__":
    main()
