"""What a caller may ask of sampling, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from phi_c.errors import OptionError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Raises OptionError for values outside the ranges given here.

    The defaults suit chat with small quantised models. Penalties are off. The order is penalties, bias, temperature,
    top_k, min_p, top_p.
    """

    temperature: float = 0.7  # divides the logits; 0 or less: always the likeliest token
    top_k: int = 0  # keep so many of the likeliest tokens; 0: all
    top_p: float = 0.95  # keep the likeliest tokens up to the one that crosses this share; outside 0..1: all
    min_p: float = 0.05  # drop tokens less likely than this share of the likeliest one; 0: none
    repeat_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens among the last ones; 1: off
    repeat_last_n: int = 64  # generated tokens that the three penalties look back on; -1: all, 0: none
    presence_penalty: float = 0.0  # subtracted from the logit of a token among them
    frequency_penalty: float = 0.0  # subtracted as often as it is among them
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logit of a token id; -inf bans it
    seed: int | None = None  # the same seed gives the same text; None: a random one

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise OptionError(f"{name} is {value!r}, expected a finite number")
        if not 0 <= self.min_p <= 1:
            raise OptionError(f"min_p is {self.min_p}, expected 0 to 1")
        if self.repeat_penalty <= 0:
            raise OptionError(f"repeat_penalty is {self.repeat_penalty}, expected more than 0")
        _check_integer("top_k", self.top_k, 0)
        _check_integer("repeat_last_n", self.repeat_last_n, -1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise OptionError(f"logit_bias is {self.logit_bias!r:.60}, expected a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check_integer("a token id in logit_bias", token, 0)
            is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not is_number or math.isnan(bias) or bias == math.inf:
                raise OptionError(f"logit_bias of token {token} is {bias!r}, expected a finite number or -inf")


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}, expected an integer of at least {least}")
