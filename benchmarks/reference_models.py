"""Small random models in transformers: saved as Hugging Face folders, and run for reference logits.

Used by tests/transformers_reference and `models.py`. Needs torch and transformers (extra `reference`).
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
    """Write config.json and safetensors of a random model, and return the folder.

    family: prefix of transformers' class names: Phi3, Phimoe, Phi or Llama.
    config: arguments of the configuration class.
    dtype: torch type of the saved weights.
    seed: seed of the weights.
    shard: largest shard size, such as "200KB"; None: one file.

    Matrices have a standard deviation of fan_in^-0.5. Unlike with transformers' initialisation, attention and logits
    then vary as much as in a trained model. Norm weights are 1 and biases 0, with a standard deviation of 0.1.
    """
    with _quiet():
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
        # With an unscaled tied embedding, the most probable next token would always be the last token.
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
    """Return transformers' logits, float32 [n_tokens, n_vocab], with eager attention and no KV cache."""
    return reference_run(folder, tokens)[0]


def reference_run(folder: Path, tokens: Sequence[int]) -> tuple[Floats, Floats]:
    """Return the logits as `reference_logits` does, and the routing margin of each token.

    Routing margin, float32 [n_tokens]: relative difference of router scores to the nearest different choice of experts,
    the smallest of all layers; infinite without experts.
    """
    margins = np.full(len(tokens), np.inf, np.float32)

    def record_margins(module: Any, inputs: Any, output: Any) -> None:
        for i, scores in enumerate(output[0].float().numpy()):
            margins[i] = min(margins[i], _routing_margin(scores, 2 * module.router_jitter_noise))

    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        _use_long_factors(model)
        for module in model.modules():
            if hasattr(module, "router_jitter_noise") and hasattr(module, "top_k"):
                module.register_forward_hook(record_margins)
        with torch.no_grad():
            logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy()), margins


def _routing_margin(scores: Floats, threshold: float) -> float:
    """Return the smallest relative score change that would change SparseMixer's choice of experts or its mask."""
    chosen: list[int] = []
    smallest = np.inf
    for _ in range(2):
        remaining = np.delete(np.arange(len(scores)), chosen)
        best = int(remaining[scores[remaining].argmax()])
        others = np.delete(np.arange(len(scores)), [*chosen, best])
        distance = (scores[best] - scores[others]) / np.maximum(np.abs(scores[others]), scores[best])
        smallest = min([smallest, *distance, *np.abs(distance - threshold)])
        chosen.append(best)
    return float(smallest)


def _use_long_factors(model: Any) -> None:
    """Patch transformers' Phimoe to use LongRoPE's long factors beyond the original context.

    Its forward pass recomputes the frequencies without the sequence length, so it uses the short factors at any length
    (as of 5.24), although it switches to `long_mscale`. The published modeling_phimoe.py switches both.
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
    """Return transformers' tokenizer for a folder."""
    with _quiet():
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def random_tokens(n_tokens: int, n_vocab: int, seed: int = 1) -> list[int]:
    """Return random token ids of at least 3: the first ids are special tokens in some vocabularies."""
    return [int(i) for i in np.random.default_rng(seed).integers(3, n_vocab, n_tokens)]


def worst_nmse(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the NMSE of the worst row: its squared error divided by the squared expected values."""
    error = ((got.astype(np.float64) - expected) ** 2).sum(1)
    return float((error / (expected.astype(np.float64) ** 2).sum(1)).max())


def growing_factors(n: int, last: float) -> list[float]:
    """Return n LongRoPE factors from 1 to `last` that grow slowly, then fast, like published ones."""
    return [float(f) for f in np.round(last ** (np.linspace(0, 1, n) ** 2), 4)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' log messages, progress bars and deprecation warnings."""
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    level, logger.level = logger.level, logging.ERROR
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|torch)(\.|$)")
            yield
    finally:
        logger.level = level
