"""Arguments of wrong types and ranges: a one-line OptionError each; NumPy scalars are accepted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import phi_c
from phi_c.errors import OptionError
from phi_c.sampling.params import SamplingParams
from tiny_gguf import write_tiny


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phi_c.LLM]:
    path = write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="Q8_0")
    with phi_c.load(path, n_threads=np.int32(1), n_ctx=np.int64(256), n_batch=np.uint16(64)) as loaded:
        yield loaded


WRONG_PROMPTS: list[tuple[Any, str]] = [
    (None, "the prompt is None, expected a str or a sequence of token ids"),
    (5, "the prompt is 5, expected"),
    (b"hi", "the prompt is b'hi', expected"),
    (np.int64(5), "the prompt is .*5.*, expected"),
    ([104.9, 101.2], "a token id is 104.9, expected an integer"),
    (np.array([5.0, 6.0]), "a token id is .*5.0.*, expected an integer"),
    (["104"], "a token id is '104', expected an integer"),
    (["hello"], "a token id is 'hello', expected an integer"),
    ([[5, 6]], r"a token id is \[5, 6\], expected an integer"),
    ([True], "a token id is True, expected an integer"),
    ([None], "a token id is None, expected an integer"),
    (np.zeros((2, 2), int), "a token id is array"),
    ([-1], "token id -1 is outside the vocabulary"),
    ([2**70], "token id 1180591620717411303424 is outside the vocabulary"),
]


@pytest.mark.parametrize(("prompt", "message"), WRONG_PROMPTS)
def test_wrong_prompts(llm: phi_c.LLM, prompt: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        llm.generate(prompt, max_tokens=1)
    assert "\n" not in str(raised.value)


WRONG_OPTIONS: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in ("5", 5.0, True, 0, np.float64(3))),
    *(("temperature", value) for value in ("1", True, 10**400, float("inf"))),
    *(("presence_penalty", value) for value in (10**400, "x")),
    *(("top_k", value) for value in (1.0, -1)),
    *(("seed", value) for value in ("a", -1, 1.5)),
    *(("stop", value) for value in (5, [5], b"x", "", [""], [b"x"])),
    *(("logit_bias", value) for value in ([(5, 1)], {"5": 1}, {5: "x"}, {5: None}, {5: float("nan")})),
    *(("logit_bias", value) for value in ({5: 10**400}, {5: float("inf")}, {5: np.zeros(2)})),
    *(("logprobs", value) for value in (True, -1, 1.5)),
    *(("cancel", value) for value in (True, "x", phi_c.CancelFlag(phi_c.CancelFlag()))),
]


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_wrong_options(llm: phi_c.LLM, name: str, value: Any) -> None:
    options: dict[str, Any] = {name: value}
    for call in (llm.generate, llm.stream):
        with pytest.raises(OptionError, match="logit_bias|bias" if name == "logit_bias" else name) as raised:
            call([5], **options)
        assert "\n" not in str(raised.value)


def test_numpy_scalars_and_none_are_accepted(llm: phi_c.LLM) -> None:
    plain = llm.generate([5, 6], max_tokens=3, temperature=0.5, top_k=5, seed=7, logit_bias={9: 1.5}, logprobs=2)
    options: dict[str, Any] = {
        "max_tokens": np.int64(3),
        "temperature": np.float32(0.5),
        "top_k": np.int16(5),
        "seed": np.int64(7),
        "logit_bias": {np.int64(9): np.float64(1.5)},
        "logprobs": np.uint8(2),
        "stop": None,
        "cancel": None,
        "top_p": None,
        "min_p": None,
    }
    for prompt in (np.array([5, 6], np.uint8), range(5, 7), (i for i in (5, 6)), (np.int32(5), 6)):
        found = llm.generate(prompt, **options)
        assert (found.tokens, found.logprobs) == (plain.tokens, plain.logprobs)
        assert all(type(token) is int for token in found.tokens)
    params = SamplingParams(temperature=np.float64(0.5), seed=np.int64(3), logit_bias={np.int32(4): np.int32(1)})
    assert (type(params.temperature), type(params.seed)) == (float, int)
    assert {type(token) for token in params.logit_bias} == {int}
