"""Collects an importance matrix by running a model over a calibration text.

The text is split as in llama.cpp's tools/imatrix: into chunks of n_ctx tokens, each an independent sequence that starts
with BOS if the model uses one. A last chunk that is too short is dropped.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from phi_c._core import KvCache, Observer, forward
from phi_c.engine.scheduler import pages_for
from phi_c.errors import ModelFileError
from phi_c.gguf.reader import GGUFFile
from phi_c.llm import LLM
from phi_c.model.config import ModelConfig, expected_tensors
from phi_c.params import check_count
from phi_c.quantize.imatrix import DEFAULT_CHUNK_SIZE, Entry, Imatrix
from phi_c.text.windows import disjoint

_MAX_SUM = 1e32  # per chunk, so that a million chunks fit float32, the type of the file

# The array of an Observer that has the sums for each kind of weight matrix.
_INPUTS = {
    "attn_qkv": "attn_in",
    "attn_q": "attn_in",
    "attn_k": "attn_in",
    "attn_v": "attn_in",
    "attn_output": "attn_out",
    "ffn_gate": "ffn_in",
    "ffn_up": "ffn_in",
    "ffn_down": "ffn_inner",
    "ffn_gate_inp": "ffn_in",
    "ffn_gate_exps": "expert_in",
    "ffn_up_exps": "expert_in",
    "ffn_down_exps": "expert_inner",
}


def collect_imatrix(
    llm: LLM,
    text: str,
    *,
    n_ctx: int = DEFAULT_CHUNK_SIZE,
    first_chunk: int = 0,
    n_chunks: int | None = None,
    process_output: bool = False,
    parse_special: bool = False,
    into: Imatrix | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imatrix:
    """Return the importance matrix of a model for a calibration text.

    n_ctx: tokens per chunk, at most the context size of `llm`.
    first_chunk: number of chunks to skip.
    n_chunks: maximum number of chunks; None: all.
    process_output: include output.weight, if the file has it.
    parse_special: parse special tokens such as `<|end|>` in the text.
    into: importance matrix to add to. After an exception such as KeyboardInterrupt it contains all completed chunks.
    progress: called with (completed chunks, total chunks).

    Raises OptionError if the text is too short, ModelFileError if `into` belongs to another model or activations are
    not finite.
    """
    check_count("n_ctx", n_ctx, 1, llm.n_ctx)
    check_count("first_chunk", first_chunk, 0, None)
    check_count("n_chunks", n_chunks, 1, None)
    imatrix = Imatrix(n_ctx) if into is None else into
    has_output = process_output and _has_output(llm)
    inputs = _inputs(llm.config, has_output)
    _check_same_model(llm, imatrix)
    ids = llm.tokenizer.encode(text, parse_special=parse_special)
    windows = disjoint(llm.tokenizer, ids, n_ctx, n_chunks, first_chunk)
    observer = Observer(llm.engine.model, output=has_output)
    kv = KvCache(llm.engine.model, pages_for(n_ctx))
    progress(0, len(windows))
    for done, window in enumerate(windows, 1):
        observer.clear()
        _forward_chunk(llm, kv, np.asarray(window.tokens, np.int32), observer)
        imatrix.merge(_chunk_imatrix(inputs, observer, llm))
        progress(done, len(windows))
    return imatrix


def _inputs(config: ModelConfig, has_output: bool) -> dict[str, tuple[str, int]]:
    """Return tensor name -> (array of Observer, layer); a fused matrix is one tensor, as in the file."""
    inputs = {}
    for name, shape in expected_tensors(config)[0].items():
        if name.startswith("blk.") and len(shape) > 1:
            _, layer, kind, _ = name.split(".")
            inputs[name] = _INPUTS[kind], int(layer)
    if has_output:
        inputs["output.weight"] = "output", 0
    return inputs


def _has_output(llm: LLM) -> bool:
    with GGUFFile(llm.path) as file:
        return "output.weight" in file.tensors


def _check_same_model(llm: LLM, imatrix: Imatrix) -> None:
    required, optional = expected_tensors(llm.config)
    shapes = required | optional
    for name, entry in imatrix.entries.items():
        shape = shapes.get(name, (0, 0))
        n_cols, expected = entry.sums.size, shape[-1] * (shape[0] if len(shape) == 3 else 1)  # of all experts
        if n_cols != expected:
            in_model = f"{expected} columns in {llm.path.name}" if expected else f"does not exist in {llm.path.name}"
            raise ModelFileError(
                f"the importance matrix belongs to another model: {name} has {n_cols} columns in it and {in_model}"
            )


def _forward_chunk(llm: LLM, kv: KvCache, tokens: npt.NDArray[np.int32], observer: Observer) -> None:
    long_rope = llm.engine.scheduler.needs_long_rope(len(tokens))
    page_table = np.arange(kv.n_pages, dtype=np.int32)
    no_logits = np.empty(0, np.int32)
    for start in range(0, len(tokens), llm.engine.scheduler.n_batch):
        batch = tokens[start : start + llm.engine.scheduler.n_batch]
        positions = np.arange(start, start + len(batch), dtype=np.int32)
        sequences = np.zeros(len(batch), np.int32)
        forward(llm.engine.model, kv, batch, positions, sequences, [page_table], [long_rope], no_logits, None, observer)


def _chunk_imatrix(inputs: dict[str, tuple[str, int]], observer: Observer, llm: LLM) -> Imatrix:
    all_tokens = np.array([observer.n_tokens], np.int64)
    chunk = Imatrix()
    for name, (array, layer) in inputs.items():
        if array.startswith("expert_"):
            sums, counts = getattr(observer, array)[layer].copy(), observer.expert_tokens[layer].copy()
        else:
            sums, counts = np.atleast_2d(getattr(observer, array))[layer : layer + 1].copy(), all_tokens
        if not (sums <= _MAX_SUM).all():  # false for NaN
            raise ModelFileError(f"{llm.path}: the inputs of {name!r} are not finite: the weights are corrupt")
        chunk.entries[name] = Entry(sums, counts)
    return chunk
