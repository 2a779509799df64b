"""What each engine is asked to do: read a prompt, write a text, write several together. compare.py runs these.

A worker loads the model, warms it up, measures once, and returns tokens a second: {"prefill": float, "decode": float,
"batch": {n_seqs: float}}; batch is empty where an engine's API cannot. Imports are inside the functions: a worker runs
in a process, and an interpreter, of its own. Texts end after the number of tokens asked for, whatever the model says;
every choice is the likeliest token.
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
    n_decode: int  # tokens of each text
    n_seqs: tuple[int, ...]  # texts written together


def phi_c(task: Task) -> dict[str, Any]:
    """phi-c's own measurement; PHI_C_ISA chooses the tier."""
    from phi_c.bench.speed import Workload, measure

    workload = Workload(task.n_prefill, task.n_decode, task.n_seqs, n_repeats=1)
    found = measure(task.model, workload, n_threads=task.n_threads)
    batch = {row["n_seqs"]: row["tok_s"] for row in found["batch"]}
    return {"prefill": found["prefill_tok_s"], "decode": found["decode_tok_s"], "batch": batch}


def llama_cpp_python(task: Task) -> dict[str, Any]:
    """llama.cpp through llama_decode, as its own llama-bench and llama-batched-bench call it."""
    import llama_cpp as lib

    lib.llama_log_set(_silent(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(task.model.encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {task.model}")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    one = _LlamaContext(lib, model, n_vocab, task, 1, task.n_prefill + 1)
    one.run([[1] * 8])
    one.clear()
    seconds = _seconds(lambda: one.run([_ids(n_vocab, task.n_prefill)]))
    one.clear()
    decode = one.decode(1, task.n_decode)
    one.close()
    batch = {}
    for n in task.n_seqs:
        many = _LlamaContext(lib, model, n_vocab, task, n, task.n_decode + 2)
        batch[n] = many.decode(n, task.n_decode)
        many.close()
    return {"prefill": task.n_prefill / seconds, "decode": decode, "batch": batch}


def _silent(lib: Any) -> Any:
    silent = lib.llama_log_callback(lambda level, text, data: None)
    _KEPT.append(silent)  # C holds it
    return silent


_KEPT: list[Any] = []


class _LlamaContext:
    """A context of llama.cpp with room for n_seqs sequences of n_each tokens."""

    def __init__(self, lib: Any, model: Any, n_vocab: int, task: Task, n_seqs: int, n_each: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = max(n_each, task.n_decode + 2, 64) * n_seqs
        params.n_seq_max = n_seqs
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = task.n_threads
        self._lib, self._n_vocab = lib, n_vocab
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._n_past = [0] * n_seqs

    def run(self, tokens: list[list[int]]) -> list[int]:
        """Compute more tokens of each sequence; return the likeliest next one of each."""
        import numpy as np

        lib = self._lib
        batch = lib.llama_batch_init(sum(map(len, tokens)), 0, 1)
        n, rows = 0, []
        for sequence, ids in enumerate(tokens):
            for token in ids:
                batch.token[n], batch.pos[n] = token, self._n_past[sequence]
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = False
                self._n_past[sequence] += 1
                n += 1
            batch.logits[n - 1] = True
            rows.append(n - 1)
        batch.n_tokens = n
        if lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        logits = [np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, row), (self._n_vocab,)) for row in rows]
        likeliest = [int(row.argmax()) for row in logits]
        lib.llama_batch_free(batch)
        return likeliest

    def decode(self, n_seqs: int, n_tokens: int) -> float:
        """Return the tokens a second of n_seqs texts of n_tokens after their first one."""
        tokens = self.run([_ids(self._n_vocab, 1) for _ in range(n_seqs)])
        start = time.perf_counter()
        for _ in range(n_tokens):
            tokens = self.run([[token] for token in tokens])
        return n_seqs * n_tokens / (time.perf_counter() - start)

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._n_past = [0] * len(self._n_past)

    def close(self) -> None:
        """Free the context."""
        self._lib.llama_free(self._context)


def xllamacpp(task: Task) -> dict[str, Any]:
    """llama.cpp's server in the process, with its own timings; its batches are requests that run together."""
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

    def ask(n_prompt: int, n_tokens: int) -> dict[str, float]:
        answer = server.handle_completions(
            {
                "prompt": _ids(30000, n_prompt),
                "n_predict": n_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings: dict[str, float] = answer["timings"]
        return timings

    ask(8, 2)
    prefill = ask(task.n_prefill, 1)["prompt_per_second"]
    decode = ask(1, task.n_decode + 1)["predicted_per_second"]
    batch = {n: _together(n, task.n_decode, lambda: ask(1, task.n_decode)) for n in task.n_seqs}
    return {"prefill": prefill, "decode": decode, "batch": batch}


def mistralrs(task: Task) -> dict[str, Any]:
    """mistral.rs with its own timings. It takes text, so its prompt is about as long as the others'; no batches: its
    Python object refuses a second call while one runs."""
    import mistralrs as lib

    path = Path(task.model)
    runner = lib.Runner(
        lib.Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name),
        prefix_cache_n=0,
    )

    def ask(text: str, n_tokens: int) -> Any:
        request = lib.CompletionRequest(
            prompt=text, model="default", max_tokens=n_tokens, temperature=0.0, ignore_eos=True
        )
        return runner.send_completion_request(request).usage

    ask("Hello", 2)
    words = ["one", "two", "three", "apple", "river", "stone", "green", "because", "under", "water", "light"]
    text = ""
    while len(runner.tokenize_text(text, False, None)) < task.n_prefill:
        text += " ".join(random.choices(words, k=20)) + " "
    usage = ask(text, 2)
    prefill = usage.prompt_tokens / usage.total_prompt_time_sec
    usage = ask("Hello", task.n_decode + 1)
    decode = task.n_decode / usage.total_completion_time_sec
    return {"prefill": prefill, "decode": decode, "batch": {}}


def _together(n_seqs: int, n_tokens: int, ask: Callable[[], Any]) -> float:
    """Return the tokens a second of n_seqs requests of n_tokens that begin at once."""
    threads = [threading.Thread(target=ask) for _ in range(n_seqs)]

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


def _ids(n_vocab: int, n_tokens: int) -> list[int]:
    return [random.randrange(300, min(n_vocab, 30000)) for _ in range(n_tokens)]


WORKERS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "phi-c": phi_c,
    "llama-cpp-python": llama_cpp_python,
    "xllamacpp": xllamacpp,
    "mistralrs": mistralrs,
}
