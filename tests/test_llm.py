"""The public interface on tiny models: options, threads, cancellation and errors."""

import gc
import math
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi_c
from phi_c import machine
from phi_c.engine.outputs import MAX_UNREAD_TOKENS
from phi_c.errors import (
    ChatTemplateError,
    ContextLengthError,
    MemoryLimitError,
    ModelClosedError,
    ModelNotFoundError,
    OptionError,
    PhiError,
    UnsupportedModelError,
)
from reference import Reference
from tiny_gguf import write_tiny

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0")


@pytest.fixture
def llm(path: Path) -> Iterator[phi_c.LLM]:
    with phi_c.load(path, n_threads=2) as loaded:
        yield loaded


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Switch threads every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_generate_stream_and_chat_agree(llm: phi_c.LLM) -> None:
    out = llm.generate("Once upon", max_tokens=16, temperature=0, raw=True)
    assert out.usage.completion_tokens == len(out.tokens) <= 16
    assert out.finish_reason in ("stop", "length")
    chunks = list(llm.stream("Once upon", max_tokens=16, temperature=0, raw=True))
    assert "".join(c.text for c in chunks) == out.text
    assert [t for c in chunks for t in c.tokens] == out.tokens
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == out.finish_reason
    assert llm.chat([{"role": "user", "content": "Hi"}], max_tokens=3).usage.completion_tokens <= 3


def test_greedy_tokens_match_the_reference(llm: phi_c.LLM, path: Path) -> None:
    """Every token is the reference's most probable one, or within 0.15 of its logit."""
    prompt = llm.tokenizer.encode("the and")
    out = llm.generate(prompt, max_tokens=12, **GREEDY)
    tokens = prompt + out.tokens
    logits = Reference(path).logits(tokens)
    for i, token in enumerate(out.tokens):
        row = logits[len(prompt) - 1 + i]
        assert row[token] >= row.max() - 0.15


def test_layouts_give_similar_logits(llm: phi_c.LLM, path: Path) -> None:
    """The order of sums differs, so the logits agree up to rounding of the int8 activations."""
    tokens = list(range(5, 60))
    packed = llm.logits(tokens)
    with phi_c.load(path, layout="mmap") as from_file:
        assert ((from_file.logits(tokens) - packed) ** 2).sum() / (packed**2).sum() < 1e-3


def test_logits_match_the_reference_for_any_batch_size(llm: phi_c.LLM, path: Path) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(3, 300, 70)]
    got = llm.logits(tokens)
    assert got.shape == (70, llm.config.n_vocab)
    assert got.dtype == np.float32
    expected = Reference(path).logits(tokens)
    assert ((got - expected) ** 2).sum() / (expected**2).sum() < 2e-3
    for n_batch in (1, 7, 64):
        with phi_c.load(path, n_batch=n_batch) as other:
            assert np.array_equal(other.logits(tokens), got)


def test_same_seed_gives_same_output(llm: phi_c.LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "seed": 5, "raw": True}
    first = llm.generate("the", **options)
    assert llm.generate("the", **options).tokens == first.tokens
    assert llm.generate("the", **{**options, "seed": 6}).tokens != first.tokens


def test_stop_string_ends_the_output(llm: phi_c.LLM) -> None:
    whole = llm.generate("the", max_tokens=30, raw=True, **GREEDY)
    middle = whole.text[5:8]
    out = llm.generate("the", max_tokens=30, raw=True, stop=middle, **GREEDY)
    assert out.text == whole.text[: whole.text.index(middle)]
    assert out.finish_reason == "stop"
    assert len(out.tokens) < len(whole.tokens)


def test_end_of_generation_token_ends_the_output(llm: phi_c.LLM) -> None:
    end = llm.tokenizer.encode("<|end|>", add_bos=False, parse_special=True)[0]
    out = llm.generate("the", raw=True, logit_bias={end: 1e6})
    assert (out.text, out.tokens, out.finish_reason) == ("", [end], "stop")


def test_logprobs_are_the_log_softmax_of_the_logits(llm: phi_c.LLM) -> None:
    prompt = llm.tokenizer.encode("the")
    out = llm.generate(prompt, max_tokens=5, logprobs=3, **GREEDY)
    assert out.logprobs is not None
    assert [item.token for item in out.logprobs] == out.tokens
    logits = llm.logits(prompt + out.tokens[:-1])[len(prompt) - 1 :].astype(np.float64)
    for item, row in zip(out.logprobs, logits, strict=True):
        expected = row[item.token] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert item.logprob == pytest.approx(expected, abs=1e-5)
        assert len(item.top) == 3
        assert item.top[0] == (item.token, item.logprob)
    assert llm.generate(prompt, max_tokens=2).logprobs is None


def test_chat_reuses_cached_turns(llm: phi_c.LLM) -> None:
    messages = [{"role": "user", "content": "the and " * 20}]
    first = llm.chat(messages, max_tokens=4, **GREEDY)
    assert first.usage.cached_tokens == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "in"}]
    second = llm.chat(messages, max_tokens=4, **GREEDY)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 64
    with phi_c.load(llm.path) as fresh:
        assert fresh.chat(messages, max_tokens=4, **GREEDY).tokens == second.tokens


def test_system_message_needs_the_chat_template(llm: phi_c.LLM) -> None:
    with_system = llm.generate("Hi", system="Be brief.", max_tokens=1)
    without = llm.generate("Hi", max_tokens=1)
    raw = llm.generate("Hi", raw=True, max_tokens=1)
    assert with_system.usage.prompt_tokens > without.usage.prompt_tokens > raw.usage.prompt_tokens
    with pytest.raises(OptionError, match="raw=True skips"):
        llm.generate("Hi", system="x", raw=True)
    with pytest.raises(OptionError, match="token ids skip"):
        llm.generate([1], system="x")


def test_parse_special_in_a_raw_prompt(llm: phi_c.LLM) -> None:
    plain = llm.generate("<|end|>", raw=True, max_tokens=1)
    special = llm.generate("<|end|>", raw=True, max_tokens=1, parse_special=True)
    assert plain.usage.prompt_tokens > special.usage.prompt_tokens == 2


def test_generation_up_to_the_end_of_the_context(path: Path) -> None:
    with phi_c.load(path, n_ctx=64) as llm:
        ban = dict.fromkeys(llm.tokenizer.eog_ids, -np.inf)
        out = llm.generate([1] * 60, logit_bias=ban)
        assert (len(out.tokens), out.finish_reason) == (5, "length")
        assert len(llm.generate([1] * 64, logit_bias=ban).tokens) == 1
        with pytest.raises(
            ContextLengthError, match=r"the prompt has 65 tokens, more than the context size of 64: .*\(at most 512\)"
        ):
            llm.generate([1] * 65)
        with pytest.raises(ContextLengthError):
            llm.logits([1] * 65)


def test_concurrent_calls_give_the_same_tokens_as_single_calls(llm: phi_c.LLM) -> None:
    prompts = ["the", "and in", "to of it is " * 9, "on"]
    alone = [llm.generate(p, raw=True, max_tokens=40, seed=3).tokens for p in prompts]
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        results[i] = llm.generate(prompts[i % 4], raw=True, max_tokens=40, seed=3).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(12)] == [alone[i % 4] for i in range(12)]


def test_concurrent_streams_yield_the_text_of_their_tokens(path: Path, fast_switching: None) -> None:
    n_threads = 4
    with phi_c.load(path, n_ctx=128, kv_cache_tokens=128 * n_threads) as llm:
        no_end = dict.fromkeys(llm.tokenizer.eog_ids, -math.inf)

        def run(seed: int) -> bool:
            chunks = list(llm.stream([5 + seed, 6, 7], max_tokens=40, temperature=1, seed=seed, logit_bias=no_end))
            tokens = [token for chunk in chunks for token in chunk.tokens]
            whole = llm.generate([5 + seed, 6, 7], max_tokens=40, temperature=1, seed=seed, logit_bias=no_end)
            return (tokens, "".join(chunk.text for chunk in chunks)) == (whole.tokens, whole.text)

        with ThreadPoolExecutor(n_threads) as pool:
            assert all(pool.map(run, range(4 * n_threads)))


def test_cancel_ends_a_stream(llm: phi_c.LLM) -> None:
    flag = phi_c.CancelFlag()
    ban = dict.fromkeys(llm.tokenizer.eog_ids, -np.inf)
    chunks = []
    for chunk in llm.stream("the", raw=True, cancel=flag, logit_bias=ban):
        chunks.append(chunk)
        if len(chunks) == 5:
            flag.set()
            n_read = sum(len(c.tokens) for c in chunks)
    assert chunks[-1].finish_reason == "cancelled"
    assert n_read <= sum(len(c.tokens) for c in chunks) <= n_read + MAX_UNREAD_TOKENS + 1
    assert llm.generate("the", max_tokens=2).usage.completion_tokens > 0


def n_available_pages(llm: phi_c.LLM) -> int:
    return llm.loop.call(lambda engine: engine.scheduler.n_available_pages)


def test_abandoned_stream_frees_its_pages(llm: phi_c.LLM) -> None:
    before = n_available_pages(llm)
    stream = llm.stream("the", raw=True, logit_bias=dict.fromkeys(llm.tokenizer.eog_ids, -np.inf))
    next(stream)
    assert n_available_pages(llm) < before
    del stream
    gc.collect()
    assert n_available_pages(llm) == before


def test_stream_garbage_collected_during_a_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector closes it in the engine's thread."""
    from phi_c.engine import engine

    llm, real = phi_c.load(path, n_threads=2), engine.forward
    before = n_available_pages(llm)
    stream = llm.stream("the", raw=True, logit_bias=dict.fromkeys(llm.tokenizer.eog_ids, -np.inf))
    next(stream)
    assert n_available_pages(llm) < before
    cycle: list[Any] = [stream]
    cycle.append(cycle)

    def collecting(*arguments: Any) -> Any:
        gc.collect()
        return real(*arguments)

    gc.disable()  # so that only the call inside the step collects it
    try:
        del stream, cycle
        monkeypatch.setattr(engine, "forward", collecting)
        caller = threading.Thread(target=lambda: llm.generate("and", raw=True, max_tokens=3), daemon=True)
        caller.start()
        caller.join(60)
    finally:
        gc.enable()
    assert not caller.is_alive(), "deadlock"
    assert n_available_pages(llm) == before
    llm.close()


def test_model_that_nobody_refers_to_ends_its_thread(path: Path) -> None:
    llm = phi_c.load(path)
    llm.generate("the", raw=True, max_tokens=2)
    (thread,) = [t for t in threading.enumerate() if t.name == "phi-c engine" and t is llm.loop._thread]
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_error_in_one_call_does_not_affect_another(llm: phi_c.LLM) -> None:
    """A call with a bias of minus infinity on every token fails while another one continues."""
    everything = dict.fromkeys(range(llm.config.n_vocab), -np.inf)
    good = llm.stream("the", raw=True, max_tokens=10)
    chunks = [next(good)]
    with pytest.raises(PhiError, match="the logits hold"):
        llm.generate("and", raw=True, max_tokens=3, logit_bias=everything)
    assert [*chunks, *good][-1].finish_reason in ("stop", "length")


def test_calls_after_close_raise(path: Path) -> None:
    llm = phi_c.load(path)
    stream = llm.stream("the", raw=True, logit_bias=dict.fromkeys(llm.tokenizer.eog_ids, -np.inf))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(ModelClosedError):
        next(stream)
    with pytest.raises(ModelClosedError):
        llm.generate("the")


def test_two_models_do_not_interfere(llm: phi_c.LLM, tmp_path: Path) -> None:
    expected = llm.generate("the", raw=True, max_tokens=8, **GREEDY).tokens
    with phi_c.load(write_tiny(tmp_path / "b.gguf", "llama", "Q4_0", seed=9)) as other:
        others = other.generate("the", raw=True, max_tokens=8, **GREEDY).tokens
        assert llm.generate("the", raw=True, max_tokens=8, **GREEDY).tokens == expected
        assert other.generate("the", raw=True, max_tokens=8, **GREEDY).tokens == others


def test_long_rope_switch_matches_the_reference(tmp_path: Path) -> None:
    """As in transformers: short factors up to the original context, then all positions with the long ones."""
    path = write_tiny(tmp_path / "m.gguf", weight_type="F32", n_ctx=512, n_ctx_orig=40)
    reference = Reference(path)
    with phi_c.load(path) as llm:
        ban = dict.fromkeys(llm.tokenizer.eog_ids, -1e9)
        prompt = [int(t) for t in np.random.default_rng(1).integers(3, 300, 36)]
        out = llm.generate(prompt, max_tokens=12, logit_bias=ban, **GREEDY)
        tokens = prompt + out.tokens
        for n in range(len(prompt), len(tokens)):
            row = reference.logits(tokens[:n])[-1]
            row[list(ban)] = -np.inf
            assert row[tokens[n]] >= row.max() - 1e-3


INVALID_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5"),
    ({"stop": [""]}, "stop is"),
    ({"stop": [3]}, "stop is"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"logit_bias": {10**6: 1.0}}, "logit_bias names token 1000000"),
]


@pytest.mark.parametrize(("options", "message"), INVALID_OPTIONS)
def test_invalid_options(llm: phi_c.LLM, options: dict[str, Any], message: str) -> None:
    for call in (llm.generate, llm.stream):
        with pytest.raises(OptionError, match=message):
            call("the", **options)


def test_invalid_prompts(llm: phi_c.LLM) -> None:
    for empty in ("", []):
        with pytest.raises(OptionError, match="the prompt is empty"):
            llm.generate(empty)
    with pytest.raises(OptionError, match="token id 99999 is outside the vocabulary"):
        llm.generate([99999])
    with pytest.raises(TypeError, match="temprature"):
        llm.generate("the", temprature=1)
    with pytest.raises(ChatTemplateError, match="there are no messages"):
        llm.chat([])


def test_invalid_load_options(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"n_ctx": 513}, "n_ctx is 513, expected 1 to 512"),
        ({"n_ctx": -1}, "n_ctx is -1"),
        ({"kv_type": "q4"}, "kv_type is 'q4', expected one of f16, q8"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"n_batch": 0}, "n_batch is 0"),
        ({"layout": "rows"}, "layout is 'rows', expected one of packed, packed-cache, mmap"),
        ({"tier": "avx9"}, "tier is 'avx9', expected one that this machine runs: scalar"),
    ):
        with pytest.raises(OptionError, match=message):
            phi_c.load(path, **options)
    monkeypatch.setenv("PHI_C_ISA", "sse0")
    with pytest.raises(OptionError, match="PHI_C_ISA is 'sse0'"):
        phi_c.load(path)
    monkeypatch.setenv("PHI_C_ISA", "scalar")
    with phi_c.load(path) as llm:
        assert llm.tier == "scalar"
    with pytest.raises(ModelNotFoundError):
        phi_c.load(path.parent / "other.gguf")


def test_kv_cache_larger_than_free_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: path.stat().st_size + 100_000)
    with pytest.raises(MemoryLimitError, match=r"a KV cache of 512 tokens .* GiB are free: reduce n_ctx to at most 96"):
        phi_c.load(path)
    monkeypatch.setattr(machine, "memory_available", lambda: 100)
    with pytest.raises(MemoryLimitError, match="use a smaller model"):
        phi_c.load(path)


def test_model_without_chat_template(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "base.gguf", "llama", vocabulary="bpe", chat_template=False)
    with phi_c.load(path) as llm:
        llm.template = None
        with pytest.raises(ChatTemplateError, match=r"base.gguf has no chat template"):
            llm.generate("Hi")
        assert llm.generate("the", raw=True, max_tokens=2).usage.completion_tokens > 0


def test_error_of_the_tokenizer_comes_before_that_of_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is built in another thread while weights are packed."""

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError("packing failed")

    def refuse(*arguments: object) -> None:
        raise UnsupportedModelError("no such tokenizer")

    monkeypatch.setattr("phi_c.llm.Model", fail)
    with pytest.raises(MemoryError, match="packing failed"):
        phi_c.load(path)
    monkeypatch.setattr("phi_c.llm.load_tokenizer", refuse)
    with pytest.raises(UnsupportedModelError, match="no such tokenizer"):
        phi_c.load(path)
    monkeypatch.undo()
    monkeypatch.setattr("phi_c.llm.load_tokenizer", refuse)
    with pytest.raises(UnsupportedModelError, match="no such tokenizer"):
        phi_c.load(path)


def test_interrupt_while_the_model_is_measured(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return "never"

    monkeypatch.setattr("phi_c.llm.tune_model", interrupt)
    n_threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        phi_c.load(path)
    assert threading.active_count() == n_threads


def test_random_seed_is_reported_and_repeats_the_call(llm: phi_c.LLM) -> None:
    first = llm.generate("the", raw=True, max_tokens=20, temperature=1.0)
    again = llm.generate("the", raw=True, max_tokens=20, temperature=1.0, seed=first.seed)
    assert (again.tokens, again.seed) == (first.tokens, first.seed)
    assert llm.generate("the", raw=True, max_tokens=1).seed != first.seed
    *chunks, last = llm.stream("the", raw=True, max_tokens=5, seed=7)
    assert last.seed == 7
    assert all(chunk.seed is None for chunk in chunks)
