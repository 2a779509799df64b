"""Small random models of transformers' own classes, saved as published ones are: config, weights, tokenizer.

Used by the tests against transformers and by `models.py`. Needs torch and transformers: the extra `reference`.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

Floats = npt.NDArray[np.float32]


def save_model(
    folder: Path,
    family: str,
    config: dict[str, Any],
    *,
    dtype: str = "float32",
    seed: int = 0,
    shard: str | None = None,
) -> Path:
    """Write a model of a family ("Phi3", "Phimoe", "Phi", "Llama") with such a config; returns the folder.

    Matrices deviate by fan_in^-0.5, so that attention and logits vary as a trained model's do, unlike at transformers'
    initialisation. Vectors are 1 or 0 with noise of 0.1.
    """
    with _quiet():
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
        # An embedding that is the output too would, at full size, make each token the likeliest after itself.
        embedding_scale = 0.25 if config.get("tie_word_embeddings") else 1.0
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                noise = torch.randn(weights.shape, generator=generator)
                if weights.ndim == 1:
                    weights.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * noise)
                else:
                    weights.copy_(noise * (embedding_scale if "embed" in name else weights.shape[-1] ** -0.5))
        options = {"max_shard_size": shard} if shard else {}
        model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return folder


def reference_logits(folder: Path, tokens: Sequence[int]) -> Floats:
    """Return transformers' logits after each token: float32 [n_tokens, n_vocab], eager attention, no cache."""
    return reference_run(folder, tokens)[0]


def reference_run(folder: Path, tokens: Sequence[int]) -> tuple[Floats, Floats]:
    """Return the same, and how far each token's routing was from another one, float32 [n_tokens].

    As a share of the router's scores, over all layers; infinite in models without experts.
    """
    margins = np.full(len(tokens), np.inf, np.float32)

    def look(module: Any, inputs: Any, output: Any) -> None:
        for i, scores in enumerate(output[0].float().numpy()):
            margins[i] = min(margins[i], _margin(scores, 2 * module.router_jitter_noise))

    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        _use_long_factors(model)
        for module in model.modules():
            if hasattr(module, "router_jitter_noise") and hasattr(module, "top_k"):
                module.register_forward_hook(look)
        with torch.no_grad():
            logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy()), margins


def _margin(scores: Floats, threshold: float) -> float:
    """Return how little would change what SparseMixer chooses, or whose scores are near enough to count."""
    chosen: list[int] = []
    least = np.inf
    for _ in range(2):
        left = np.delete(np.arange(len(scores)), chosen)
        best = int(left[scores[left].argmax()])
        others = np.delete(np.arange(len(scores)), [*chosen, best])
        apart = (scores[best] - scores[others]) / np.maximum(np.abs(scores[others]), scores[best])
        least = min([least, *apart, *np.abs(apart - threshold)])
        chosen.append(best)
    return float(least)


def _use_long_factors(model: Any) -> None:
    """Let transformers' Phimoe take the long factors beyond the original context, as its checkpoint's own code does.

    Its forward recomputes the frequencies without the length of the sequence, so it has the short ones at any length
    (seen in 5.24), while it does switch to `long_mscale`. Microsoft's modeling_phimoe.py switches both.
    """
    rotary = getattr(model.model, "rotary_emb", None)
    if model.config.model_type != "phimoe" or model.config.rope_parameters["rope_type"] != "longrope":
        return
    init, forward = rotary.rope_init_fn, rotary.forward

    def with_length(x: Any, position_ids: Any) -> Any:
        n_tokens = int(position_ids.max()) + 1
        rotary.rope_init_fn = lambda config: init(config, seq_len=n_tokens)
        return forward(x, position_ids)

    rotary.forward = with_length


def reference_tokenizer(folder: Path) -> Any:
    """Return transformers' tokenizer of a folder."""
    with _quiet():
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def random_tokens(n_tokens: int, n_vocab: int, seed: int = 1) -> list[int]:
    """Return ids without the first few, which are special in some vocabularies."""
    return [int(i) for i in np.random.default_rng(seed).integers(3, n_vocab, n_tokens)]


def worst_nmse(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest squared error of a position, as a share of its squared signal."""
    error = ((got.astype(np.float64) - expected) ** 2).sum(1)
    return float((error / (expected.astype(np.float64) ** 2).sum(1)).max())


def growing_factors(n: int, last: float) -> list[float]:
    """Return LongRoPE factors from 1 to `last` in the shape that published ones have: slowly, then fast."""
    return [float(f) for f in np.round(last ** (np.linspace(0, 1, n) ** 2), 4)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' advice on configs, its progress bars and its deprecations to itself."""
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    level, logger.level = logger.level, logging.ERROR
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|torch)(\.|$)")
            yield
    finally:
        logger.level = level
