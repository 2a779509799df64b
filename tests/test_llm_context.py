"""Long texts through the Python interface: windows that give pages back, and the rotation's factors."""

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


def least_cache(n_ctx: int, n_batch: int) -> int:
    return max_resident_pages(n_ctx, n_batch, WINDOW) * PAGE_TOKENS


def n_free_pages(llm: phi_c.LLM) -> int:
    return llm.engine.scheduler.n_available_pages


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "w.gguf", weight_type="Q8_0", n_ctx=2048, window=WINDOW)


@pytest.fixture(scope="module")
def whole(windowed: Path) -> Iterator[phi_c.LLM]:
    """A model with room for every page of its context."""
    with phi_c.load(windowed, n_ctx=0, n_batch=64) as llm:
        yield llm


@pytest.fixture
def small(windowed: Path) -> Iterator[phi_c.LLM]:
    """The same with the least room in which a text of the whole context can run."""
    with phi_c.load(windowed, n_ctx=0, n_batch=64, kv_cache_tokens=least_cache(2048, 64)) as llm:
        assert llm.engine.kv.n_pages == 7  # of 64 that the context has
        yield llm
        assert n_free_pages(llm) == llm.engine.kv.n_pages


def endless(llm: phi_c.LLM) -> dict[int, float]:
    return dict.fromkeys(llm.tokenizer.eog_ids, -1e9)


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_a_text_far_longer_than_the_cache_has_the_same_bits(windowed: Path, kv_type: str) -> None:
    tokens = tokens_of(2048)
    with (
        phi_c.load(windowed, n_ctx=0, kv_type=kv_type) as one,
        phi_c.load(windowed, n_ctx=0, kv_type=kv_type, n_batch=50, kv_cache_tokens=least_cache(2048, 50)) as other,
    ):
        assert other.kv_bytes < one.kv_bytes / 8
        assert np.array_equal(one.logits(tokens), other.logits(tokens))
        texts = [
            llm.generate(tokens[:700], max_tokens=400, logit_bias=endless(llm), logprobs=0, **GREEDY)
            for llm in (one, other)
        ]
        assert texts[0].tokens == texts[1].tokens
        assert texts[0].logprobs == texts[1].logprobs
        assert n_free_pages(other) == other.engine.kv.n_pages


def test_the_window_is_the_references(small: phi_c.LLM, windowed: Path) -> None:
    tokens = tokens_of(600)
    got, expected = small.logits(tokens), Reference(windowed).logits(tokens)
    assert ((got - expected) ** 2).sum() / (expected**2).sum() < 2e-3


def test_the_whole_context_is_generated(small: phi_c.LLM, whole: phi_c.LLM) -> None:
    prompt = tokens_of(1900, seed=1)
    texts = [llm.generate(prompt, logit_bias=endless(llm), **GREEDY) for llm in (small, whole)]
    assert texts[0].finish_reason == "length"
    assert len(texts[0].tokens) == 2048 - 1900 + 1
    assert texts[0].tokens == texts[1].tokens


def test_a_next_turn_goes_on_where_the_beginning_is_gone(small: phi_c.LLM, whole: phi_c.LLM) -> None:
    prompt = tokens_of(1000, seed=2)
    first = small.generate(prompt, max_tokens=30, logit_bias=endless(small), **GREEDY)
    follow = [*prompt, *first.tokens, *tokens_of(40, seed=3)]
    again = small.generate(follow, max_tokens=20, logit_bias=endless(small), **GREEDY)
    assert again.usage.cached_tokens == (1000 + 29) // PAGE_TOKENS * PAGE_TOKENS
    assert again.tokens == whole.generate(follow, max_tokens=20, logit_bias=endless(whole), **GREEDY).tokens


def test_an_earlier_turn_that_was_edited_is_computed_anew(small: phi_c.LLM, whole: phi_c.LLM) -> None:
    """Its prefix's window has left the cache; what is there of later pages must not be taken for it."""
    prompt = tokens_of(1500, seed=4)
    small.generate(prompt, max_tokens=2, **GREEDY)
    for n in (1400, 1000, 500, 90, 33):
        edited = [*prompt[:n], *tokens_of(20, seed=n)]
        texts = [llm.generate(edited, max_tokens=10, logit_bias=endless(llm), **GREEDY) for llm in (small, whole)]
        assert texts[0].tokens == texts[1].tokens


def test_many_long_texts_at_once(windowed: Path, whole: phi_c.LLM) -> None:
    """More texts than the cache has room for, some cancelled, some with prefixes in common: bits as alone."""
    shared = tokens_of(300, seed=5)
    prompts = [[*shared, *tokens_of(100 + 40 * i, seed=10 + i)] for i in range(6)] + [tokens_of(700, seed=6)] * 2
    options: dict[str, Any] = {"max_tokens": 60, "logit_bias": endless(whole), **GREEDY}
    expected = [whole.generate(prompt, **options).tokens for prompt in prompts]
    with phi_c.load(windowed, n_ctx=0, n_batch=64, kv_cache_tokens=2 * least_cache(2048, 64) + 64) as llm:
        got: dict[int, list[int]] = {}
        errors: list[BaseException] = []

        def run(i: int) -> None:
            try:
                if i < len(prompts):
                    got[i] = llm.generate(prompts[i], **options).tokens
                    return
                flag = phi_c.CancelFlag()
                n = 0
                for piece in llm.stream(tokens_of(500, seed=i), cancel=flag, **options):
                    n += len(piece.tokens)
                    if n >= i - len(prompts):  # in the prompt, and at several places of the text
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


def test_a_cache_too_small(windowed: Path, tmp_path: Path) -> None:
    least = least_cache(2048, 64)
    with pytest.raises(
        OptionError, match=f"kv_cache_tokens is {least - 32}, expected at least {least}: what one sequence of n_ctx"
    ):
        phi_c.load(windowed, n_ctx=0, n_batch=64, kv_cache_tokens=least - 32)
    for wrong in (0, -1, 2.5, True, "many"):
        with pytest.raises(OptionError, match="kv_cache_tokens is"):
            phi_c.load(windowed, kv_cache_tokens=wrong)
    plain = write_tiny(tmp_path / "p.gguf", weight_type="Q8_0")
    with pytest.raises(OptionError, match="kv_cache_tokens is 480, expected at least 512"):
        phi_c.load(plain, kv_cache_tokens=480)
    with phi_c.load(plain, n_ctx=64, kv_cache_tokens=640) as llm:
        assert llm.engine.kv.n_pages == 20
        assert llm.kv_bytes == 20 * llm.engine.kv.page_bytes


def test_a_long_context_is_stated_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=131072)
    with phi_c.load(path, n_ctx=131072) as llm:
        assert llm.kv_bytes == 131072 * 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads, dimensions, bytes
        assert llm.generate([5, 6, 7], max_tokens=3, **GREEDY).usage.completion_tokens
    monkeypatch.setattr("phi_c.machine.memory_available", lambda: 64 << 20)
    with pytest.raises(
        MemoryLimitError,
        match=r"a KV cache of 131072 tokens 0.1 GiB, but 0.1 GiB are free: reduce n_ctx to at most \d+",
    ):
        phi_c.load(path, n_ctx=131072)


ORIG = 100


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "l.gguf", weight_type="F32", n_ctx=512, n_ctx_orig=ORIG)


@pytest.mark.parametrize(("rope", "long_from"), [("auto", ORIG + 1), ("long", 0), ("short", 10**6)])
def test_the_factors_asked_for(longrope: Path, rope: str, long_from: int) -> None:
    reference = Reference(longrope)
    tokens = tokens_of(150)
    with phi_c.load(longrope, rope=rope) as llm:
        for n in (40, ORIG, ORIG + 1, 150):
            got, expected = llm.logits(tokens[:n]), reference.logits(tokens[:n], long_rope=n >= long_from)
            assert ((got - expected) ** 2).sum() / (expected**2).sum() < 1e-5
            out = llm.generate(tokens[:n], max_tokens=1, logprobs=5, **GREEDY)
            assert out.logprobs is not None
            best = expected[-1].astype(np.float64)
            best -= best.max()
            logprobs = best - np.log(np.exp(best).sum())
            for token, logprob in out.logprobs[0].top:
                assert logprob == pytest.approx(logprobs[token], abs=1e-3)


def test_no_factors_to_choose_from(windowed: Path, longrope: Path) -> None:
    for rope in ("long", "short"):
        with pytest.raises(OptionError, match=f"rope is '{rope}', expected auto: tiny phi3 has no LongRoPE factors"):
            phi_c.load(windowed, rope=rope)
    with pytest.raises(OptionError, match="rope is 'yarn', expected one of auto, long, short"):
        phi_c.load(longrope, rope="yarn")


@pytest.mark.parametrize("window", [None, 70])
def test_a_text_that_crosses_goes_on_as_if_it_had_been_long(tmp_path: Path, window: int | None) -> None:
    """What follows the crossing is what the whole text, computed anew with the long factors, is followed by."""
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=512, n_ctx_orig=ORIG, window=window)
    prompt = tokens_of(ORIG - 10, seed=7)
    with phi_c.load(path, n_batch=32) as llm, phi_c.load(path, rope="long", n_batch=32) as long:
        options: dict[str, Any] = {"logit_bias": endless(llm), **GREEDY}
        out = llm.generate(prompt, max_tokens=60, **options)
        short_part = ORIG - len(prompt) + 1  # sampled from at most ORIG positions
        rest = long.generate([*prompt, *out.tokens[:short_part]], max_tokens=60 - short_part, **options)
        assert rest.tokens == out.tokens[short_part:]
        assert long.generate(prompt, max_tokens=60, **options).tokens != out.tokens
        pieces = list(llm.stream(prompt, max_tokens=60, **options))
        assert [t for piece in pieces for t in piece.tokens] == out.tokens
        assert "".join(piece.text for piece in pieces) == out.text
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.cached_tokens == len(prompt) // PAGE_TOKENS * PAGE_TOKENS  # at its start, not later
        assert n_free_pages(llm) == llm.engine.kv.n_pages


def test_crossing_beside_others(tmp_path: Path) -> None:
    """Texts on both sides of the crossing in one batch, with prefixes in common, have the bits that they have alone."""
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=512, n_ctx_orig=ORIG)
    shared = tokens_of(70, seed=8)
    prompts = [[*shared, *tokens_of(n, seed=n)] for n in (5, 20, 29, 40, 100)] + [shared]
    with phi_c.load(path, n_batch=48) as llm:
        options: dict[str, Any] = {"max_tokens": 50, "logit_bias": endless(llm), **GREEDY}
        expected = []
        for prompt in prompts:
            with phi_c.load(path, n_batch=48) as alone:
                expected.append(alone.generate(prompt, **options).tokens)
        streams = [llm.stream(prompt, **options) for prompt in prompts]
        got: list[list[int]] = [[] for _ in prompts]
        running = dict(enumerate(streams))
        while running:
            for i, stream in list(running.items()):
                piece = next(stream, None)
                if piece is None:
                    del running[i]
                else:
                    got[i] += piece.tokens
        assert got == expected
        assert n_free_pages(llm) == llm.engine.kv.n_pages


def test_the_crossing_is_computed_in_chunks_and_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=512, n_ctx_orig=ORIG)
    sizes: list[int] = []
    flag = phi_c.CancelFlag()
    real = engine_module.forward

    def counted(model: Any, kv: Any, tokens: Any, *rest: Any) -> Any:
        sizes.append(len(tokens))
        if sizes.count(32) == 5:  # three chunks of the prompt, and the second one after the crossing
            flag.set()
        return real(model, kv, tokens, *rest)

    monkeypatch.setattr(engine_module, "forward", counted)
    with phi_c.load(path, n_batch=32) as llm:
        prompt = tokens_of(ORIG - 2, seed=9)
        out = llm.generate(prompt, max_tokens=20, logit_bias=endless(llm), cancel=flag, **GREEDY)
        assert out.finish_reason == "cancelled"
        assert len(out.tokens) == 3
        assert sizes == [32, 32, 32, 2, 1, 1, 32, 32]
        monkeypatch.undo()
        assert n_free_pages(llm) == llm.engine.kv.n_pages
        assert llm.generate(prompt, max_tokens=3, logit_bias=endless(llm), **GREEDY).tokens == out.tokens
