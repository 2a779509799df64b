"""The prefix cache on disk: through the public interface, and in processes that are killed."""

import hashlib
import os
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi_c
from phi_c._core import PAGE_TOKENS
from phi_c.engine import page_file, prefix_cache
from phi_c.errors import CacheError, OptionError
from prompts import GREEDY, generate, in_other_process, kill_after, run_concurrently, tokens_of, whole_pages
from tiny_gguf import write_tiny


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.pages"))


@pytest.mark.parametrize("shape", [{}, {"window": 100}, {"n_ctx_orig": 300}])
def test_prompt_is_cached_for_later_processes(tmp_path: Path, shape: dict[str, Any]) -> None:
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
        assert longer.usage.cached_tokens == whole_pages(500)  # the pages of the answer are not stored
        assert longer.logprobs == expected_follow.logprobs
        assert len(files_of(folder)) == 2  # with the pages that the first file does not have
    with phi_c.load(model, prefix_cache=folder) as llm:
        both = generate(llm, follow)
        assert both.usage.cached_tokens == whole_pages(len(follow) - 1)
        assert both.logprobs == expected_follow.logprobs
        assert llm.engine.scheduler.n_available_pages == llm.engine.kv.n_pages


def test_other_models_and_options_miss(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    other = write_tiny(tmp_path / "other.gguf", weight_type="Q8_0", n_ctx=2048, seed=1)
    variants: list[tuple[Path, dict[str, Any]]] = [
        (path, {}),
        (other, {}),
        (path, {"kv_type": "q8"}),
        (path, {"layout": "mmap"}),
    ]
    variants += [(path, {"tier": tier}) for tier in phi_c._core.tiers()[:-1]]
    default = phi_c._core.default_tier()
    variants = [(model, {"tier": default, **options}) for model, options in variants]
    variants = [variant for i, variant in enumerate(variants) if variant not in variants[:i]]
    for cached in (0, whole_pages(199)):
        for model, options in variants:
            with phi_c.load(model, prefix_cache=folder, **options) as llm:
                assert generate(llm, prompt).usage.cached_tokens == cached
    assert len(files_of(folder)) == len(variants)


def test_long_rope_factors_have_different_keys(tmp_path: Path) -> None:
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


def test_corrupt_files_are_replaced(path: Path, tmp_path: Path) -> None:
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
                assert llm.engine.scheduler.n_available_pages == llm.engine.kv.n_pages
            assert files_of(folder) == [file]
            assert file.read_bytes() == data


def test_indexed_file_that_was_deleted(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=folder) as llm:
        expected = generate(llm, prompt)
    with phi_c.load(path, prefix_cache=folder) as llm:
        kv_connector = llm.engine.scheduler.kv_connector
        assert kv_connector is not None
        kv_connector.refresh()
        real, kv_connector.refresh = kv_connector.refresh, lambda: None  # the deletion is not noticed
        files_of(folder)[0].unlink()
        got = generate(llm, prompt)
        assert (got.usage.cached_tokens, got.logprobs) == (0, expected.logprobs)
        kv_connector.refresh = real


@pytest.mark.parametrize("lost", [0, 3, 5])
def test_file_replaced_by_one_with_fewer_pages(path: Path, tmp_path: Path, lost: int) -> None:
    """As after two writers of the same prompt, the second of which lost a page to eviction."""
    folder = tmp_path / "cache"
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=folder) as llm:
        expected = generate(llm, prompt)
        (file,) = files_of(folder)
        with phi_c.load(path, prefix_cache=folder) as other:
            kv_connector = other.engine.scheduler.kv_connector
            assert isinstance(kv_connector, prefix_cache.DiskPrefixCache)
            kv_connector.refresh()  # indexes the whole file
            keys = llm.engine.registered_keys()
            remaining = [key for key in kv_connector._keys[file.name] if key != kv_connector._keys[file.name][lost]]
            assert len(remaining) == len(keys) - 1 == 5
            with file.with_suffix(".new").open("xb") as replacement:
                page_file.write_pages(
                    replacement, kv_connector._origin, remaining, llm.engine.kv.page_bytes, llm.engine.read_page
                )
            file.with_suffix(".new").replace(file)
            got = generate(other, prompt)
            assert (got.usage.cached_tokens, got.logprobs) == (lost * PAGE_TOKENS, expected.logprobs)
            assert other.engine.scheduler.n_available_pages == other.engine.kv.n_pages
    with phi_c.load(path, prefix_cache=folder) as llm:  # the lost page was stored again
        got = generate(llm, prompt)
        assert (got.usage.cached_tokens, got.logprobs) == (whole_pages(199), expected.logprobs)


def test_error_while_pages_are_fetched(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens_of(200)
    with phi_c.load(path, prefix_cache=tmp_path / "c") as llm:
        expected = generate(llm, prompt)
    with phi_c.load(path, prefix_cache=tmp_path / "c") as llm:
        real = page_file.PageFile.page

        def failing(file: page_file.PageFile, index: int) -> Any:
            if index == 3:
                raise MemoryError("no room for a page")
            return real(file, index)

        monkeypatch.setattr(page_file.PageFile, "page", failing)
        with pytest.raises(MemoryError, match="no room for a page"):
            generate(llm, prompt)
        monkeypatch.undo()
        assert llm.engine.scheduler.n_available_pages == llm.engine.kv.n_pages
        got = generate(llm, prompt)
        assert (got.usage.cached_tokens, got.logprobs) == (192, expected.logprobs)


@pytest.mark.parametrize("n_deleted", [0, 1, 2])
def test_pages_stored_in_two_files(path: Path, tmp_path: Path, n_deleted: int) -> None:
    """As after concurrent writers; some of the files are deleted after they were indexed."""
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
            kv_connector = llm.engine.scheduler.kv_connector
            assert kv_connector is not None
            kv_connector.refresh()
            kv_connector.refresh = lambda: None
            contents = {other: other.read_bytes() for other in files_of(folder)}
            for other in files_of(folder)[::order][:n_deleted]:
                other.unlink()
            got = generate(llm, prompt)
            assert (got.usage.cached_tokens, got.logprobs) == (0 if n_deleted == 2 else 192, expected.logprobs)
            for other in files_of(folder):
                other.unlink()
            for other, data in contents.items():
                other.write_bytes(data)


def test_two_loaded_models_share_a_folder(path: Path, tmp_path: Path) -> None:
    """A file that one model writes is found by the next call of the other one."""
    with phi_c.load(path, prefix_cache=tmp_path / "c") as a, phi_c.load(path, prefix_cache=tmp_path / "c") as b:
        for seed in range(3):
            expected = generate(a, tokens_of(200, seed))
            time.sleep(0.02)  # the resolution of modification times
            got = generate(b, tokens_of(200, seed))
            assert (got.usage.cached_tokens, got.logprobs) == (whole_pages(199), expected.logprobs)


def test_least_recently_used_files_are_deleted_beyond_the_limit(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    with phi_c.load(path, prefix_cache=folder) as llm:
        generate(llm, tokens_of(200))
    (file,) = files_of(folder)
    n_bytes = file.stat().st_size
    monkeypatch.setenv(prefix_cache.LIMIT_VARIABLE, str(3.5 * n_bytes / 2**30))
    with phi_c.load(path, prefix_cache=folder) as llm:
        for i in range(1, 8):
            os.utime(file, (i, i)) if i < 3 else None
            generate(llm, tokens_of(200, i))
            time.sleep(0.03)  # the resolution of modification times
            assert sum(f.stat().st_size for f in files_of(folder)) <= 3.5 * n_bytes
            if i == 3:
                assert file not in files_of(folder)
    # Using the fifth prompt makes it the most recently used: the next file evicts the sixth, not the fifth.
    for seeds in ((5, 100), (5,)):
        with phi_c.load(path, prefix_cache=folder) as llm:
            for seed in seeds:
                assert generate(llm, tokens_of(200, seed)).usage.cached_tokens == (0 if seed == 100 else 192)
                time.sleep(0.03)
    monkeypatch.setenv(prefix_cache.LIMIT_VARIABLE, str(1.5 * n_bytes / 2**30))
    with phi_c.load(path, prefix_cache=tmp_path / "small") as llm:
        generate(llm, tokens_of(600, 30))
        assert sum(f.stat().st_size for f in files_of(tmp_path / "small")) <= 1.5 * n_bytes
    with phi_c.load(path, prefix_cache=tmp_path / "small") as llm:
        assert 192 <= generate(llm, tokens_of(600, 30)).usage.cached_tokens < 320  # the beginning of the prompt
    monkeypatch.setenv(prefix_cache.LIMIT_VARIABLE, "0")
    with phi_c.load(path, prefix_cache=tmp_path / "none") as llm:
        generate(llm, tokens_of(200))
        assert files_of(tmp_path / "none") == []
    monkeypatch.setenv(prefix_cache.LIMIT_VARIABLE, "much")
    with pytest.raises(OptionError, match="PHI_C_PREFIX_CACHE_GIB is 'much', expected a number of GiB"):
        phi_c.load(path, prefix_cache=folder)


def test_folder_that_cannot_be_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be created"):
        phi_c.load(path, prefix_cache=tmp_path / "file")

    def full(*_: object) -> None:
        raise CacheError("no room")

    monkeypatch.setattr(prefix_cache, "atomic_write", full)
    with phi_c.load(path, prefix_cache=tmp_path / "c") as llm:
        with pytest.warns(RuntimeWarning, match="the prefix cache on disk is disabled: no room"):
            text = generate(llm, tokens_of(200))
        assert len(text.tokens) == 12
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(llm, tokens_of(200, 1))


def test_default_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_C_CACHE", str(tmp_path))
    with phi_c.load(path, prefix_cache=True) as llm:
        generate(llm, tokens_of(200))
    assert len(files_of(tmp_path / "prefix")) == 1
    assert prefix_cache.stored_bytes() == files_of(tmp_path / "prefix")[0].stat().st_size
    with phi_c.load(path) as llm:
        assert generate(llm, tokens_of(200)).usage.cached_tokens == 0


def test_concurrent_calls(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with a common prefix, a KV cache with room for a few, and a limit that causes evictions."""
    shared = tokens_of(130)
    prompts = [[*shared, *tokens_of(60 + 16 * i, i)] for i in range(6)]
    with phi_c.load(path) as llm:
        expected = [generate(llm, prompt).logprobs for prompt in prompts]
        page_bytes = llm.engine.kv.page_bytes
    monkeypatch.setenv(prefix_cache.LIMIT_VARIABLE, str(22 * page_bytes / 2**30))
    with phi_c.load(path, n_ctx=512, prefix_cache=tmp_path / "c") as llm:

        def work(first: int) -> None:
            for i in range(12):
                at = (first + i * 5) % 6
                assert generate(llm, prompts[at]).logprobs == expected[at]

        run_concurrently(*(partial(work, i) for i in range(3)))
        assert llm.engine.scheduler.n_available_pages == llm.engine.kv.n_pages
    assert sum(f.stat().st_size for f in files_of(tmp_path / "c")) <= 22 * page_bytes


def test_concurrent_writes_stay_below_the_limit(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both writers find room for their file before either has written."""
    both_have_room, write_pages = threading.Barrier(2), prefix_cache.write_pages

    def write_together(*arguments: Any) -> None:
        both_have_room.wait(60)
        write_pages(*arguments)

    monkeypatch.setattr(prefix_cache, "write_pages", write_together)
    with phi_c.load(path, n_ctx=512, prefix_cache=tmp_path) as llm:
        limit = 200 // PAGE_TOKENS * llm.engine.kv.page_bytes * 3 // 2
    monkeypatch.setenv(prefix_cache.LIMIT_VARIABLE, str(limit / 2**30))
    with phi_c.load(path, n_ctx=512, prefix_cache=tmp_path) as llm:
        run_concurrently(*(partial(generate, llm, tokens_of(200, seed)) for seed in range(2)))
    assert not both_have_room.broken
    assert len(files_of(tmp_path)) == 1
    assert files_of(tmp_path)[0].stat().st_size <= limit


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


def test_processes_share_a_folder(path: Path, tmp_path: Path) -> None:
    limit = {
        prefix_cache.LIMIT_VARIABLE: str(40 * 32 * 1024 / 2**30)
    }  # 40 of the 48 pages that they store: files are evicted
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


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX only")
def test_process_killed_while_writing(path: Path, tmp_path: Path) -> None:
    """Its files are complete or absent, its stale partial files are deleted, and later processes use the cache."""
    folder = tmp_path / "c"
    for milliseconds in (0, 2, 5, 11):
        kill_after(in_other_process(_PROMPTS_FOREVER, path, folder, 0), milliseconds)
    assert files_of(folder)
    abandoned = files_of(folder)[0].with_suffix(".pages.0123.part")
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (1, 1))
    sums = {file: hashlib.sha256(file.read_bytes()).digest() for file in files_of(folder)}
    with phi_c.load(path, prefix_cache=folder) as llm:
        generate(llm, tokens_of(200, 77))
    assert not abandoned.exists()
    # None of them was found corrupt and deleted.
    assert sums.items() <= {file: hashlib.sha256(file.read_bytes()).digest() for file in files_of(folder)}.items()
