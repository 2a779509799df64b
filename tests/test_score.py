"""LLM.score and LLM.embed against LLM.logits and the NumPy reference: chunks, batches, shared prompts, concurrency."""

import _thread
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import phi_c
from phi_c import scoring
from phi_c.engine import engine, prompt_outputs
from phi_c.errors import Cancelled, ContextLengthError, ModelClosedError, OptionError, PhiError
from reference import Reference
from tiny_gguf import write_tiny

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0, "raw": True}
PROMPT = "the and in of it is on at or " * 12  # several pages
CONTINUATIONS = [" the", " and in it", "xyz " * 30, " of the in at", " the"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0", n_ctx=1024)


@pytest.fixture
def llm(path: Path) -> Iterator[phi_c.LLM]:
    with phi_c.load(path, n_threads=2, n_ctx=1024) as loaded:
        yield loaded


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def expected_score(llm: phi_c.LLM, context: list[int], ids: list[int]) -> tuple[npt.NDArray[np.float64], bool]:
    logits = llm.logits(context + ids)[len(context) - 1 : -1]
    return log_softmax(logits)[np.arange(len(ids)), ids], logits.argmax(1).tolist() == ids


def test_scores_are_log_softmax_of_logits(llm: phi_c.LLM) -> None:
    scores = llm.score(PROMPT, CONTINUATIONS)
    for continuation, score in zip(CONTINUATIONS, scores, strict=True):
        context, ids = scoring.encode_pair(llm.tokenizer, PROMPT, continuation)
        assert context[0] == llm.tokenizer.bos_id
        assert score.tokens == ids
        expected, is_greedy = expected_score(llm, context, ids)
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
        assert score.logprob == pytest.approx(expected.sum(), abs=1e-5)
        assert score.is_greedy is is_greedy
    assert scores[0].logprobs == scores[-1].logprobs


def test_scores_have_the_same_bits_for_any_chunks_and_batches(
    llm: phi_c.LLM, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [s.logprobs for s in llm.score(PROMPT, CONTINUATIONS)]
    assert [llm.score(PROMPT, [c])[0].logprobs for c in CONTINUATIONS] == expected
    for n_batch, lm_head_rows, max_active, n_ctx in ((1, 1, 1, 256), (7, 5, 2, 320), (64, 1000, 64, 1024)):
        monkeypatch.setattr(prompt_outputs, "LM_HEAD_ROWS", lm_head_rows)
        monkeypatch.setattr(prompt_outputs, "_MAX_ACTIVE_SEQUENCES", max_active)
        with phi_c.load(path, n_batch=n_batch, n_ctx=n_ctx) as other:
            assert [s.logprobs for s in other.score(PROMPT, CONTINUATIONS)] == expected


def test_concurrent_calls(llm: phi_c.LLM) -> None:
    """Concurrent score, embed, logits and generate calls give the same results as single calls."""
    expected = [s.logprobs for s in llm.score(PROMPT, CONTINUATIONS)]
    text = llm.generate("the", max_tokens=60, **GREEDY).tokens
    vectors = llm.embed(CONTINUATIONS)
    logits = llm.logits(list(range(3, 80)))
    failed: list[str] = []

    def check(name: str, is_equal: bool) -> None:
        if not is_equal:
            failed.append(name)

    calls = [
        lambda: check("score", [s.logprobs for s in llm.score(PROMPT, CONTINUATIONS)] == expected),
        lambda: check("generate", llm.generate("the", max_tokens=60, **GREEDY).tokens == text),
        lambda: check("embed", np.array_equal(llm.embed(CONTINUATIONS), vectors)),
        lambda: check("logits", np.array_equal(llm.logits(list(range(3, 80))), logits)),
    ]
    done: list[int] = []

    def run(call: Any) -> None:
        call()
        done.append(1)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(done) == len(threads)


def test_prompt_is_computed_once(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    real = engine.forward

    def counting(model: Any, kv: Any, tokens: Any, *rest: Any) -> Any:
        counts.append(len(tokens))
        return real(model, kv, tokens, *rest)

    monkeypatch.setattr(engine, "forward", counting)
    scores = llm.score(PROMPT, [" the and", " in of", " it is", " at or"])
    n_prompt = len(llm.tokenizer.encode(PROMPT.rstrip()))
    whole_pages = (n_prompt - 1) // 32 * 32
    assert whole_pages >= 96
    assert [s.cached_tokens for s in scores] == [0, whole_pages, whole_pages, whole_pages]
    n_total = sum(n_prompt + len(s.tokens) - 1 for s in scores)
    assert sum(counts) == n_total - 3 * whole_pages
    assert len(counts) == 2  # the first continuation alone, then the others in one batch


def test_continuations_that_differ_in_the_last_token_are_one_sequence(
    llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the letters of a multiple choice."""
    alone = [llm.score([5, 6, 7], [ids])[0].logprobs for ids in ([9], [10], [11], [9, 10], [9, 12])]
    counts: list[int] = []
    real = engine.forward

    def counting(model: Any, kv: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        counts.append(len(tokens))
        return real(model, kv, tokens, *rest, **options)

    monkeypatch.setattr(engine, "forward", counting)
    scores = llm.score([5, 6, 7], [[9], [10], [11], [9, 10], [9, 12]])
    assert [s.logprobs for s in scores] == alone
    assert [s.tokens for s in scores] == [[9], [10], [11], [9, 10], [9, 12]]
    assert sum(counts) == 3 + 4


def test_is_greedy(llm: phi_c.LLM) -> None:
    prompt = llm.tokenizer.encode(PROMPT)
    ban = dict.fromkeys(llm.tokenizer.eog_ids, -np.inf)
    out = llm.generate(prompt, max_tokens=20, temperature=0, repeat_penalty=1, logit_bias=ban).tokens
    worse = [*out[:-1], (out[-1] + 1) % llm.config.n_vocab]
    assert [s.is_greedy for s in llm.score(prompt, [out, out[:7], worse])] == [True, True, False]


def test_tokenisation_of_prompt_and_continuation(llm: phi_c.LLM) -> None:
    encode = llm.tokenizer.encode
    # White space at the end of the prompt moves to the continuation, and both are encoded together.
    for prompt, continuation in (("the and ", "in"), ("the and", " in"), ("the and \n", "in"), ("a", "b c")):
        context, ids = scoring.encode_pair(llm.tokenizer, prompt, continuation)
        assert context == encode(prompt.rstrip())
        assert ids == encode(prompt + continuation)[len(context) :]
    bos = llm.tokenizer.bos_id
    assert scoring.encode_pair(llm.tokenizer, "", "the") == ([bos], encode("the", add_bos=False))
    assert scoring.encode_pair(llm.tokenizer, " ", "the") == ([bos], encode(" the", add_bos=False))
    special = scoring.encode_pair(llm.tokenizer, "the", "<|end|>", parse_special=True)[1]
    assert special == encode("<|end|>", add_bos=False, parse_special=True)
    assert llm.score("", ["the"])[0].tokens == encode("the", add_bos=False)
    ids = encode("the and")
    assert llm.score(ids, [" in"])[0].tokens == encode(" in", add_bos=False)
    assert llm.score("the and", [[5, 6]])[0].tokens == [5, 6]
    assert llm.score("the", []) == []


def test_model_without_bos(tmp_path: Path) -> None:
    with phi_c.load(write_tiny(tmp_path / "b.gguf", "llama", "Q8_0", vocabulary="bpe")) as llm:
        context, ids = scoring.encode_pair(llm.tokenizer, "the", " then")
        assert context == llm.tokenizer.encode("the", add_bos=False)
        assert llm.score("the", [" then"])[0].tokens == ids
        # An empty prompt stands for the BOS token, even if prompts of this model do not begin with it.
        assert scoring.encode_pair(llm.tokenizer, "", "the")[0] == [llm.tokenizer.bos_id]


def test_longest_pair_that_fits_the_context(path: Path) -> None:
    """The last token is not computed, so one token more than the context can be scored."""
    with phi_c.load(path, n_ctx=64) as llm:
        prompt = list(range(3, 43))
        assert len(llm.score(prompt, [list(range(3, 28))])[0].logprobs) == 25
        with pytest.raises(
            ContextLengthError, match=r"the prompt with continuation 1 has 65 tokens, more than the context size of 64"
        ):
            llm.score(prompt, [[5], list(range(3, 29))])
        with pytest.raises(ContextLengthError, match="input 0 has 65 tokens, more than the context size of 64"):
            llm.embed([[5] * 65])


def test_invalid_arguments_and_closed_model(llm: phi_c.LLM) -> None:
    with pytest.raises(OptionError, match="continuations is a str"):
        llm.score("the", "and")
    with pytest.raises(OptionError, match="continuation 1 adds no token"):
        llm.score("the", [" and", ""])
    with pytest.raises(OptionError, match="continuation 0 adds no token"):
        llm.score([5], [[]])
    with pytest.raises(OptionError, match="token id 99999 is outside the vocabulary"):
        llm.score("the", [[99999]])
    with pytest.raises(OptionError, match="pooling is 'max', expected one of mean, last"):
        llm.embed(["the"], pooling="max")
    with pytest.raises(OptionError, match="inputs is a str"):
        llm.embed("the")
    with pytest.raises(OptionError, match="the prompt is empty"):
        llm.embed([""])
    llm.close()
    for call in (lambda: llm.score("the", [" and"]), lambda: llm.embed(["the"]), lambda: llm.logits([5])):
        with pytest.raises(ModelClosedError):
            call()


def n_available_pages(llm: phi_c.LLM) -> int:
    return llm.loop.call(lambda engine: engine.scheduler.n_available_pages)


def test_cancel(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before, flag = n_available_pages(llm), phi_c.CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        llm.score(PROMPT, CONTINUATIONS, cancel=flag)
    assert n_available_pages(llm) == before
    # Between two chunks of logits.
    flag.clear()
    real, calls = engine.lm_head, []

    def cancelling(*arguments: Any) -> Any:
        calls.append(1)
        flag.set()
        return real(*arguments)

    monkeypatch.setattr(engine, "lm_head", cancelling)
    with pytest.raises(Cancelled):
        llm.score("the", [list(range(3, 203))], cancel=flag)
    assert len(calls) == 1
    assert n_available_pages(llm) == before
    with pytest.raises(Cancelled):
        llm.embed([PROMPT], cancel=flag)


def test_model_is_usable_after_keyboard_interrupt(llm: phi_c.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts a step, and the logits of a chunk, while a stream is unfinished."""
    before, expected = n_available_pages(llm), [s.logprobs for s in llm.score(PROMPT, CONTINUATIONS)]
    text = llm.generate("and", max_tokens=8, **GREEDY).tokens
    for name in ("forward", "lm_head"):
        stream = llm.stream("and", max_tokens=8, **GREEDY)
        chunks = [next(stream)]
        real = getattr(engine, name)

        interrupts: list[str] = []

        def interrupted(*arguments: Any, real: Any = real, interrupts: list[str] = interrupts) -> Any:
            if not interrupts:
                interrupts.append("sent")
                _thread.interrupt_main()
            return real(*arguments)

        monkeypatch.setattr(engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.score(PROMPT, CONTINUATIONS)
        assert interrupts
        monkeypatch.undo()
        assert [s.logprobs for s in llm.score(PROMPT, CONTINUATIONS)] == expected
        chunks += stream
        assert [t for c in chunks for t in c.tokens] == text
        assert n_available_pages(llm) == before


def test_nan_weights_raise(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "nan.gguf", weight_type="F32")
    data = bytearray(path.read_bytes())
    data[-64:] = np.full(16, np.nan, np.float32).tobytes()  # the weights of the last norm
    path.write_bytes(data)
    with phi_c.load(path) as llm, pytest.raises(PhiError, match="the logits hold nan"):
        llm.score("the", [" and"])


def test_memory_is_bounded_by_one_chunk_of_logits(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "wide.gguf", "phi3", "Q8_0", n_extra_words=20000, n_ctx=512)
    with phi_c.load(path) as llm:
        row = llm.config.n_vocab * 4
        assert row > 80_000
        ids = [int(t) for t in np.random.default_rng(0).integers(3, 300, 480)]
        tracemalloc.start()
        try:
            score = llm.score(ids[:10], [ids[10:]])[0]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(score.logprobs) == 470
        assert peak < 3 * prompt_outputs.LM_HEAD_ROWS * row < 0.25 * 470 * row


def test_long_rope_depends_on_the_length_of_the_whole_sequence(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="F32", n_ctx=512, n_ctx_orig=40)
    reference = Reference(path)
    prompt = list(range(3, 38))
    with phi_c.load(path) as llm:
        for n in (4, 6, 7, 30):
            ids = list(range(50, 50 + n))
            rows = log_softmax(reference.logits((prompt + ids)[:-1]))[len(prompt) - 1 :]
            got = llm.score(prompt, [ids])[0].logprobs
            np.testing.assert_allclose(got, rows[np.arange(n), ids], atol=5e-3)


def test_embeddings_match_the_reference(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="F32")
    reference = Reference(path)
    inputs = ["the and", "in", PROMPT]
    with phi_c.load(path, n_batch=50) as llm:
        states = [reference.hidden_states(llm.tokenizer.encode(text)) for text in inputs]
        for pooling, pooled in (
            ("mean", np.stack([s.mean(0) for s in states])),
            ("last", np.stack([s[-1] for s in states])),
        ):
            raw = llm.embed(inputs, pooling=pooling, normalize=False)
            assert raw.shape == (3, llm.config.n_embd)
            assert raw.dtype == np.float32
            assert ((raw - pooled) ** 2).sum() / (pooled**2).sum() <= 1e-6
            unit = llm.embed(inputs, pooling=pooling)
            np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
            np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
            alone = np.concatenate([llm.embed([text], pooling=pooling) for text in inputs])
            np.testing.assert_allclose(alone, unit, atol=1e-6)
        assert llm.embed([]).shape == (0, llm.config.n_embd)
        ids = llm.tokenizer.encode("the and")
        assert np.array_equal(llm.embed([ids]), llm.embed(["the and"]))
