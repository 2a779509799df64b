"""The sampling options of a request, with their ranges and defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phi_c.arguments import check_integer, check_number
from phi_c.errors import OptionError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Options apply in this order: penalties, logit_bias, temperature, top_k, min_p, top_p. The defaults suit chat with
    small quantised models; penalties are off. The penalties count generated tokens only, not the prompt, and only the
    last `repeat_last_n` of them.

    Raises OptionError for a value outside the range given below.
    """

    # Divides the logits; lower values are less random. 0 or less: greedy, always the most probable token.
    temperature: float = 0.7
    # Keep only the top_k most probable tokens, an integer of at least 0. 0: keep all.
    top_k: int = 0
    # Keep the fewest most probable tokens whose total probability reaches top_p. Outside 0 to 1, or 1: keep all.
    top_p: float = 0.95
    # Drop tokens whose probability is below min_p times that of the most probable token, 0 to 1. 0: drop none.
    min_p: float = 0.05
    # Divides a positive logit, and multiplies a negative one, of every token already generated; above 0. 1: off.
    repeat_penalty: float = 1.0
    # Number of most recent generated tokens that the three penalties consider. -1: all, 0: none.
    repeat_last_n: int = 64
    # Subtracted once from the logit of every token already generated. 0: off.
    presence_penalty: float = 0.0
    # Subtracted from the logit of a token once per occurrence among the generated tokens. 0: off.
    frequency_penalty: float = 0.0
    # Added to the logit of each token id, a finite number or -inf. -inf: the token is never chosen.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # Seed of the random numbers, an integer of at least 0; the same seed gives the same output. None: random.
    seed: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {name: check_number(name, getattr(self, name)) for name in _NUMBERS}
        if not 0 <= self.min_p <= 1:
            raise OptionError(f"min_p is {self.min_p}, expected 0 to 1")
        if self.repeat_penalty <= 0:
            raise OptionError(f"repeat_penalty is {self.repeat_penalty}, expected more than 0")
        checked["top_k"] = check_integer("top_k", self.top_k, 0)
        checked["repeat_last_n"] = check_integer("repeat_last_n", self.repeat_last_n, -1)
        if self.seed is not None:
            checked["seed"] = check_integer("seed", self.seed, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise OptionError(f"logit_bias is {self.logit_bias!r:.60}, expected a mapping of token ids to numbers")
        checked["logit_bias"] = {
            check_integer("a token id in logit_bias", token, 0): _check_bias(token, bias)
            for token, bias in self.logit_bias.items()
        }
        for name, value in checked.items():  # as Python's own types
            object.__setattr__(self, name, value)


def choose_sampling(**options: Any) -> SamplingParams:
    """Return SamplingParams with the options that are not None, and the defaults. Raises OptionError."""
    return SamplingParams(**{name: value for name, value in options.items() if value is not None})


_NUMBERS = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")


def _check_bias(token: int, bias: Any) -> float:
    try:
        return -math.inf if bias == -math.inf else check_number("bias", bias)
    except (OptionError, ValueError):  # ValueError: an array
        raise OptionError(f"logit_bias of token {token} is {bias!r:.60}, expected a finite number or -inf") from None
