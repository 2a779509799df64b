"""Saved states and the prefix cache on disk through the Python interface, and in real processes that are killed."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi_c
from phi_c._core import PAGE_TOKENS
from phi_c.engine import disk_cache, page_file
from phi_c.errors import CacheError, ModelClosedError, OptionError, OutputError, PhiError, StateError
from tiny_gguf import write_tiny

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
TALK = [{"role": "user", "content": "the and in " * 30}]


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 300, n)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0", n_ctx=2048)


def generate(llm: phi_c.LLM, tokens: list[int], n: int = 12) -> phi_c.Completion:
    ban = dict.fromkeys(llm.tokenizer.eog_ids, -1e9)
    return llm.generate(tokens, max_tokens=n, logprobs=2, logit_bias=ban, **GREEDY)


def in_other_process(code: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
    )


def whole_pages(n: int) -> int:
    return n // PAGE_TOKENS * PAGE_TOKENS


# ---- saved states ----


@pytest.mark.parametrize("kv", ["f16", "q8"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [({}, {}), ({"window": 100}, {"n_ctx": 2048}), ({"n_ctx_orig": 300}, {}), ({"n_ctx_orig": 300}, {"rope": "long"})],
)
def test_a_state_goes_on_with_the_same_bits(
    tmp_path: Path, shape: dict[str, Any], options: dict[str, Any], kv: str
) -> None:
    """Prompts and a chat, in another model object with another page table, without computing their pages again."""
    model = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=2048, **shape)
    prompts = [tokens_of(200), [*tokens_of(200)[:150], *tokens_of(300, 1)], tokens_of(70, 2)]
    with phi_c.load(model, kv=kv, **options) as llm:
        first = [generate(llm, prompt) for prompt in prompts]
        answer = llm.chat(TALK, max_tokens=20, **GREEDY)
        talk = [*TALK, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "is it?"}]
        second = llm.chat(talk, max_tokens=20, logprobs=1, **GREEDY)
        saved = llm.save_state(tmp_path / "state")
        assert saved.n_bytes == (tmp_path / "state").stat().st_size
        assert saved.tokens == len(llm.engine.known_keys()) * PAGE_TOKENS
    with phi_c.load(model, kv=kv, **options) as llm:
        loaded = llm.load_state(tmp_path / "state")
        assert loaded.loaded_tokens == loaded.tokens == saved.tokens
        assert llm.engine.scheduler.n_unpromised == llm.engine.kv.n_pages
        for prompt, before in zip(prompts, first, strict=True):
            again = generate(llm, prompt)
            assert again.usage.cached_tokens == whole_pages(len(prompt) - 1)
            assert (again.tokens, again.logprobs) == (before.tokens, before.logprobs)
        again = llm.chat(talk, max_tokens=20, logprobs=1, **GREEDY)
        assert again.usage.cached_tokens == whole_pages(again.usage.prompt_tokens - 1)
        assert (again.tokens, again.logprobs) == (second.tokens, second.logprobs)


def test_one_text_of_many(path: Path, tmp_path: Path) -> None:
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


def test_a_smaller_cache_takes_what_was_used_last(path: Path, tmp_path: Path) -> None:
    old, new = tokens_of(321), tokens_of(321, 1)
    with phi_c.load(path) as llm:
        expected = [generate(llm, old).tokens, generate(llm, new).tokens]
        llm.save_state(tmp_path / "state")
    with phi_c.load(path, n_ctx=480) as llm:
        loaded = llm.load_state(tmp_path / "state")
        assert (loaded.tokens, loaded.loaded_tokens) == (640, 480)
        assert generate(llm, new).usage.cached_tokens == 320
        assert generate(llm, old).tokens == expected[0]
    with phi_c.load(path, n_ctx=480) as llm:
        running = llm.stream(tokens_of(200, 3), max_tokens=100, **GREEDY)
        next(running)
        assert llm.load_state(tmp_path / "state").loaded_tokens == 480 - 320  # that many are promised
        again = generate(llm, new, 1)
        assert again.usage.cached_tokens == 160
        list(running)
        assert llm.engine.scheduler.n_unpromised == llm.engine.kv.n_pages


def test_what_is_there_already_stays(path: Path, tmp_path: Path) -> None:
    tokens = tokens_of(300)
    with phi_c.load(path) as llm:
        expected = generate(llm, tokens)
        llm.save_state(tmp_path / "state")
        for _ in range(3):
            assert llm.load_state(tmp_path / "state") == phi_c.StateSummary(
                tmp_path / "state", 288, 288, (tmp_path / "state").stat().st_size
            )
        assert len(llm.engine.known_keys()) == len(set(llm.engine.known_keys())) == 9
        assert generate(llm, tokens).logprobs == expected.logprobs


def test_a_state_of_something_else(path: Path, tmp_path: Path) -> None:
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
        (path, {"kv": "q8"}, "saved with kv 'f16', expected 'q8'"),
        (path, {"layout": "file"}, "saved with layout 'packed', expected 'file'"),
    ):
        with phi_c.load(model, **{"tier": "scalar", **options}) as llm:
            with pytest.raises(StateError, match=message):
                llm.load_state(tmp_path / "state")
            assert llm.engine.known_keys() == []
    if len(phi_c._core.tiers()) > 1:
        with phi_c.load(path, tier=phi_c._core.tiers()[1]) as llm, pytest.raises(StateError, match="tier 'scalar'"):
            llm.load_state(tmp_path / "state")


def test_damaged_states(path: Path, tmp_path: Path) -> None:
    """Cut off anywhere, or with any byte changed: StateError, and what a model says stays right."""
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
        with pytest.raises(StateError, match="there is no such file"):
            llm.load_state(tmp_path / "nowhere")
        with pytest.raises(StateError, match="cannot be read"):
            llm.load_state(tmp_path)
        assert generate(llm, tokens).logprobs == expected.logprobs


def test_a_state_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
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


def test_saving_and_loading_while_others_run(path: Path, tmp_path: Path) -> None:
    prompts = [tokens_of(150 + 10 * i, i) for i in range(4)]
    with phi_c.load(path) as llm:
        expected = [generate(llm, prompt).tokens for prompt in prompts]
        llm.save_state(tmp_path / "0")
    with phi_c.load(path, n_ctx=600) as llm:
        errors: list[BaseException] = []

        def work(i: int) -> None:
            try:
                for round_ in range(6):
                    assert generate(llm, prompts[(i + round_) % 4]).tokens == expected[(i + round_) % 4]
            except BaseException as error:
                errors.append(error)

        def move() -> None:
            try:
                for _ in range(8):
                    llm.load_state(tmp_path / "0")
                    llm.save_state(tmp_path / "1")
                    llm.load_state(tmp_path / "1")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)] + [threading.Thread(target=move)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert llm.engine.scheduler.n_unpromised == llm.engine.kv.n_pages


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


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX's")
def test_a_process_killed_while_it_saves(path: Path, tmp_path: Path) -> None:
    """At whatever moment: under its name the file is whole."""
    state = tmp_path / "state"
    for milliseconds in (0, 1, 3, 7, 15, 40):
        process = in_other_process(_SAVE_FOREVER, path, state)
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with phi_c.load(path, n_ctx=2048) as llm:
            assert llm.load_state(state).loaded_tokens == whole_pages(297 * 6)


# ---- the prefix cache on disk ----


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.pages"))


@pytest.mark.parametrize("shape", [{}, {"window": 100}, {"n_ctx_orig": 300}])
def test_a_later_process_finds_the_prompt(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=2048, **shape)
    folder = tmp_path / "cache"
    prompt = tokens_of(500)
    with phi_c.load(model) as llm:
        expected = generate(llm, prompt)
        follow = [*prompt, *expected.tokens, *tokens_of(90, 1)]
        expected_follow = generate(llm, follow)
    with phi_c.load(model, prefix_cache=folder) as llm:
        first = generate(llm, prompt)
        assert first.usage.cached_tokens == 0
        assert first.logprobs == expected.logprobs
        assert len(files_of(folder)) == 1
        generate(llm, prompt)
        assert len(files_of(folder)) == 1
    with phi_c.load(model, prefix_cache=str(folder)) as llm:
        again = generate(llm, prompt)
        assert again.usage.cached_tokens == whole_pages(499)
        assert again.logprobs == expected.logprobs
    with phi_c.load(model, prefix_cache=folder) as llm:
        longer = generate(llm, follow)
        assert longer.usage.cached_tokens == whole_pages(500)  # of the answer nothing is kept
        assert longer.logprobs == expected_follow.logprobs
        assert len(files_of(folder)) == 2  # what is new of it
    with phi_c.load(model, prefix_cache=folder) as llm:
        both = generate(llm, follow)
        assert both.usage.cached_tokens == whole_pages(len(follow) - 1)
        assert both.logprobs == expected_follow.logprobs
        assert llm.engine.scheduler.n_unpromised == llm.engine.kv.n_pages


def test_other_models_and_options_never_hit(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    other = write_tiny(tmp_path / "other.gguf", weight_type="Q8_0", n_ctx=2048, seed=1)
    ways: list[tuple[Path, dict[str, Any]]] = [
        (path, {}),
        (other, {}),
        (path, {"kv": "q8"}),
        (path, {"layout": "file"}),
    ]
    ways += [(path, {"tier": tier}) for tier in phi_c._core.tiers()[:-1]]
    default = phi_c._core.default_tier()
    ways = [(model, {"tier": default, **options}) for model, options in ways]
    ways = [way for i, way in enumerate(ways) if way not in ways[:i]]
    for cached in (0, whole_pages(199)):
        for model, options in ways:
            with phi_c.load(model, prefix_cache=folder, **options) as llm:
                assert generate(llm, prompt).usage.cached_tokens == cached
    assert len(files_of(folder)) == len(ways)


def test_both_rotations_are_kept_apart(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m.gguf", weight_type="Q8_0", n_ctx=512, n_ctx_orig=128)
    prompt = tokens_of(120)
    with phi_c.load(model, prefix_cache=tmp_path / "cache") as llm:
        short = generate(llm, prompt, 4)
    with phi_c.load(model, prefix_cache=tmp_path / "cache", rope="long") as llm:
        long = generate(llm, prompt, 4)
        assert long.usage.cached_tokens == 0
        assert long.logprobs != short.logprobs
    with phi_c.load(model, prefix_cache=tmp_path / "cache") as llm:
        again = generate(llm, prompt, 4)
        assert again.usage.cached_tokens == whole_pages(119)
        assert again.logprobs == short.logprobs


def test_damaged_files_are_written_again(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=folder) as llm:
        expected = generate(llm, prompt)
    (file,) = files_of(folder)
    data = file.read_bytes()
    for at in (0, 20, 60, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 0x10
        for broken in (bytes(changed), data[:at]):
            file.write_bytes(broken)
            with phi_c.load(path, prefix_cache=folder) as llm:
                got = generate(llm, prompt)
                assert got.logprobs == expected.logprobs
                assert got.usage.cached_tokens == 0
                assert llm.engine.scheduler.n_unpromised == llm.engine.kv.n_pages
            assert files_of(folder) == [file]
            assert file.read_bytes() == data


def test_a_file_that_goes_while_it_is_known(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=folder) as llm:
        expected = generate(llm, prompt)
    with phi_c.load(path, prefix_cache=folder) as llm:
        shelf = llm.engine.scheduler.shelf
        assert shelf is not None
        shelf.refresh()
        real, shelf.refresh = shelf.refresh, lambda: None  # it is not noticed in time
        files_of(folder)[0].unlink()
        got = generate(llm, prompt)
        assert (got.usage.cached_tokens, got.logprobs) == (0, expected.logprobs)
        shelf.refresh = real


@pytest.mark.parametrize("lost", [0, 3, 5])
def test_a_file_replaced_by_one_with_fewer_pages(path: Path, tmp_path: Path, lost: int) -> None:
    """As a thread leaves it that writes what another one is writing, and loses a page to a third meanwhile."""
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=folder) as llm:
        expected = generate(llm, prompt)
        (file,) = files_of(folder)
        with phi_c.load(path, prefix_cache=folder) as other:
            shelf = other.engine.scheduler.shelf
            assert isinstance(shelf, disk_cache.DiskCache)
            shelf.refresh()  # knows the whole file
            keys = llm.engine.known_keys()
            kept = [key for key in shelf._keys[file.name] if key != shelf._keys[file.name][lost]]
            assert len(kept) == len(keys) - 1 == 5
            with file.with_suffix(".new").open("xb") as replacement:
                page_file.write_pages(replacement, shelf._origin, kept, llm.engine.kv.page_bytes, llm.engine.read_page)
            file.with_suffix(".new").replace(file)
            got = generate(other, prompt)
            assert (got.usage.cached_tokens, got.logprobs) == (lost * PAGE_TOKENS, expected.logprobs)
            assert other.engine.scheduler.n_unpromised == other.engine.kv.n_pages
    with phi_c.load(path, prefix_cache=folder) as llm:  # what was lost has been written again
        got = generate(llm, prompt)
        assert (got.usage.cached_tokens, got.logprobs) == (whole_pages(199), expected.logprobs)


def test_an_interrupt_while_pages_are_fetched(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=tmp_path / "c") as llm:
        expected = generate(llm, prompt)
    with phi_c.load(path, prefix_cache=tmp_path / "c") as llm:
        real = page_file.PageFile.page

        def interrupted(file: page_file.PageFile, index: int) -> Any:
            if index == 3:
                raise KeyboardInterrupt
            return real(file, index)

        monkeypatch.setattr(page_file.PageFile, "page", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, prompt)
        monkeypatch.undo()
        assert llm.engine.scheduler.n_unpromised == llm.engine.kv.n_pages
        got = generate(llm, prompt)
        assert (got.usage.cached_tokens, got.logprobs) == (192, expected.logprobs)


@pytest.mark.parametrize("n_gone", [0, 1, 2])
def test_pages_that_two_files_hold(path: Path, tmp_path: Path, n_gone: int) -> None:
    """As processes that wrote at the same time leave them; files may go between a look and the next."""
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=folder) as llm:
        expected = generate(llm, prompt)
    (file,) = files_of(folder)
    file.with_name("0.pages").write_bytes(file.read_bytes())
    file.with_name("zzz.pages").write_bytes(file.read_bytes())
    file.unlink()
    for order in (1, -1):
        with phi_c.load(path, prefix_cache=folder) as llm:
            shelf = llm.engine.scheduler.shelf
            assert shelf is not None
            shelf.refresh()
            shelf.refresh = lambda: None
            kept = {other: other.read_bytes() for other in files_of(folder)}
            for other in files_of(folder)[::order][:n_gone]:
                other.unlink()
            got = generate(llm, prompt)
            assert (got.usage.cached_tokens, got.logprobs) == (0 if n_gone == 2 else 192, expected.logprobs)
            for other in files_of(folder):
                other.unlink()
            for other, data in kept.items():
                other.write_bytes(data)


def test_a_folder_that_two_models_share_while_they_run(path: Path, tmp_path: Path) -> None:
    """What one has written the other finds at its next call."""
    with phi_c.load(path, prefix_cache=tmp_path / "c") as a, phi_c.load(path, prefix_cache=tmp_path / "c") as b:
        for seed in range(3):
            expected = generate(a, tokens_of(200, seed))
            time.sleep(0.02)  # folders' times are as fine as the system's clock
            got = generate(b, tokens_of(200, seed))
            assert (got.usage.cached_tokens, got.logprobs) == (whole_pages(199), expected.logprobs)


def test_the_size_is_bounded(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    with phi_c.load(path, prefix_cache=folder) as llm:
        generate(llm, tokens_of(200))
    (file,) = files_of(folder)
    n_bytes = file.stat().st_size
    monkeypatch.setenv(disk_cache.LIMIT_VARIABLE, str(3.5 * n_bytes / 2**30))
    with phi_c.load(path, prefix_cache=folder) as llm:
        for i in range(1, 8):
            os.utime(file, (i, i)) if i < 3 else None
            generate(llm, tokens_of(200, i))
            time.sleep(0.03)  # files' times are as fine as the system's clock
            assert sum(f.stat().st_size for f in files_of(folder)) <= 3.5 * n_bytes
            if i == 3:
                assert file not in files_of(folder)
    # What is used stays: the fifth is found, and so the sixth and not the fifth makes room for another one.
    for seeds in ((5, 100), (5,)):
        with phi_c.load(path, prefix_cache=folder) as llm:
            for seed in seeds:
                assert generate(llm, tokens_of(200, seed)).usage.cached_tokens == (0 if seed == 100 else 192)
                time.sleep(0.03)
    monkeypatch.setenv(disk_cache.LIMIT_VARIABLE, str(1.5 * n_bytes / 2**30))
    with phi_c.load(path, prefix_cache=tmp_path / "small") as llm:
        generate(llm, tokens_of(600, 30))
        assert sum(f.stat().st_size for f in files_of(tmp_path / "small")) <= 1.5 * n_bytes
    with phi_c.load(path, prefix_cache=tmp_path / "small") as llm:
        assert 192 <= generate(llm, tokens_of(600, 30)).usage.cached_tokens < 320  # the beginning
    monkeypatch.setenv(disk_cache.LIMIT_VARIABLE, "0")
    with phi_c.load(path, prefix_cache=tmp_path / "none") as llm:
        generate(llm, tokens_of(200))
        assert files_of(tmp_path / "none") == []
    monkeypatch.setenv(disk_cache.LIMIT_VARIABLE, "much")
    with pytest.raises(OptionError, match="PHI_C_PREFIX_CACHE_GIB is 'much', expected a number of GiB"):
        phi_c.load(path, prefix_cache=folder)


def test_a_folder_that_cannot_be_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be made"):
        phi_c.load(path, prefix_cache=tmp_path / "file")

    def full(*_: object) -> None:
        raise CacheError("no room")

    monkeypatch.setattr(disk_cache, "written_whole", full)
    with phi_c.load(path, prefix_cache=tmp_path / "c") as llm:
        with pytest.warns(RuntimeWarning, match="the prefix cache keeps nothing more: no room"):
            text = generate(llm, tokens_of(200))
        assert len(text.tokens) == 12
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(llm, tokens_of(200, 1))


def test_the_default_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path))
    with phi_c.load(path, prefix_cache=True) as llm:
        generate(llm, tokens_of(200))
    assert len(files_of(tmp_path / "prefix")) == 1
    assert disk_cache.n_bytes_kept() == files_of(tmp_path / "prefix")[0].stat().st_size
    with phi_c.load(path) as llm:
        assert generate(llm, tokens_of(200)).usage.cached_tokens == 0


def test_threads_with_one_disk_cache(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with prefixes in common, a cache with room for few of them and a limit that deletes files meanwhile."""
    shared = tokens_of(130)
    prompts = [[*shared, *tokens_of(60 + 16 * i, i)] for i in range(6)]
    with phi_c.load(path) as llm:
        expected = [generate(llm, prompt).logprobs for prompt in prompts]
        page_bytes = llm.engine.kv.page_bytes
    monkeypatch.setenv(disk_cache.LIMIT_VARIABLE, str(22 * page_bytes / 2**30))
    with phi_c.load(path, n_ctx=512, prefix_cache=tmp_path / "c") as llm:
        errors: list[BaseException] = []

        def work(first: int) -> None:
            try:
                for i in range(12):
                    at = (first + i * 5) % 6
                    assert generate(llm, prompts[at]).logprobs == expected[at]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert llm.engine.scheduler.n_unpromised == llm.engine.kv.n_pages
    assert sum(f.stat().st_size for f in files_of(tmp_path / "c")) <= 22 * page_bytes


_PROMPTS_FOREVER = """
    import hashlib, sys
    import numpy as np
    import phi_c
    llm = phi_c.load(sys.argv[1], n_ctx=512, prefix_cache=sys.argv[2])
    n = int(sys.argv[3])
    for i in range(n) if n else iter(int, 1):
        seed = i % 8 if n else np.random.randint(10**6)
        prompt = [int(t) for t in np.random.default_rng(seed).integers(3, 300, 200)]
        out = llm.generate(prompt, max_tokens=4, temperature=0, repeat_penalty=1)
        print(seed, *out.tokens, flush=True)
"""


def test_several_processes_share_a_folder(path: Path, tmp_path: Path) -> None:
    limit = {disk_cache.LIMIT_VARIABLE: str(40 * 32 * 1024 / 2**30)}  # of 48 pages that they need: files go as well
    processes = [in_other_process(_PROMPTS_FOREVER, path, tmp_path / "c", 24, **limit) for _ in range(3)]
    outputs = [process.communicate()[0].decode().splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    with phi_c.load(path) as llm:
        for output in outputs:
            assert len(output) == 24
            for line in output:
                seed, *tokens = map(int, line.split())
                prompt = [int(t) for t in np.random.default_rng(seed).integers(3, 300, 200)]
                assert llm.generate(prompt, max_tokens=4, **GREEDY).tokens == tokens


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX's")
def test_a_process_killed_while_it_writes(path: Path, tmp_path: Path) -> None:
    """Its files are whole or absent, what it left half done is cleared away in time, and later processes go on."""
    folder = tmp_path / "c"
    for milliseconds in (0, 2, 5, 11):
        process = in_other_process(_PROMPTS_FOREVER, path, folder, 0)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert files_of(folder)
    abandoned = files_of(folder)[0].with_suffix(".pages.0123.part")
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (1, 1))
    sums = {file: hashlib.sha256(file.read_bytes()).digest() for file in files_of(folder)}
    with phi_c.load(path, prefix_cache=folder) as llm:
        generate(llm, tokens_of(200, 77))
    assert not abandoned.exists()
    # None of them was found damaged, or it would have been deleted.
    assert sums.items() <= {file: hashlib.sha256(file.read_bytes()).digest() for file in files_of(folder)}.items()


def test_errors_are_one_line(path: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"PHIPAGES" + bytes(4096))
    with phi_c.load(path) as llm, pytest.raises(PhiError) as caught:
        llm.load_state(tmp_path / "state")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "state") in str(caught.value)
