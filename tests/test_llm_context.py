"""Long sequences through the public interface: pages freed behind the sliding window, and LongRoPE factors."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi_c
from phi_c._core import PAGE_TOKENS
from phi_c.engine import engine as engine_module
from phi_c.engine.scheduler import max_resident_pages
from phi_c.errors import MemoryLimitError, OptionError
from reference import Reference
from tiny_gguf import write_tiny

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
WINDOW = 100


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 300, n)]


def min_kv_cache_tokens(n_ctx: int, n_batch: int) -> int:
    return max_resident_pages(n_ctx, n_batch, WINDOW) * PAGE_TOKENS


def n_free_pages(llm: phi_c.LLM) -> int:
    return llm.loop.call(lambda engine: engine.scheduler.n_available_pages)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "w.gguf", weight_type="Q8_0", n_ctx=2048, window=WINDOW)


@pytest.fixture(scope="module")
def full(windowed: Path) -> Iterator[phi_c.LLM]:
    """A model whose KV cache has room for the full context."""
    with phi_c.load(windowed, n_ctx=0, n_batch=64) as llm:
        yield llm


@pytest.fixture
def minimal(windowed: Path) -> Iterator[phi_c.LLM]:
    """The same model with the smallest KV cache in which a sequence of the full context runs."""
    with phi_c.load(windowed, n_ctx=0, n_batch=64, kv_cache_tokens=min_kv_cache_tokens(2048, 64)) as llm:
        assert llm.engine.kv.n_pages == 7  # the full context takes 64
        yield llm
        assert n_free_pages(llm) == llm.engine.kv.n_pages


def banned_end_tokens(llm: phi_c.LLM) -> dict[int, float]:
    return dict.fromkeys(llm.tokenizer.eog_ids, -1e9)


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_sequence_longer_than_the_kv_cache_has_the_same_bits(windowed: Path, kv_type: str) -> None:
    tokens = tokens_of(2048)
    with (
        phi_c.load(windowed, n_ctx=0, kv_type=kv_type) as one,
        phi_c.load(
            windowed, n_ctx=0, kv_type=kv_type, n_batch=50, kv_cache_tokens=min_kv_cache_tokens(2048, 50)
        ) as other,
    ):
        assert other.kv_bytes < one.kv_bytes / 8
        assert np.array_equal(one.logits(tokens), other.logits(tokens))
        outputs = [
            llm.generate(tokens[:700], max_tokens=400, logit_bias=banned_end_tokens(llm), logprobs=0, **GREEDY)
            for llm in (one, other)
        ]
        assert outputs[0].tokens == outputs[1].tokens
        assert outputs[0].logprobs == outputs[1].logprobs
        assert n_free_pages(other) == other.engine.kv.n_pages


def test_sliding_window_matches_the_reference(minimal: phi_c.LLM, windowed: Path) -> None:
    tokens = tokens_of(600)
    got, expected = minimal.logits(tokens), Reference(windowed).logits(tokens)
    assert ((got - expected) ** 2).sum() / (expected**2).sum() < 2e-3


def test_generation_up_to_the_end_of_the_context(minimal: phi_c.LLM, full: phi_c.LLM) -> None:
    prompt = tokens_of(1900, seed=1)
    outputs = [llm.generate(prompt, logit_bias=banned_end_tokens(llm), **GREEDY) for llm in (minimal, full)]
    assert outputs[0].finish_reason == "length"
    assert len(outputs[0].tokens) == 2048 - 1900 + 1
    assert outputs[0].tokens == outputs[1].tokens


def test_next_turn_is_cached_after_its_first_pages_are_freed(minimal: phi_c.LLM, full: phi_c.LLM) -> None:
    prompt = tokens_of(1000, seed=2)
    first = minimal.generate(prompt, max_tokens=30, logit_bias=banned_end_tokens(minimal), **GREEDY)
    follow = [*prompt, *first.tokens, *tokens_of(40, seed=3)]
    again = minimal.generate(follow, max_tokens=20, logit_bias=banned_end_tokens(minimal), **GREEDY)
    assert again.usage.cached_tokens == (1000 + 29) // PAGE_TOKENS * PAGE_TOKENS
    assert again.tokens == full.generate(follow, max_tokens=20, logit_bias=banned_end_tokens(full), **GREEDY).tokens


def test_edited_turn_is_recomputed(minimal: phi_c.LLM, full: phi_c.LLM) -> None:
    """The pages of the window before the edit are freed; cached later pages must not be used in their place."""
    prompt = tokens_of(1500, seed=4)
    minimal.generate(prompt, max_tokens=2, **GREEDY)
    for n in (1400, 1000, 500, 90, 33):
        edited = [*prompt[:n], *tokens_of(20, seed=n)]
        outputs = [
            llm.generate(edited, max_tokens=10, logit_bias=banned_end_tokens(llm), **GREEDY) for llm in (minimal, full)
        ]
        assert outputs[0].tokens == outputs[1].tokens


def test_concurrent_long_sequences(windowed: Path, full: phi_c.LLM) -> None:
    """More sequences than the KV cache has room for, some cancelled, some with a common prefix: same bits as alone."""
    shared = tokens_of(300, seed=5)
    prompts = [[*shared, *tokens_of(100 + 40 * i, seed=10 + i)] for i in range(6)] + [tokens_of(700, seed=6)] * 2
    options: dict[str, Any] = {"max_tokens": 60, "logit_bias": banned_end_tokens(full), **GREEDY}
    expected = [full.generate(prompt, **options).tokens for prompt in prompts]
    with phi_c.load(windowed, n_ctx=0, n_batch=64, kv_cache_tokens=2 * min_kv_cache_tokens(2048, 64) + 64) as llm:
        got: dict[int, list[int]] = {}
        errors: list[BaseException] = []

        def run(i: int) -> None:
            try:
                if i < len(prompts):
                    got[i] = llm.generate(prompts[i], **options).tokens
                    return
                flag = phi_c.CancelFlag()
                n = 0
                for chunk in llm.stream(tokens_of(500, seed=i), cancel=flag, **options):
                    n += len(chunk.tokens)
                    if n >= i - len(prompts):  # after 0, 1, 2 and 3 tokens
                        flag.set()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts) + 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert [got[i] for i in range(len(prompts))] == expected
        assert n_free_pages(llm) == llm.engine.kv.n_pages


def test_kv_cache_tokens_is_checked(windowed: Path, tmp_path: Path) -> None:
    minimum = min_kv_cache_tokens(2048, 64)
    with pytest.raises(
        OptionError,
        match=f"kv_cache_tokens is {minimum - 32}, expected at least {minimum}: the capacity that one sequence",
    ):
        phi_c.load(windowed, n_ctx=0, n_batch=64, kv_cache_tokens=minimum - 32)
    for wrong in (0, -1, 2.5, True, "many"):
        with pytest.raises(OptionError, match="kv_cache_tokens is"):
            phi_c.load(windowed, kv_cache_tokens=wrong)
    plain = write_tiny(tmp_path / "p.gguf", weight_type="Q8_0")
    with pytest.raises(OptionError, match="kv_cache_tokens is 480, expected at least 512"):
        phi_c.load(plain, kv_cache_tokens=480)
    with phi_c.load(plain, n_ctx=64, kv_cache_tokens=640) as llm:
        assert llm.engine.kv.n_pages == 20
        assert llm.kv_bytes == 20 * llm.engine.kv.page_bytes


def test_kv_cache_memory_is_reported_before_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=131072)
    with phi_c.load(path, n_ctx=131072, kv_cache_tokens=131072) as llm:
        assert llm.kv_bytes == 131072 * 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads, dimensions, bytes
        assert llm.generate([5, 6, 7], max_tokens=3, **GREEDY).usage.completion_tokens
    monkeypatch.setattr("phi_c.machine.memory_available", lambda: 64 << 20)
    with pytest.raises(
        MemoryLimitError,
        match=r"a KV cache of 131072 tokens 0.1 GiB, but only 0.1 GiB are free: reduce n_ctx to at most \d+",
    ):
        phi_c.load(path, n_ctx=131072)


N_CTX_ORIG = 100


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "l.gguf", weight_type="F32", n_ctx=512, n_ctx_orig=N_CTX_ORIG)


@pytest.mark.parametrize(("rope", "long_from"), [("auto", N_CTX_ORIG + 1), ("long", 0), ("short", 10**6)])
def test_rope_option_selects_the_factors(longrope: Path, rope: str, long_from: int) -> None:
    reference = Reference(longrope)
    tokens = tokens_of(150)
    with phi_c.load(longrope, rope=rope) as llm:
        for n in (40, N_CTX_ORIG, N_CTX_ORIG + 1, 150):
            got, expected = llm.logits(tokens[:n]), reference.logits(tokens[:n], long_rope=n >= long_from)
            assert ((got - expected) ** 2).sum() / (expected**2).sum() < 1e-5
            out = llm.generate(tokens[:n], max_tokens=1, logprobs=5, **GREEDY)
            assert out.logprobs is not None
            best = expected[-1].astype(np.float64)
            best -= best.max()
            logprobs = best - np.log(np.exp(best).sum())
            for token, logprob in out.logprobs[0].top:
                assert logprob == pytest.approx(logprobs[token], abs=1e-3)


def test_rope_option_without_long_rope(windowed: Path, longrope: Path) -> None:
    for rope in ("long", "short"):
        with pytest.raises(OptionError, match=f"rope is '{rope}', expected auto: tiny phi3 has no LongRoPE factors"):
            phi_c.load(windowed, rope=rope)
    with pytest.raises(OptionError, match="rope is 'yarn', expected one of auto, long, short"):
        phi_c.load(longrope, rope="yarn")


@pytest.mark.parametrize("window", [None, 70])
def test_long_rope_switch_continues_as_with_long_factors(tmp_path: Path, window: int | None) -> None:
    """After the switch the output is that of the full sequence with the long factors."""
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=512, n_ctx_orig=N_CTX_ORIG, window=window)
    prompt = tokens_of(N_CTX_ORIG - 10, seed=7)
    with phi_c.load(path, n_batch=32) as llm, phi_c.load(path, rope="long", n_batch=32) as long:
        options: dict[str, Any] = {"logit_bias": banned_end_tokens(llm), **GREEDY}
        out = llm.generate(prompt, max_tokens=60, **options)
        n_short = N_CTX_ORIG - len(prompt) + 1  # tokens sampled from at most N_CTX_ORIG positions
        rest = long.generate([*prompt, *out.tokens[:n_short]], max_tokens=60 - n_short, **options)
        assert rest.tokens == out.tokens[n_short:]
        assert long.generate(prompt, max_tokens=60, **options).tokens != out.tokens
        chunks = list(llm.stream(prompt, max_tokens=60, **options))
        assert [t for chunk in chunks for t in chunk.tokens] == out.tokens
        assert "".join(chunk.text for chunk in chunks) == out.text
        assert chunks[-1].usage is not None
        # Counted at the start, not again after the switch.
        assert chunks[-1].usage.cached_tokens == len(prompt) // PAGE_TOKENS * PAGE_TOKENS
        assert n_free_pages(llm) == llm.engine.kv.n_pages


def test_long_rope_switch_in_a_batch(tmp_path: Path) -> None:
    """Sequences before and after the switch in one batch, with a common prefix, have the same bits as alone."""
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=512, n_ctx_orig=N_CTX_ORIG)
    shared = tokens_of(70, seed=8)
    prompts = [[*shared, *tokens_of(n, seed=n)] for n in (5, 20, 29, 40, 100)] + [shared]
    with phi_c.load(path, n_batch=48) as llm:
        options: dict[str, Any] = {"max_tokens": 50, "logit_bias": banned_end_tokens(llm), **GREEDY}
        expected = []
        for prompt in prompts:
            with phi_c.load(path, n_batch=48) as alone:
                expected.append(alone.generate(prompt, **options).tokens)
        streams = [llm.stream(prompt, **options) for prompt in prompts]
        got: list[list[int]] = [[] for _ in prompts]
        running = dict(enumerate(streams))
        while running:
            for i, stream in list(running.items()):
                chunk = next(stream, None)
                if chunk is None:
                    del running[i]
                else:
                    got[i] += chunk.tokens
        assert got == expected
        assert n_free_pages(llm) == llm.engine.kv.n_pages


def test_long_rope_recomputation_is_chunked_and_cancellable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=512, n_ctx_orig=N_CTX_ORIG)
    sizes: list[int] = []
    flag = phi_c.CancelFlag()
    real = engine_module.forward

    def counting(model: Any, kv: Any, tokens: Any, *rest: Any) -> Any:
        sizes.append(len(tokens))
        if sizes.count(32) == 5:  # three chunks of the prompt, and the second one after the switch
            flag.set()
        return real(model, kv, tokens, *rest)

    monkeypatch.setattr(engine_module, "forward", counting)
    with phi_c.load(path, n_batch=32) as llm:
        prompt = tokens_of(N_CTX_ORIG - 2, seed=9)
        out = llm.generate(prompt, max_tokens=20, logit_bias=banned_end_tokens(llm), cancel=flag, **GREEDY)
        assert out.finish_reason == "cancelled"
        assert len(out.tokens) == 3
        assert sizes == [32, 32, 32, 2, 1, 1, 32, 32]
        monkeypatch.undo()
        assert n_free_pages(llm) == llm.engine.kv.n_pages
        assert llm.generate(prompt, max_tokens=3, logit_bias=banned_end_tokens(llm), **GREEDY).tokens == out.tokens
