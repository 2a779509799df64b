"""read_config: defaults for absent keys, and an error message for each kind of invalid file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from draft import (
    HEAD_DIM,
    N_EMBD,
    N_EXPERTS,
    N_FFN,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    N_VOCAB,
    ROPE_LONG,
    ROPE_SHORT,
    Draft,
)

from phi_c import errors
from phi_c.gguf.reader import GGUFFile
from phi_c.model.architectures import ARCHITECTURES
from phi_c.model.config import ModelConfig, expected_tensors, read_config
from raw_gguf import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32


@pytest.fixture(params=["phi3", "llama"])
def draft(tmp_path: Path, request: pytest.FixtureRequest) -> Draft:
    return Draft(tmp_path / "tiny.gguf", request.param)


@pytest.fixture
def phi3(tmp_path: Path) -> Draft:
    return Draft(tmp_path / "tiny.gguf", "phi3")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults(tmp_path: Path, architecture: str) -> None:
    """The file has only the required keys, so everything else has its default."""
    draft = Draft(tmp_path / "tiny.gguf", architecture)
    assert draft.read() == ModelConfig(
        architecture=draft.architecture,
        name="Tiny",
        n_layers=N_LAYERS,
        n_embd=N_EMBD,
        n_ffn=N_FFN,
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
        rope_dims=HEAD_DIM,
        n_vocab=N_VOCAB,
        n_ctx_train=4096,
        n_ctx_orig=4096,
        norm_eps=1e-5,
        rope_style="interleaved" if draft.architecture == "llama" else "neox",
        rope_freq_base=10000.0,
        rope_attn_factor=1.0,
        window=None,
        rope_scale=1.0,
        long_rope=False,
        fused_qkv=draft.architecture == "phi3",
        fused_gate_up=draft.architecture == "phi3",
        norm="rms" if draft.architecture in ("phi3", "llama") else "layer",
        activation="gelu" if draft.architecture == "phi2" else "swiglu",
        parallel=draft.architecture == "phi2",
        n_experts=N_EXPERTS if draft.architecture == "phimoe" else 0,
        attn_bias=draft.architecture in ("phi2", "phimoe"),
        output_bias=draft.architecture in ("phi2", "phimoe"),
    )


def test_defaults_of_usual_keys(draft: Draft) -> None:
    del draft.keys["general.name"]
    draft.remove("embedding_length")
    assert (draft.read().name, draft.read().n_embd) == ("tiny", N_EMBD)
    draft.remove("attention.head_count_kv")  # default: head_count, so k and v have as many rows as q
    for name in list(draft.shapes):
        if "attn_k" in name or "attn_v" in name:
            draft.shapes[name] = (N_EMBD, N_EMBD)
        if "attn_qkv" in name:
            draft.shapes[name] = (3 * N_EMBD, N_EMBD)
    assert draft.read().n_kv_heads == N_HEADS


def test_values_override_defaults(draft: Draft) -> None:
    draft.set("rope.dimension_count", U32, 6)
    draft.set("rope.freq_base", F32, 500000.0)
    draft.set("rope.scaling.original_context_length", U32, 2048)
    draft.set("attention.layer_norm_rms_epsilon", F32, 0.25)
    draft.set("attention.sliding_window", U32, 100)
    draft.set("rope.scaling.attn_factor", F32, 1.25)
    config = draft.read()
    assert (config.rope_dims, config.rope_freq_base, config.n_ctx_orig) == (6, 500000.0, 2048)
    assert (config.norm_eps, config.window, config.rope_attn_factor) == (0.25, 100, 1.25)


def test_config_is_frozen(phi3: Draft) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        phi3.read().n_layers = 3  # type: ignore[misc]  # the error under test


class TestWindow:
    @pytest.mark.parametrize(("value", "window"), [(0, None), (1, 1), (4095, 4095), (4096, None), (262144, None)])
    def test_key(self, draft: Draft, value: int, window: int | None) -> None:
        draft.set("attention.sliding_window", U32, value)
        assert draft.read().window == window

    def test_array_of_one_value_per_layer(self, draft: Draft) -> None:
        draft.set("attention.sliding_window", ARRAY, (U32, [64] * N_LAYERS))
        assert draft.read().window == 64
        draft.set("attention.sliding_window", ARRAY, (U32, [64, 0]))
        with pytest.raises(errors.UnsupportedModelError, match="differs between layers"):
            draft.read()

    @pytest.mark.parametrize(
        ("architecture", "n_embd", "n_ctx", "n_vocab", "window"),
        [
            ("phi3", 3072, 4096, 8, 2047),  # Phi-3-mini-4k
            ("phi3", 5120, 4096, 8, 2047),  # Phi-3-medium-4k
            ("phi3", 3072, 131072, 8, None),  # Phi-3-mini-128k: its window covers the context
            ("phi3", 5120, 16384, 8, None),  # Phi-4
            ("phi3", 4096, 4096, 8, None),
            ("llama", 3072, 4096, 32064, 2047),  # Phi-3-mini-4k converted as llama
            ("llama", 3072, 4096, 8, None),
        ],
    )
    def test_default_of_published_models(
        self, tmp_path: Path, architecture: str, n_embd: int, n_ctx: int, n_vocab: int, window: int | None
    ) -> None:
        """The file is sparse and has the published n_embd; its weights are zeros."""
        draft = Draft(tmp_path / "published.gguf", architecture)
        draft.set("context_length", U32, n_ctx)
        draft.set("embedding_length", U32, n_embd)
        draft.set("attention.key_length", U32, HEAD_DIM)
        draft.shapes["token_embd.weight"] = (n_vocab, n_embd)
        for name, shape in draft.shapes.items():
            if name != "token_embd.weight":
                draft.shapes[name] = tuple(n_embd if size == N_EMBD else size for size in shape)
        for layer in range(N_LAYERS):
            draft.shapes[f"blk.{layer}.attn_output.weight"] = (n_embd, N_HEADS * HEAD_DIM)
            if architecture == "llama":
                draft.shapes[f"blk.{layer}.attn_q.weight"] = (N_HEADS * HEAD_DIM, n_embd)
        draft.types = dict.fromkeys(draft.shapes, 1)
        assert draft.read().window == window


class TestRope:
    def test_long_rope_attention_factor(self, phi3: Draft) -> None:
        phi3.add_long_rope()
        phi3.set("context_length", U32, 131072)
        phi3.set("rope.scaling.original_context_length", U32, 4096)
        assert phi3.read().rope_attn_factor == pytest.approx(1.190238, abs=1e-6)
        phi3.set("rope.scaling.attn_factor", F32, 1.5)
        assert phi3.read().rope_attn_factor == 1.5

    def test_long_rope_without_a_longer_context(self, phi3: Draft) -> None:
        phi3.add_long_rope()
        phi3.set("rope.scaling.original_context_length", U32, 4096)
        assert phi3.read().rope_attn_factor == 1.0

    def test_long_rope_needs_the_original_context(self, phi3: Draft) -> None:
        phi3.add_long_rope()
        with pytest.raises(errors.ModelFileError, match="original_context_length is missing"):
            phi3.read()

    @pytest.mark.parametrize("missing", [ROPE_LONG, ROPE_SHORT])
    def test_long_rope_needs_both_tensors(self, phi3: Draft, missing: str) -> None:
        phi3.add_long_rope()
        phi3.set("rope.scaling.original_context_length", U32, 4096)
        del phi3.shapes[missing]
        with pytest.raises(errors.ModelFileError, match=missing):
            phi3.read()

    @pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), 1e-30])
    def test_long_rope_factor_out_of_range(self, phi3: Draft, factor: float) -> None:
        phi3.add_long_rope(factor=factor)
        phi3.set("rope.scaling.original_context_length", U32, 4096)
        with pytest.raises(errors.ModelFileError, match=r"'rope_factors_long\.weight' contains"):
            phi3.read()

    def test_long_rope_and_rope_freqs(self, phi3: Draft) -> None:
        phi3.add_long_rope()
        phi3.shapes["rope_freqs.weight"] = (HEAD_DIM // 2,)
        phi3.set("rope.scaling.original_context_length", U32, 4096)
        with pytest.raises(errors.UnsupportedModelError, match="found both"):
            phi3.read()

    def test_linear_scale(self, draft: Draft) -> None:
        draft.set("rope.scaling.factor", F32, 4.0)
        assert draft.read().rope_scale == 4.0  # the type defaults to linear
        draft.set("rope.scaling.type", STRING, "linear")
        assert draft.read().rope_scale == 4.0
        draft.set("rope.scaling.type", STRING, "none")
        assert draft.read().rope_scale == 1.0
        draft.remove("rope.scaling.type")
        draft.set("rope.scaling.factor", F32, 0.0)
        assert draft.read().rope_scale == 1.0

    def test_linear_scale_with_old_key(self, draft: Draft) -> None:
        draft.set("rope.scale_linear", F32, 2.0)
        assert draft.read().rope_scale == 2.0

    def test_other_scaling_types(self, draft: Draft) -> None:
        draft.set("rope.scaling.type", STRING, "yarn")
        with pytest.raises(errors.UnsupportedModelError, match="'yarn', expected none, linear or longrope"):
            draft.read()
        draft.set("rope.scaling.type", STRING, "longrope")
        with pytest.raises(errors.ModelFileError, match="but rope_factors_long"):
            draft.read()


BAD_VALUES: list[tuple[str, int, object, str]] = [
    ("context_length", U32, 0, "context_length is 0, expected an integer from 1"),
    ("context_length", U32, 2**32 - 1, "context_length is 4294967295"),
    ("context_length", F32, 4096.0, r"context_length is 4096\.0"),
    ("context_length", BOOL, True, "context_length is True"),
    ("block_count", U32, 0, "block_count is 0"),
    ("block_count", U32, 2**30, "block_count is 1073741824, expected at most the file's"),
    ("block_count", U32, 3, r"no tensor 'blk\.2\."),
    ("block_count", U32, 1, r"tensor 'blk\.1\..*' is not part of"),
    ("embedding_length", U32, 64, "embedding_length is 64, but token_embd.weight has 32 columns"),
    ("feed_forward_length", U32, 49, r"has the shape \(.*48.*\), expected \(.*49.*\)"),
    ("attention.head_count", U32, 5, "head_count is 5, expected a divisor of 32"),
    ("attention.head_count", U32, 0, "head_count is 0"),
    ("attention.head_count", STRING, "4", "head_count is '4'"),
    ("attention.head_count", ARRAY, (STRING, ["4"]), "head_count is an array of 1 elements"),
    ("attention.head_count_kv", U32, 3, "n_kv_heads is 3, expected a divisor of 4"),
    ("attention.head_count_kv", I32, -2, "head_count_kv is -2"),
    ("attention.head_count_kv", U32, 4, "has the shape"),
    ("attention.head_count_kv", ARRAY, (U32, []), "head_count_kv is an array of 0 elements"),
    ("attention.key_length", U32, 16, "has the shape"),
    ("attention.key_length", U32, 9, "head_dim is 9, expected an even number"),
    ("rope.dimension_count", U32, 7, "rope.dimension_count is 7, expected an even number"),
    ("rope.dimension_count", U32, 10, r"rope.dimension_count is 10, expected at most 8 \(head_dim\)"),
    ("rope.dimension_count", U32, 0, "rope.dimension_count is 0"),
    ("rope.freq_base", F32, 0.0, "rope.freq_base is 0.0, expected a number from 1 to"),
    ("rope.freq_base", F32, float("nan"), "rope.freq_base is nan"),
    ("rope.freq_base", F32, float("inf"), "rope.freq_base is inf"),
    ("rope.freq_base", F32, -10000.0, "rope.freq_base is -10000.0"),
    ("rope.scaling.factor", F32, float("nan"), "rope.scaling.factor is nan"),
    ("rope.scaling.attn_factor", F32, 1e30, "rope.scaling.attn_factor is 1"),
    ("rope.scaling.type", U8, 1, "rope.scaling.type is 1, expected a string"),
    ("rope.scaling.original_context_length", U32, 0, "original_context_length is 0"),
    ("attention.layer_norm_rms_epsilon", F32, 0.0, "layer_norm_rms_epsilon is 0.0"),
    ("attention.layer_norm_rms_epsilon", STRING, "x", "layer_norm_rms_epsilon is 'x'"),
    ("attention.sliding_window", I32, -1, "sliding_window is -1, expected an integer from 0"),
]


@pytest.mark.parametrize(("name", "type_id", "value", "message"), BAD_VALUES)
def test_bad_value(draft: Draft, name: str, type_id: int, value: object, message: str) -> None:
    draft.set(name, type_id, value)
    with pytest.raises((errors.ModelFileError, errors.UnsupportedModelError), match=message) as caught:
        draft.read()
    assert str(caught.value).startswith(f"{draft.path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["context_length", "block_count", "feed_forward_length", "attention.head_count"])
def test_required_keys(draft: Draft, name: str) -> None:
    draft.remove(name)
    with pytest.raises(errors.ModelFileError, match=rf"{draft.architecture}\.{name} is missing"):
        draft.read()


@pytest.mark.parametrize(
    ("name", "type_id", "disabled", "enabled"),
    [
        ("expert_count", U32, 0, 16),
        ("attn_logit_softcapping", F32, 0.0, 30.0),
        ("logit_scale", F32, 1.0, 0.5),
        ("use_parallel_residual", BOOL, False, True),
        ("attention.causal", BOOL, True, False),
        ("attention.clamp_kqv", F32, 0.0, float("nan")),
    ],
)
def test_keys_of_unsupported_computations(
    draft: Draft, name: str, type_id: int, disabled: object, enabled: object
) -> None:
    without_key = draft.read()
    draft.set(name, type_id, disabled)
    assert draft.read() == without_key
    draft.set(name, type_id, enabled)
    with pytest.raises(errors.UnsupportedModelError, match=rf"{draft.architecture}\.{name} is"):
        draft.read()


def test_key_that_no_value_disables(draft: Draft) -> None:
    draft.set("attention.scale", F32, 0.1)
    with pytest.raises(errors.UnsupportedModelError, match=r"attention\.scale"):
        draft.read()


def test_value_length_must_equal_key_length(draft: Draft) -> None:
    draft.set("attention.value_length", U32, HEAD_DIM)
    draft.read()
    draft.set("attention.value_length", U32, 4)
    with pytest.raises(errors.UnsupportedModelError, match="value_length is 4"):
        draft.read()


class TestArchitecture:
    @pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "blk.1.attn_norm.bias", "output_norm.bias"])
    @pytest.mark.parametrize("architecture", ["phi2", "phimoe"])
    def test_missing_bias(self, tmp_path: Path, architecture: str, name: str) -> None:
        draft = Draft(tmp_path / "tiny.gguf", architecture)
        del draft.shapes[name]
        with pytest.raises(errors.ModelFileError, match=f"no tensor '{name}'"):
            draft.read()

    def test_phimoe_without_biases(self, tmp_path: Path) -> None:
        draft = Draft(tmp_path / "tiny.gguf", "phimoe")
        for name in [name for name in draft.shapes if name.endswith(".bias") and "norm" not in name]:
            del draft.shapes[name]
        config = draft.read()
        assert not config.attn_bias and not config.output_bias and config.norm == "layer"

    def test_phi2_with_fused_qkv(self, tmp_path: Path) -> None:
        draft = Draft(tmp_path / "tiny.gguf", "phi2")
        n_rows = (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM
        for layer in range(N_LAYERS):
            for letter in "qkv":
                del draft.shapes[f"blk.{layer}.attn_{letter}.weight"], draft.shapes[f"blk.{layer}.attn_{letter}.bias"]
            draft.shapes |= {f"blk.{layer}.attn_qkv.weight": (n_rows, N_EMBD), f"blk.{layer}.attn_qkv.bias": (n_rows,)}
        assert draft.read().fused_qkv

    @pytest.mark.parametrize(
        ("key_name", "value", "message"),
        [("expert_used_count", 1, "expert_used_count is 1, expected 2"), ("expert_count", 1, "expert_count is 1")],
    )
    def test_number_of_experts(self, tmp_path: Path, key_name: str, value: int, message: str) -> None:
        draft = Draft(tmp_path / "tiny.gguf", "phimoe")
        draft.set(key_name, U32, value)
        with pytest.raises(errors.PhiError, match=message):
            draft.read()

    @pytest.mark.parametrize("architecture", ["phi3", "llama", "phi2"])
    def test_experts_in_dense_architectures(self, tmp_path: Path, architecture: str) -> None:
        draft = Draft(tmp_path / "tiny.gguf", architecture)
        draft.set("expert_count", U32, 8)
        with pytest.raises(errors.UnsupportedModelError, match="expert_count is 8"):
            draft.read()

    def test_unknown_architecture(self, phi3: Draft) -> None:
        phi3.keys["general.architecture"] = (STRING, "qwen2")
        with pytest.raises(errors.UnsupportedModelError, match="'qwen2' is not supported, expected one of phi3"):
            phi3.read()

    def test_missing_architecture(self, phi3: Draft) -> None:
        del phi3.keys["general.architecture"]
        with pytest.raises(errors.ModelFileError, match="expected a string, found no such key"):
            phi3.read()

    def test_architecture_is_not_a_string(self, phi3: Draft) -> None:
        phi3.keys["general.architecture"] = (U8, 3)
        with pytest.raises(errors.ModelFileError, match="expected a string, found 3"):
            phi3.read()

    def test_vocabulary_only_file(self, phi3_vocab: Path) -> None:
        with (
            GGUFFile(phi3_vocab) as file,
            pytest.raises(errors.UnsupportedModelError, match="has no tensors"),
        ):
            read_config(file)


def change_shape(name: str, shape: tuple[int, ...]) -> Callable[[Draft], None]:
    return lambda draft: draft.shapes.update({name: shape})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.shapes.pop("token_embd.weight"), errors.ModelFileError, "no tensor 'token_embd.weight'"),
        (
            lambda d: d.shapes.pop("output_norm.weight"),
            errors.ModelFileError,
            "no tensor 'output_norm.weight'",
        ),
        (lambda d: d.shapes.pop("blk.1.ffn_down.weight"), errors.ModelFileError, "no tensor 'blk.1.ffn_down"),
        (change_shape("token_embd.weight", (320,)), errors.ModelFileError, r"expected \(n_vocab, n_embd\)"),
        (change_shape("blk.0.ffn_up.weight", (1, 2)), errors.ModelFileError, r"blk.0.ffn_up.*shape \(1, 2\)"),
        (
            change_shape("blk.0.attn_norm.weight", (32, 1)),
            errors.ModelFileError,
            r"shape \(32, 1\), expected",
        ),
        (change_shape("output.weight", (9, 32)), errors.ModelFileError, r"'output.weight' has the shape \(9"),
        (
            change_shape("blk.0.attn_q.bias", (32,)),
            errors.UnsupportedModelError,
            "'blk.0.attn_q.bias' is not",
        ),
        (change_shape("blk.2.ffn_norm.weight", (32,)), errors.UnsupportedModelError, "with 2 layers"),
    ],
)
def test_invalid_tensors(draft: Draft, change: Callable[[Draft], object], error: type[Exception], message: str) -> None:
    change(draft)
    with pytest.raises(error, match=message):
        draft.read()


@pytest.mark.parametrize(("type_id", "accepted"), [(0, True), (1, True), (30, True), (8, False)])
def test_vector_types(draft: Draft, type_id: int, accepted: bool) -> None:
    draft.types["output_norm.weight"] = type_id
    if accepted:
        draft.read()
    else:
        with pytest.raises(errors.UnsupportedModelError, match=r"'output_norm\.weight' is of type Q8_0"):
            draft.read()


def test_more_tokens_than_embedding_rows(draft: Draft) -> None:
    draft.keys["tokenizer.ggml.tokens"] = (ARRAY, (STRING, ["x"] * N_VOCAB))
    draft.read()
    draft.keys["tokenizer.ggml.tokens"] = (ARRAY, (STRING, ["x"] * (N_VOCAB + 1)))
    with pytest.raises(errors.ModelFileError, match=r"11 tokens, but token_embd\.weight has 10 rows"):
        draft.read()


def test_integers_of_any_type(draft: Draft) -> None:
    draft.set("attention.head_count_kv", U16, N_KV_HEADS)
    draft.set("attention.head_count", ARRAY, (I32, [N_HEADS] * N_LAYERS))
    assert (draft.read().n_heads, draft.read().n_kv_heads) == (N_HEADS, N_KV_HEADS)


def test_expected_tensors(draft: Draft) -> None:
    required, optional = expected_tensors(draft.read())
    assert required == draft.shapes
    assert optional["output.weight"] == (N_VOCAB, N_EMBD)


def test_smollm2(smollm2_path: Path) -> None:
    with GGUFFile(smollm2_path) as file:
        config = read_config(file)
    assert (config.architecture, config.n_layers, config.n_embd, config.n_ffn) == ("llama", 30, 576, 1536)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.rope_dims) == (9, 3, 64, 64)
    assert (config.n_vocab, config.n_ctx_train, config.window) == (49152, 8192, None)
    assert config.rope_freq_base == 100000.0
    assert config.norm_eps == np.float32(1e-5)
