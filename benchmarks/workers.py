"""One function per engine that measures prefill, decode and batched decode speed. compare.py runs them.

A worker loads the model, warms it up, measures once, and returns tokens per second: {"prefill": float, "decode": float,
"batch": {n_seqs: float}}. batch is empty if the engine's API has no batched decoding. Imports are inside the functions,
because each worker runs in its own process and interpreter. Decoding is greedy and ignores end-of-generation tokens.
"""

import ctypes
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """What to measure."""

    model: str  # path of a GGUF file
    n_threads: int
    n_prefill: int  # tokens of the prompt
    n_decode: int  # generated tokens per sequence
    n_seqs: tuple[int, ...]  # batch sizes to measure, sequences


def phi_c(task: Task) -> dict[str, Any]:
    """phi-c, measured by phi_c.bench; PHI_C_ISA selects the tier."""
    from phi_c.bench.speed import Workload, measure

    workload = Workload(task.n_prefill, task.n_decode, task.n_seqs, n_repeats=1)
    result = measure(task.model, workload, n_threads=task.n_threads)
    batch = {row["n_seqs"]: row["tok_s"] for row in result["batch"]}
    return {"prefill": result["prefill_tok_s"], "decode": result["decode_tok_s"], "batch": batch}


def llama_cpp_python(task: Task) -> dict[str, Any]:
    """llama.cpp through llama_decode, called as in llama-bench and llama-batched-bench."""
    import llama_cpp as lib

    lib.llama_log_set(_null_logger(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(task.model.encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {task.model}")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    single = _LlamaContext(lib, model, n_vocab, task, 1, task.n_prefill + 1)
    single.run([[1] * 8])
    single.clear()
    seconds = _seconds(lambda: single.run([_random_ids(n_vocab, task.n_prefill)]))
    single.clear()
    decode = single.decode(1, task.n_decode)
    single.close()
    batch = {}
    for n in task.n_seqs:
        batched = _LlamaContext(lib, model, n_vocab, task, n, task.n_decode + 2)
        batch[n] = batched.decode(n, task.n_decode)
        batched.close()
    return {"prefill": task.n_prefill / seconds, "decode": decode, "batch": batch}


def _null_logger(lib: Any) -> Any:
    callback = lib.llama_log_callback(lambda level, text, data: None)
    _CALLBACKS.append(callback)
    return callback


_CALLBACKS: list[Any] = []  # llama.cpp keeps pointers to them


class _LlamaContext:
    """A llama.cpp context for n_seqs sequences of n_each tokens."""

    def __init__(self, lib: Any, model: Any, n_vocab: int, task: Task, n_seqs: int, n_each: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = max(n_each, task.n_decode + 2, 64) * n_seqs
        params.n_seq_max = n_seqs
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = task.n_threads
        self._lib, self._n_vocab = lib, n_vocab
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not create a context")
        self._n_past = [0] * n_seqs

    def run(self, tokens: list[list[int]]) -> list[int]:
        """Append tokens to each sequence; return the most probable next token of each."""
        import numpy as np

        lib = self._lib
        batch = lib.llama_batch_init(sum(map(len, tokens)), 0, 1)
        n, last_rows = 0, []
        for sequence, ids in enumerate(tokens):
            for token in ids:
                batch.token[n], batch.pos[n] = token, self._n_past[sequence]
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = False
                self._n_past[sequence] += 1
                n += 1
            batch.logits[n - 1] = True
            last_rows.append(n - 1)
        batch.n_tokens = n
        if lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        pointers = [lib.llama_get_logits_ith(self._context, row) for row in last_rows]
        best = [int(np.ctypeslib.as_array(pointer, (self._n_vocab,)).argmax()) for pointer in pointers]
        lib.llama_batch_free(batch)
        return best

    def decode(self, n_seqs: int, n_tokens: int) -> float:
        """Return tokens per second of decoding n_tokens in each of n_seqs sequences, after a one-token prompt."""
        tokens = self.run([_random_ids(self._n_vocab, 1) for _ in range(n_seqs)])
        start = time.perf_counter()
        for _ in range(n_tokens):
            tokens = self.run([[token] for token in tokens])
        return n_seqs * n_tokens / (time.perf_counter() - start)

    def clear(self) -> None:
        """Remove all sequences from the KV cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._n_past = [0] * len(self._n_past)

    def close(self) -> None:
        """Free the context."""
        self._lib.llama_free(self._context)


def xllamacpp(task: Task) -> dict[str, Any]:
    """llama.cpp's server in this process, with its own timings; a batch is several concurrent requests."""
    import xllamacpp as lib

    params = lib.CommonParams()
    params.model.path = task.model
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task.n_threads
    params.n_parallel = max([*task.n_seqs, 1])
    params.kv_unified = True
    params.n_ctx = max(params.n_parallel * (task.n_decode + 32), task.n_prefill + task.n_decode + 32)
    params.n_batch = params.n_ubatch = 512
    params.verbosity = 0
    server = lib.Server(params)

    def complete(n_prompt: int, n_tokens: int) -> dict[str, float]:
        answer = server.handle_completions(
            {
                "prompt": _random_ids(30000, n_prompt),
                "n_predict": n_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings: dict[str, float] = answer["timings"]
        return timings

    complete(8, 2)
    prefill = complete(task.n_prefill, 1)["prompt_per_second"]
    decode = complete(1, task.n_decode + 1)["predicted_per_second"]
    batch = {n: _concurrent(n, task.n_decode, lambda: complete(1, task.n_decode)) for n in task.n_seqs}
    return {"prefill": prefill, "decode": decode, "batch": batch}


def mistralrs(task: Task) -> dict[str, Any]:
    """mistral.rs, with its own timings.

    Its prompt is text, so it has only about n_prefill tokens. No batches: its Python API rejects concurrent calls.
    """
    import mistralrs as lib

    path = Path(task.model)
    runner = lib.Runner(
        lib.Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name),
        prefix_cache_n=0,
    )

    def complete(text: str, n_tokens: int) -> Any:
        request = lib.CompletionRequest(
            prompt=text, model="default", max_tokens=n_tokens, temperature=0.0, ignore_eos=True
        )
        return runner.send_completion_request(request).usage

    complete("Hello", 2)
    words = ["one", "two", "three", "apple", "river", "stone", "green", "because", "under", "water", "light"]
    text = ""
    while len(runner.tokenize_text(text, False, None)) < task.n_prefill:
        text += " ".join(random.choices(words, k=20)) + " "
    usage = complete(text, 2)
    prefill = usage.prompt_tokens / usage.total_prompt_time_sec
    usage = complete("Hello", task.n_decode + 1)
    decode = task.n_decode / usage.total_completion_time_sec
    return {"prefill": prefill, "decode": decode, "batch": {}}


def _concurrent(n_seqs: int, n_tokens: int, send: Callable[[], Any]) -> float:
    """Return tokens per second of n_seqs concurrent requests that generate n_tokens each."""
    threads = [threading.Thread(target=send) for _ in range(n_seqs)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return n_seqs * n_tokens / _seconds(run)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _random_ids(n_vocab: int, n_tokens: int) -> list[int]:
    return [random.randrange(300, min(n_vocab, 30000)) for _ in range(n_tokens)]


WORKERS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "phi-c": phi_c,
    "llama-cpp-python": llama_cpp_python,
    "xllamacpp": xllamacpp,
    "mistralrs": mistralrs,
}
