"""Checks of arguments: NumPy scalars are numbers, bool is not. Every error is one line that names the argument."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

from phi_c.errors import OptionError


def is_integer(value: object) -> bool:
    """Return whether a value is an integer of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Return a value as int. Raises OptionError unless it is an integer from minimum to maximum (None: no limit)."""
    if not is_integer(value) or value < minimum or (maximum is not None and value > maximum):
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise OptionError(f"{name} is {value!r:.60}, expected an integer {limits}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """Return a value as float. Raises OptionError unless it is a finite number."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        result = float(value) if is_number else math.nan
    except OverflowError:  # an int beyond 1e308
        result = math.inf
    if not math.isfinite(result):
        raise OptionError(f"{name} is {value!r:.60}, expected a finite number")
    return result


def check_token_ids(tokens: Iterable[Any], n_vocab: int) -> list[int]:
    """Return token ids as a list of int.

    Raises OptionError if there are none, or one is not an integer or outside the vocabulary.
    """
    if isinstance(tokens, str | bytes | bytearray) or not isinstance(tokens, Iterable):
        raise OptionError(f"the prompt is {tokens!r:.60}, expected a str or a sequence of token ids")
    try:
        ids = list(tokens)
    except TypeError:  # an array without dimensions
        raise OptionError(f"the prompt is {tokens!r:.60}, expected a str or a sequence of token ids") from None
    if not ids:
        raise OptionError("the prompt is empty")
    for token in ids:
        if not is_integer(token):
            raise OptionError(f"a token id is {token!r:.60}, expected an integer")
        if not 0 <= token < n_vocab:
            raise OptionError(f"token id {token} is outside the vocabulary, expected 0 to {n_vocab - 1}")
    return [int(token) for token in ids]
