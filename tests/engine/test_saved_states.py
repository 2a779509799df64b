"""Saved states: through the public interface, and in processes that are killed."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi_c
from phi_c._core import PAGE_TOKENS
from phi_c.errors import ModelClosedError, OptionError, OutputError, PhiError, StateError
from prompts import GREEDY, TALK, generate, in_other_process, kill_after, run_concurrently, tokens_of, whole_pages
from tiny_gguf import write_tiny


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [({}, {}), ({"window": 100}, {"n_ctx": 2048}), ({"n_ctx_orig": 300}, {}), ({"n_ctx_orig": 300}, {"rope": "long"})],
)
def test_loaded_state_continues_with_the_same_bits(
    tmp_path: Path, shape: dict[str, Any], options: dict[str, Any], kv_type: str
) -> None:
    """Prompts and a chat continue in another LLM object, with other pages, without computing them again."""
    model = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=2048, **shape)
    prompts = [tokens_of(200), [*tokens_of(200)[:150], *tokens_of(300, 1)], tokens_of(70, 2)]
    with phi_c.load(model, kv_type=kv_type, **options) as llm:
        first = [generate(llm, prompt) for prompt in prompts]
        answer = llm.chat(TALK, max_tokens=20, **GREEDY)
        talk = [*TALK, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "is it?"}]
        second = llm.chat(talk, max_tokens=20, logprobs=1, **GREEDY)
        saved = llm.save_state(tmp_path / "state")
        assert saved.n_bytes == (tmp_path / "state").stat().st_size
        assert saved.tokens == len(llm.engine.registered_keys()) * PAGE_TOKENS
    with phi_c.load(model, kv_type=kv_type, **options) as llm:
        loaded = llm.load_state(tmp_path / "state")
        assert loaded.loaded_tokens == loaded.tokens == saved.tokens
        assert llm.engine.scheduler.n_available_pages == llm.engine.kv.n_pages
        for prompt, before in zip(prompts, first, strict=True):
            again = generate(llm, prompt)
            assert again.usage.cached_tokens == whole_pages(len(prompt) - 1)
            assert (again.tokens, again.logprobs) == (before.tokens, before.logprobs)
        again = llm.chat(talk, max_tokens=20, logprobs=1, **GREEDY)
        assert again.usage.cached_tokens == whole_pages(again.usage.prompt_tokens - 1)
        assert (again.tokens, again.logprobs) == (second.tokens, second.logprobs)


def test_state_of_one_prefix(path: Path, tmp_path: Path) -> None:
    a, b = tokens_of(200), tokens_of(200, 1)
    with phi_c.load(path) as llm:
        llm.chat(TALK, max_tokens=1, **GREEDY)
        generate(llm, a)
        generate(llm, b)
        assert llm.save_state(tmp_path / "a", tokens=a).tokens == whole_pages(200)
        n_talk = llm.chat(TALK, max_tokens=1, **GREEDY).usage.prompt_tokens
        assert llm.save_state(tmp_path / "talk", messages=TALK).tokens == whole_pages(n_talk)
        assert llm.save_state(tmp_path / "none", tokens=tokens_of(100, 9)).tokens == 0
        with pytest.raises(OptionError, match="messages or tokens, not both"):
            llm.save_state(tmp_path / "x", messages=TALK, tokens=a)
    with phi_c.load(path) as llm:
        llm.load_state(tmp_path / "none")
        llm.load_state(tmp_path / "a")
        assert generate(llm, b).usage.cached_tokens == 0
        assert generate(llm, a).usage.cached_tokens == whole_pages(199)
        llm.load_state(tmp_path / "talk")
        assert llm.chat(TALK, max_tokens=1, **GREEDY).usage.cached_tokens == whole_pages(n_talk - 1)


def test_smaller_kv_cache_loads_the_most_recently_used_pages(path: Path, tmp_path: Path) -> None:
    old, new = tokens_of(321), tokens_of(321, 1)
    with phi_c.load(path) as llm:
        expected = [generate(llm, old).tokens, generate(llm, new).tokens]
        llm.save_state(tmp_path / "state")
    with phi_c.load(path, n_ctx=480, kv_cache_tokens=480) as llm:
        loaded = llm.load_state(tmp_path / "state")
        assert (loaded.tokens, loaded.loaded_tokens) == (640, 480)
        assert generate(llm, new).usage.cached_tokens == 320
        assert generate(llm, old).tokens == expected[0]
    with phi_c.load(path, n_ctx=480, kv_cache_tokens=480) as llm:
        ban = dict.fromkeys(llm.tokenizer.eog_ids, -1e9)
        running = llm.stream(tokens_of(200, 3), max_tokens=250, logit_bias=ban, **GREEDY)
        next(running)
        # The running sequence has 7 to 11 pages, and takes pages of the state as its tokens come.
        assert llm.load_state(tmp_path / "state").loaded_tokens in range(128, 257, 32)
        assert generate(llm, new).tokens == expected[1]
        list(running)
        assert llm.engine.scheduler.n_available_pages == llm.engine.kv.n_pages


def test_pages_already_cached_are_not_duplicated(path: Path, tmp_path: Path) -> None:
    tokens = tokens_of(300)
    with phi_c.load(path) as llm:
        expected = generate(llm, tokens)
        llm.save_state(tmp_path / "state")
        for _ in range(3):
            assert llm.load_state(tmp_path / "state") == phi_c.StateSummary(
                tmp_path / "state", 288, 288, (tmp_path / "state").stat().st_size
            )
        assert len(llm.engine.registered_keys()) == len(set(llm.engine.registered_keys())) == 9
        assert generate(llm, tokens).logprobs == expected.logprobs


def test_state_of_another_model_or_options(path: Path, tmp_path: Path) -> None:
    with phi_c.load(path, tier="scalar") as llm:
        generate(llm, tokens_of(100))
        llm.save_state(tmp_path / "state")
    other = write_tiny(tmp_path / "other.gguf", weight_type="Q8_0", n_ctx=2048, seed=1)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (1, 1))
    for model, options, message in (
        (other, {}, "saved from another model file, or from this one before it changed"),
        (copy, {}, "saved from another model file"),
        (path, {"kv_type": "q8"}, "saved with kv_type 'f16', expected 'q8'"),
        (path, {"layout": "mmap"}, "saved with layout 'packed', expected 'mmap'"),
    ):
        with phi_c.load(model, **{"tier": "scalar", **options}) as llm:
            with pytest.raises(StateError, match=message):
                llm.load_state(tmp_path / "state")
            assert llm.engine.registered_keys() == []
    if len(phi_c._core.tiers()) > 1:
        with phi_c.load(path, tier=phi_c._core.tiers()[1]) as llm, pytest.raises(StateError, match="tier 'scalar'"):
            llm.load_state(tmp_path / "state")


def test_corrupt_states(path: Path, tmp_path: Path) -> None:
    """Truncated anywhere or with any bit flipped: StateError, and later results stay correct."""
    tokens = tokens_of(100)
    with phi_c.load(path) as llm:
        expected = generate(llm, tokens)
        llm.save_state(tmp_path / "state")
    data = (tmp_path / "state").read_bytes()
    start = len(data) - 3 * (len(data) // 3 // 4096 * 4096)
    rng = np.random.default_rng(0)
    header = int.from_bytes(data[12:16], "little") + 40 + 3 * 36 + 32
    broken = tmp_path / "broken"
    with phi_c.load(path) as llm:
        for size in (0, 1, 7, 8, 39, 40, header - 1, header, 4096, start + 5, len(data) - 1):
            broken.write_bytes(data[:size])
            with pytest.raises(StateError):
                llm.load_state(broken)
        broken.write_bytes(data + b"\0")
        with pytest.raises(StateError, match="expected"):
            llm.load_state(broken)
        for at in (*range(header), *(int(i) for i in rng.integers(4096, len(data), 60))):
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            broken.write_bytes(changed)
            with pytest.raises(StateError):
                llm.load_state(broken)
        for size in (40, 4096):
            broken.write_bytes(data[:8] + rng.bytes(size))
            with pytest.raises(StateError):
                llm.load_state(broken)
        broken.write_bytes(b"GGUF" + bytes(5000))
        with pytest.raises(StateError, match="not a saved state"):
            llm.load_state(broken)
        with pytest.raises(StateError, match="no such file"):
            llm.load_state(tmp_path / "nowhere")
        with pytest.raises(StateError, match="cannot be read"):
            llm.load_state(tmp_path)
        assert generate(llm, tokens).logprobs == expected.logprobs


def test_state_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with phi_c.load(path) as llm:
        generate(llm, tokens_of(100))
        with pytest.raises(OutputError, match="cannot be written"):
            llm.save_state(tmp_path / "file" / "state")
        llm.save_state(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    for call in (llm.save_state, llm.load_state):
        with pytest.raises(ModelClosedError):
            call(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "state"]


def test_save_and_load_during_other_calls(path: Path, tmp_path: Path) -> None:
    prompts = [tokens_of(150 + 10 * i, i) for i in range(4)]
    with phi_c.load(path) as llm:
        expected = [generate(llm, prompt).tokens for prompt in prompts]
        llm.save_state(tmp_path / "0")
    with phi_c.load(path, n_ctx=600) as llm:

        def work(i: int) -> None:
            for round_ in range(6):
                assert generate(llm, prompts[(i + round_) % 4]).tokens == expected[(i + round_) % 4]

        def load_and_save() -> None:
            for _ in range(8):
                llm.load_state(tmp_path / "0")
                llm.save_state(tmp_path / "1")
                llm.load_state(tmp_path / "1")

        run_concurrently(*(partial(work, i) for i in range(3)), load_and_save)
        assert llm.engine.scheduler.n_available_pages == llm.engine.kv.n_pages


_SAVE_FOREVER = """
    import sys
    import phi_c
    llm = phi_c.load(sys.argv[1], n_ctx=2048)
    llm.generate(list(range(3, 300)) * 6, max_tokens=1)
    llm.save_state(sys.argv[2])
    print("saved", flush=True)
    while True:
        llm.save_state(sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX only")
def test_process_killed_while_saving(path: Path, tmp_path: Path) -> None:
    """At any moment the file is complete."""
    state = tmp_path / "state"
    for milliseconds in (0, 1, 3, 7, 15, 40):
        assert kill_after(in_other_process(_SAVE_FOREVER, path, state), milliseconds) == b"saved\n"
        with phi_c.load(path, n_ctx=2048) as llm:
            assert llm.load_state(state).loaded_tokens == whole_pages(297 * 6)


def test_error_is_one_line_and_names_the_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"PHIPAGES" + bytes(4096))
    with phi_c.load(path) as llm, pytest.raises(PhiError) as caught:
        llm.load_state(tmp_path / "state")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "state") in str(caught.value)
