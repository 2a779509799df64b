"""Validation of the sampling options."""

import math
from typing import Any

import numpy as np
import pytest

from phi_c.errors import OptionError
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler

BAD: list[tuple[str, Any]] = [
    ("temperature", math.nan),
    ("temperature", "hot"),
    ("top_p", math.inf),
    ("top_k", -1),
    ("top_k", 1.5),
    ("min_p", 1.1),
    ("min_p", -0.1),
    ("repeat_penalty", 0.0),
    ("repeat_penalty", True),
    ("repeat_last_n", -2),
    ("presence_penalty", math.nan),
    ("frequency_penalty", -math.inf),
    ("seed", -1),
    ("logit_bias", [1, 2]),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name}.* is .*expected"):
        SamplingParams(**{name: value})


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="topp"):
        SamplingParams(topp=0.5)  # type: ignore[call-arg]


def test_limits_of_the_ranges_are_valid() -> None:
    SamplingParams(temperature=-1, top_p=2, min_p=1, repeat_last_n=-1, logit_bias={0: -math.inf}, seed=0)


def test_penalties_are_off_by_default() -> None:
    params = SamplingParams()
    assert (params.repeat_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)


def test_temperature_zero_is_argmax_with_default_penalties() -> None:
    logits = np.array([1.0, 3.0, 2.999, -1.0], np.float32)
    assert Sampler(SamplingParams(temperature=0), 4).sample(logits, [1] * 64) == 1
