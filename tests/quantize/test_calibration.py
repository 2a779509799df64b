"""Collecting an importance matrix, compared with the NumPy reference model."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import phi_c
from core.closeness import may_round_differently, nmse
from exhaustive import mostly_exhaustive
from phi_c import _core
from phi_c.errors import ModelFileError, OptionError
from phi_c.quantize import calibration
from phi_c.quantize.imatrix import Entry, Imatrix, read_imatrix
from reference import Reference
from tiny_gguf import write_tiny

TEXT = (Path(__file__).parents[1] / "english.txt").read_text(encoding="utf-8")[:700]
N_CTX = 48


def expected_means(path: Path, ids: list[int], n_chunks: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean squares of each matrix's input over chunks of N_CTX tokens, by the reference model."""
    reference = Reference(path)
    sums: dict[str, Any] = {}
    for chunk in range(n_chunks):
        tokens = ids[chunk * N_CTX : (chunk + 1) * N_CTX]
        if reference.field("tokenizer.ggml.add_bos_token"):
            tokens = [int(reference.field("tokenizer.ggml.bos_token_id")), *tokens[1:]]
        reference.logits(tokens)
        for name, x in reference.inputs.items():
            sums[name] = sums.get(name, 0) + (x.astype(np.float64) ** 2).sum(0)
    return {name: total / (n_chunks * N_CTX) for name, total in sums.items()}


@pytest.mark.parametrize("tier", _core.tiers())
@pytest.mark.parametrize("weight_type", mostly_exhaustive(["F32", "Q4_0"], keep={"F32"}))
@pytest.mark.parametrize(("architecture", "vocabulary"), [("phi3", "spm"), ("llama", "bpe")])
def test_means_match_the_reference(
    tmp_path: Path, architecture: str, vocabulary: str, weight_type: str, tier: str
) -> None:
    path = write_tiny(tmp_path / "m.gguf", architecture, weight_type, vocabulary=vocabulary)
    with phi_c.load(path, tier=tier) as llm:
        ids = llm.tokenizer.encode(TEXT)
        assert len(ids) % N_CTX  # the last, incomplete chunk is dropped
        imatrix = phi_c.collect_imatrix(llm, TEXT, n_ctx=N_CTX, process_output=True)
    n_chunks = len(ids) // N_CTX
    assert n_chunks >= 3
    assert imatrix.n_chunks == n_chunks
    imatrix.save(tmp_path / "i.gguf")
    means, expected = read_imatrix(tmp_path / "i.gguf"), expected_means(path, ids, n_chunks)
    assert set(means) == set(expected)  # a fused matrix is one entry
    for name, mean in means.items():
        assert mean.shape == (1, len(expected[name]))
        assert nmse(mean[0], expected[name]) <= (1e-6 if weight_type == "F32" else 5e-4), name


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf")


def collect(path: Path, load: dict[str, Any] | None = None, **options: Any) -> Imatrix:
    with phi_c.load(path, **(load or {})) as llm:
        return phi_c.collect_imatrix(llm, TEXT, n_ctx=N_CTX, **options)


def assert_equal(a: Imatrix, b: Imatrix) -> None:
    assert set(a.entries) == set(b.entries)
    for name, entry in a.entries.items():
        assert np.array_equal(entry.sums, b.entries[name].sums), name
        assert np.array_equal(entry.counts, b.entries[name].counts), name


@pytest.mark.parametrize("tier", _core.tiers())
def test_batch_size_and_threads_change_no_bit(path: Path, tier: str) -> None:
    base = collect(path, {"tier": tier, "n_threads": 1, "n_batch": 16})
    for n_batch, n_threads in ((1, 2), (7, 1), (512, 2)):
        imatrix = collect(path, {"tier": tier, "n_threads": n_threads, "n_batch": n_batch})
        if not may_round_differently(tier, min(n_batch, N_CTX)):
            assert_equal(imatrix, base)


def test_collecting_in_two_calls_gives_the_same_bits(path: Path) -> None:
    whole, calls = collect(path), []
    imatrix = collect(path, n_chunks=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (1, 2), (2, 2)]
    assert imatrix.n_chunks == 2
    assert collect(path, first_chunk=2, into=imatrix) is imatrix
    assert_equal(imatrix, whole)


def test_output_matrix_is_opt_in(path: Path, tmp_path: Path) -> None:
    assert "output.weight" not in collect(path).entries
    tied = write_tiny(tmp_path / "tied.gguf", tied=True)
    assert set(collect(tied, process_output=True).entries) == set(collect(path).entries)


def test_an_interrupt_keeps_complete_chunks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, imatrix = 0, Imatrix(N_CTX)
    forward = _core.forward

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = forward(*arguments)
        if calls == 5:  # in the third chunk; a chunk is two batches
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(calibration, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(path, {"n_batch": 32}, into=imatrix)
    monkeypatch.undo()
    assert imatrix.n_chunks == 2
    assert_equal(imatrix, collect(path, n_chunks=2))


def test_chunks_beyond_n_ctx_orig_use_the_long_rope_factors(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="F32", n_ctx_orig=N_CTX // 2)
    with phi_c.load(path) as llm:
        ids = llm.tokenizer.encode(TEXT)
        means = phi_c.collect_imatrix(llm, TEXT, n_ctx=N_CTX, n_chunks=1).means()
    for name, mean in expected_means(path, ids, 1).items():
        if name in means:
            assert nmse(means[name][0], mean) <= 1e-6, name


def test_parse_special(path: Path) -> None:
    text = "<|user|>the and<|end|>" * 20
    with phi_c.load(path) as llm:
        plain = phi_c.collect_imatrix(llm, text, n_ctx=16)
        special = phi_c.collect_imatrix(llm, text, n_ctx=16, parse_special=True)
    assert special.n_chunks < plain.n_chunks


def test_bad_options(path: Path, tmp_path: Path) -> None:
    with phi_c.load(path, n_ctx=64) as llm:
        cases = {
            "n_ctx is 65, expected an integer from 1 to 64": {"n_ctx": 65},
            "n_chunks is 0": {"n_chunks": 0},
            "first_chunk is -1": {"first_chunk": -1},
            "expected at least 6464: 101 windows of 64": {"n_ctx": 64, "first_chunk": 100},
        }
        for message, options in cases.items():
            with pytest.raises(OptionError, match=message):
                phi_c.collect_imatrix(llm, TEXT, **{"n_ctx": N_CTX, **options})
        with pytest.raises(OptionError, match="the text has 1 tokens, expected at least 48: 1 window of 48"):
            phi_c.collect_imatrix(llm, "", n_ctx=N_CTX)
        other = Imatrix(N_CTX, entries={"blk.0.ffn_down.weight": Entry(np.ones((1, 3)), np.array([1]))})
        with pytest.raises(
            ModelFileError, match=r"another model: blk.0.ffn_down.weight has 3 columns in it and 512 columns in"
        ):
            phi_c.collect_imatrix(llm, TEXT, n_ctx=N_CTX, into=other)
        deeper = collect(write_tiny(tmp_path / "deep.gguf", n_layers=3))
        with pytest.raises(ModelFileError, match="columns in it and does not exist in"):
            phi_c.collect_imatrix(llm, TEXT, n_ctx=N_CTX, into=deeper)


def test_non_finite_activations_are_reported(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", weight_type="F32")
    raw = bytearray(path.read_bytes())
    with phi_c.load(path, layout="mmap") as llm:
        info = llm._file.tensors["blk.1.ffn_up.weight"]
    raw[info.offset : info.offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    imatrix = Imatrix(N_CTX)
    with pytest.raises(ModelFileError, match=r"the inputs of 'blk.1.ffn_down.weight' are not finite"):
        collect(path, into=imatrix)
    assert not imatrix.entries


def test_every_matrix_of_a_layer_is_collected(path: Path) -> None:
    """Fails if an architecture gains a matrix that has no entry in _INPUTS."""
    with phi_c.load(path) as llm:
        config = dataclasses.replace(llm.config, fused_qkv=False, fused_gate_up=False)
    assert len(calibration._inputs(config, True)) == config.n_layers * 7 + 1


def test_smollm2_activations_have_outlier_channels(smollm2_path: Path) -> None:
    text = (Path(__file__).parents[1] / "english.txt").read_text(encoding="utf-8")
    with phi_c.load(smollm2_path, n_ctx=256) as llm:
        means = phi_c.collect_imatrix(llm, text, n_ctx=256).means()
    assert len(means) == 30 * 7
    for name, mean in means.items():
        assert np.isfinite(mean).all() and (mean >= 0).all(), name
        assert mean.max() > 4 * np.median(mean) > 0, name
