"""Type mixes: those of published files and of llama.cpp, fallbacks and overrides."""

from collections import Counter

import pytest

from phi_c.errors import OptionError
from phi_c.quantize.mix import FILE_TYPES, Model, is_quantised, make_mix, read_model

PHI3 = {"blk.{}.attn_qkv": (9216, 3072), "blk.{}.attn_output": (3072, 3072)}
PHI3 |= {"blk.{}.ffn_up": (16384, 3072), "blk.{}.ffn_down": (3072, 8192)}


def phi3_mini() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the 195 tensors of Phi-3-mini."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (32064, 3072), "output.weight": (32064, 3072)}
    for layer in range(32):
        shapes |= {f"{name.format(layer)}.weight": shape for name, shape in PHI3.items()}
        shapes |= {f"blk.{layer}.{norm}.weight": (3072,) for norm in ("attn_norm", "ffn_norm")}
    return shapes | {"output_norm.weight": (3072,)}


def types(file_type: str, shapes: dict[str, tuple[int, ...]], model: Model, **options: object) -> dict[str, str]:
    mix = make_mix(file_type, **options)  # type: ignore[arg-type]
    return {name: mix.type_of(name, shape, "F32", model) for name, shape in shapes.items()}


def layers_with(types_by_name: dict[str, str], part: str, type_name: str) -> list[int]:
    """Return the layers where the tensor with `part` in its name has a type."""
    return [int(name.split(".")[1]) for name, found in types_by_name.items() if part in name and found == type_name]


def test_phi3_mini_has_the_types_of_the_published_file() -> None:
    """Phi-3-mini-4k-instruct-q4.gguf from microsoft/Phi-3-mini-4k-instruct-gguf."""
    found = types("Q4_K_M", phi3_mini(), Model(n_layers=32))
    assert Counter(found.values()) == {"F32": 65, "Q4_K": 81, "Q5_K": 32, "Q6_K": 17}
    assert layers_with(found, "attn_qkv", "Q5_K") == list(range(32))
    more_bits = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers_with(found, "ffn_down", "Q6_K") == more_bits
    assert layers_with(found, "ffn_down", "Q4_K") == [i for i in range(32) if i not in more_bits]
    assert found["output.weight"] == "Q6_K" and found["token_embd.weight"] == "Q4_K"


def test_random_models_of_the_benchmark_have_the_types_of_the_published_file() -> None:
    from phi_c.bench import random_model, shapes

    published = types("Q4_K_M", phi3_mini(), Model(n_layers=32))
    plan = random_model.make_plan(shapes.SHAPES["phi-3-mini"])
    assert {tensor.name: tensor.type_name for tensor in plan.tensors} == published
    tied = random_model.make_plan(shapes.SHAPES["phi-4-mini"])
    assert {tensor.name: tensor.type_name for tensor in tied.tensors}["token_embd.weight"] == "Q6_K"


# Types of a Llama model with 20 layers, quantised by llama.cpp (llama_model_quantize of llama-cpp-python 0.3.36): the
# default type, then (part of the name, layers, type) of the tensors that differ from it.
MORE_BITS = [0, 1, 4, 7, 10, 13, 16, 17, 18, 19]
LLAMA_20 = {
    "Q8_0": ("Q8_0", []),
    "Q6_K": ("Q6_K", []),
    "Q5_K_M": ("Q5_K", [("attn_v", MORE_BITS, "Q6_K"), ("ffn_down", MORE_BITS, "Q6_K")]),
    "Q5_K_S": ("Q5_K", []),
    "Q4_K_M": ("Q4_K", [("attn_v", MORE_BITS, "Q6_K"), ("ffn_down", MORE_BITS, "Q6_K")]),
    "Q4_K_S": ("Q4_K", [("attn_v", [0, 1, 2, 3], "Q5_K"), ("ffn_down", [0, 1], "Q5_K")]),
    "Q4_0": ("Q4_0", []),
    "Q3_K_L": ("Q3_K", [(part, list(range(20)), "Q5_K") for part in ("attn_v", "ffn_down", "attn_output")]),
    "Q3_K_M": (
        "Q3_K",
        [
            ("attn_v", [0, 1], "Q5_K"),
            ("attn_v", list(range(2, 20)), "Q4_K"),
            ("ffn_down", [0], "Q5_K"),
            ("ffn_down", list(range(1, 20)), "Q4_K"),
            ("attn_output", list(range(20)), "Q4_K"),
        ],
    ),
    "Q3_K_S": ("Q3_K", []),
    "Q2_K": ("Q2_K", [(part, list(range(20)), "Q3_K") for part in ("attn_v", "ffn_down", "attn_output")]),
}


def llama(n_layers: int, n_embd: int = 512) -> dict[str, tuple[int, ...]]:
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {
        f"blk.{i}.{matrix}.weight": (n_embd, n_embd) for i in range(n_layers) for matrix in matrices
    }
    return shapes | {"token_embd.weight": (300, n_embd), "output.weight": (300, n_embd)}


@pytest.mark.parametrize("file_type", LLAMA_20)
def test_llama_has_the_types_of_llama_cpp(file_type: str) -> None:
    default, exceptions = LLAMA_20[file_type]
    expected = dict.fromkeys(llama(20), default)
    expected["output.weight"] = "Q8_0" if file_type == "Q8_0" else "Q6_K"
    for part, layers, type_name in exceptions:
        expected |= {f"blk.{i}.{part}.weight": type_name for i in layers}
    assert types(file_type, llama(20), Model(n_layers=20)) == expected


def test_rules_that_depend_on_the_model() -> None:
    """Tied embeddings, grouped-query attention, experts, Llama 2 70B, an importance matrix."""
    shapes = llama(16)
    tied = {name: shape for name, shape in shapes.items() if name != "output.weight"}
    assert types("Q4_K_M", tied, Model(16, is_tied=True))["token_embd.weight"] == "Q6_K"
    assert types("Q4_0", tied, Model(16, is_tied=True))["token_embd.weight"] == "Q6_K"
    assert types("Q8_0", tied, Model(16, is_tied=True))["token_embd.weight"] == "Q8_0"
    assert set(layers_with(types("Q2_K", shapes, Model(16, n_gqa=4)), "attn_v", "Q4_K")) == set(range(16))
    experts = types("Q4_K_M", shapes, Model(16, n_experts=8))
    assert len(layers_with(experts, "attn_v", "Q8_0")) == len(layers_with(experts, "attn_k", "Q8_0")) == 16
    assert len(layers_with(experts, "attn_output", "Q5_K")) == 16
    assert types("Q4_K_M", shapes, Model(16, n_experts=16)) == types("Q4_K_M", shapes, Model(16))
    big = types("Q4_K_S", llama(80), Model(80, n_gqa=8, is_llama_70b=True))
    assert len(layers_with(big, "attn_v", "Q5_K")) == 80
    assert layers_with(types("Q4_0", shapes, Model(16, has_imatrix=True)), "ffn_down", "Q4_1") == [0, 1]
    assert layers_with(types("Q5_0", shapes, Model(16, has_imatrix=True)), "ffn_down", "Q5_1") == [0, 1]


@pytest.mark.parametrize(
    ("file_type", "n_cols", "fallbacks"),
    [
        ("Q4_K_M", 96, {"ffn_up": "Q5_0", "ffn_down": "Q8_0", "output": "Q8_0"}),
        ("Q5_K_M", 96, {"ffn_up": "Q5_1", "ffn_down": "Q8_0", "output": "Q8_0"}),
        ("Q6_K", 96, {"ffn_up": "Q8_0", "output": "Q8_0"}),
        ("Q3_K_S", 96, {"ffn_up": "Q4_0", "output": "Q8_0"}),
        ("Q4_0", 96, {"ffn_up": "Q4_0", "output": "Q8_0"}),
        ("Q4_K_M", 80, {"ffn_up": "F16", "ffn_down": "F16", "output": "F16"}),
        ("Q8_0", 80, {"ffn_up": "F16", "output": "F16"}),
    ],
)
def test_fallback_for_rows_that_are_not_a_multiple_of_the_block(
    file_type: str, n_cols: int, fallbacks: dict[str, str]
) -> None:
    """For multiples of 32 the fallbacks are llama.cpp's; for other rows llama.cpp fails, phi-c uses F16."""
    found = types(file_type, llama(8, n_cols), Model(n_layers=8))
    for part, type_name in fallbacks.items():
        name = "output.weight" if part == "output" else f"blk.0.{part}.weight"
        assert found[name] == type_name


def test_tensors_that_are_never_quantised() -> None:
    model = Model(n_layers=1)
    mix = make_mix("Q4_0", pure=True)
    for name, shape in (
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.attn_qkv.bias", (256,)),
        ("blk.0.ffn_gate_inp.weight", (16, 256)),
        ("rope_factors_long.weight", (48,)),
        ("blk.0.attn_q_norm.weight", (4, 256)),
        ("blk.0.ffn_up.bias", (16, 256)),
        ("one_row.weight", (1, 256)),
    ):
        assert not is_quantised(name, shape)
        assert mix.type_of(name, shape, "BF16", model) == "BF16"
    assert mix.type_of("blk.0.ffn_down_exps.weight", (16, 64, 256), "BF16", model) == "Q4_0"


def test_expert_tensors_follow_the_rules_of_ffn_down() -> None:
    found = types("Q4_K_M", {f"blk.{i}.ffn_down_exps.weight": (16, 64, 256) for i in range(8)}, Model(8, n_experts=16))
    assert layers_with(found, "ffn_down_exps", "Q6_K") == [0, 3, 6, 7]


def test_overrides() -> None:
    shapes, model = llama(8), Model(n_layers=8)
    assert set(types("Q4_K_M", shapes, model, pure=True).values()) == {"Q4_K"}
    found = types("Q4_K_M", shapes, model, output="q8_0", embedding="F16", tensors=[("ffn_(up|gate)", "Q5_0")])
    assert found["output.weight"] == "Q8_0" and found["token_embd.weight"] == "F16"
    assert len(layers_with(found, "ffn_up", "Q5_0")) == len(layers_with(found, "ffn_gate", "Q5_0")) == 8
    assert found["blk.0.ffn_down.weight"] == "Q6_K"
    first = types("Q4_K_M", shapes, model, tensors=[(r"blk\.0\.", "Q2_K"), ("ffn_down", "Q3_K")])
    assert first["blk.0.ffn_down.weight"] == "Q2_K" and first["blk.1.ffn_down.weight"] == "Q3_K"
    tied = {name: shape for name, shape in shapes.items() if name != "output.weight"}
    assert types("Q4_K_M", tied, Model(8, is_tied=True), output="Q5_K")["token_embd.weight"] == "Q5_K"


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16"])
def test_float_file_types_have_one_type(file_type: str) -> None:
    assert set(types(file_type, llama(8), Model(n_layers=8, n_experts=8)).values()) == {file_type}


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="unknown file type 'Q4_K_X', expected one of F32"):
        make_mix("Q4_K_X")
    with pytest.raises(OptionError, match="unknown tensor type 'Q9'"):
        make_mix("Q4_0", output="Q9")
    with pytest.raises(OptionError, match=r"invalid regular expression '\('"):
        make_mix("Q4_0", tensors=[("(", "Q8_0")])
    with pytest.raises(OptionError, match=r"blk\.0\.x\.weight has rows of 96 weights, expected a multiple of 256"):
        make_mix("Q4_0", tensors=[("x", "Q4_K")]).type_of("blk.0.x.weight", (8, 96), "F32", Model(1))


def test_model_properties_are_read_from_metadata() -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 80,
        "llama.attention.head_count": 64,
        "llama.attention.head_count_kv": 8,
        "llama.expert_count": 8,
    }
    model = read_model(metadata, ["blk.0.attn_v.weight"], has_imatrix=True)
    assert model == Model(80, n_gqa=8, n_experts=8, is_tied=True, has_imatrix=True, is_llama_70b=True)
    assert read_model({}, ["blk.5.attn_v.weight", "output.weight"], has_imatrix=False) == Model(6)
    assert {row.number for row in FILE_TYPES.values()} == {0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 32}
