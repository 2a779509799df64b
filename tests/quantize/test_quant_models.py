"""Quantised real models: KL divergence from float32, and the same output as llama.cpp."""

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

# Upper limits of the mean KL(float32 || quantised) in nats on english.txt: 1.1 times the measured values.
LIMITS = {"Q8_0": 0.0040, "Q4_K_M": 0.093}
# Their continuations are so probable that rounding of activations does not change them.
PROMPTS = (
    "1, 2, 3, 4, 5, 6, 7,",
    "A, B, C, D, E, F,",
    "one two three four five six one two three four five six one two",
)


@pytest.fixture(scope="module")
def padded(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return SmolLM2 in float32, its rows padded to a multiple of 256; the model computes the same."""
    weights = quality_files.read(smollm2_path)
    quality_files.pad_to_super_blocks(weights)
    target = tmp_path_factory.mktemp("padded") / "float32.gguf"
    return quality_files.write(weights, target, dict.fromkeys(weights.types, GGMLQuantizationType.F32))


@pytest.fixture(scope="module")
def padded_q4_k_m(padded: Path) -> Path:
    return phi_c.quantize_model(padded, padded.with_name("Q4_K_M.gguf"), "Q4_K_M").path


def log_probabilities(path: Path, text: str) -> Doubles:
    with phi_c.load(path, n_ctx=256) as llm:
        logits = llm.logits(llm.tokenizer.encode(text)[:128]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@pytest.mark.exhaustive
def test_kl_divergence_from_float32(padded: Path, padded_q4_k_m: Path) -> None:
    text = Path(__file__).parents[1].joinpath("english.txt").read_text(encoding="utf-8")
    padded_q8_0 = phi_c.quantize_model(padded, padded.with_name("Q8_0.gguf"), "Q8_0").path
    reference = log_probabilities(padded, text)
    for file_type, path in (("Q8_0", padded_q8_0), ("Q4_K_M", padded_q4_k_m)):
        kl = (np.exp(reference) * (reference - log_probabilities(path, text))).sum(-1)
        print(f"{file_type}: mean KL {kl.mean():.5f}")
        assert 0 < kl.mean() < LIMITS[file_type]


def greedy_outputs(path: Path) -> tuple[list[str], list[str]]:
    """Return the greedy continuations of the prompts, by phi-c and by llama.cpp."""
    xllamacpp: Any = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install xllamacpp")
    with phi_c.load(path, n_ctx=256) as llm:
        ours = [llm.generate(p, raw=True, temperature=0, repeat_penalty=1, max_tokens=12).text for p in PROMPTS]
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 256, 1, 0, False
    server = xllamacpp.Server(params)
    responses = [server.handle_completions({"prompt": ids, "n_predict": 12, "temperature": 0}) for ids in prompts]
    return ours, [response["choices"][0]["text"] for response in responses]


@pytest.mark.exhaustive
def test_same_output_as_llama_cpp(padded_q4_k_m: Path) -> None:
    ours, llama_cpp = greedy_outputs(padded_q4_k_m)
    assert ours == llama_cpp
    assert ours[0].startswith(" 8, 9, 10")


@pytest.mark.exhaustive
def test_same_output_as_llama_cpp_for_a_phi3_file(smollm2_path: Path, tmp_path: Path) -> None:
    """Rows of 576 columns, which have fallback types, and fused matrices."""
    float32 = quality_files.expand(smollm2_path, tmp_path / "float32.gguf")
    fused = fuse_llama_to_phi3(float32, tmp_path / "phi3.gguf")
    ours, llama_cpp = greedy_outputs(phi_c.quantize_model(fused, tmp_path / "out.gguf", "Q5_K_M").path)
    assert ours == llama_cpp
    assert ours[0].startswith(" 8, 9, 10")
