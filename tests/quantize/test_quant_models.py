"""Quantised real models: near to float32, and the same text in llama.cpp."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import phi_c
import quality_files
from fuse import fuse_llama_to_phi3
from gguf import GGMLQuantizationType

Doubles = npt.NDArray[np.float64]

# Mean KL(float32 || quantised) over the text below, in nats: as measured, and a tenth.
LIMITS = {"Q8_0": 0.0040, "Q4_K_M": 0.093}
# What follows these is not in doubt, however an engine rounds its activations.
PROMPTS = (
    "1, 2, 3, 4, 5, 6, 7,",
    "A, B, C, D, E, F,",
    "one two three four five six one two three four five six one two",
)


@pytest.fixture(scope="module")
def wide(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return SmolLM2 in float32, widened until K-quants divide its rows; it computes the same."""
    weights = quality_files.read(smollm2_path)
    quality_files.pad_to_super_blocks(weights)
    target = tmp_path_factory.mktemp("wide") / "float32.gguf"
    return quality_files.write(weights, target, dict.fromkeys(weights.types, GGMLQuantizationType.F32))


@pytest.fixture(scope="module")
def wide_q4_k_m(wide: Path) -> Path:
    return phi_c.quantize_model(wide, wide.with_name("Q4_K_M.gguf"), "Q4_K_M").path


def log_probabilities(path: Path, text: str) -> Doubles:
    with phi_c.load(path, n_ctx=256) as llm:
        logits = llm.logits(llm.tokenizer.encode(text)[:128]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def test_near_to_float32(wide: Path, wide_q4_k_m: Path) -> None:
    text = Path(__file__).parents[1].joinpath("english.txt").read_text(encoding="utf-8")
    wide_q8_0 = phi_c.quantize_model(wide, wide.with_name("Q8_0.gguf"), "Q8_0").path
    reference = log_probabilities(wide, text)
    for file_type, path in (("Q8_0", wide_q8_0), ("Q4_K_M", wide_q4_k_m)):
        kl = (np.exp(reference) * (reference - log_probabilities(path, text))).sum(-1)
        print(f"{file_type}: mean KL {kl.mean():.5f}")
        assert 0 < kl.mean() < LIMITS[file_type]


def greedy_texts(path: Path) -> tuple[list[str], list[str]]:
    """Return what phi-c and llama.cpp write after each prompt."""
    xllamacpp: Any = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install xllamacpp")
    with phi_c.load(path, n_ctx=256) as llm:
        ours = [llm.generate(p, raw=True, temperature=0, repeat_penalty=1, max_tokens=12).text for p in PROMPTS]
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 256, 1, 0, False
    server = xllamacpp.Server(params)
    answers = [server.handle_completions({"prompt": ids, "n_predict": 12, "temperature": 0}) for ids in prompts]
    return ours, [answer["choices"][0]["text"] for answer in answers]


def test_the_same_text_in_llama_cpp(wide_q4_k_m: Path) -> None:
    ours, theirs = greedy_texts(wide_q4_k_m)
    assert ours == theirs
    assert ours[0].startswith(" 8, 9, 10")


def test_the_same_text_in_llama_cpp_from_a_phi3_file(smollm2_path: Path, tmp_path: Path) -> None:
    """Rows of 576: the types that K-quants fall back to, and fused matrices."""
    float32 = quality_files.expand(smollm2_path, tmp_path / "float32.gguf")
    fused = fuse_llama_to_phi3(float32, tmp_path / "phi3.gguf")
    ours, theirs = greedy_texts(phi_c.quantize_model(fused, tmp_path / "out.gguf", "Q5_K_M").path)
    assert ours == theirs
    assert ours[0].startswith(" 8, 9, 10")
