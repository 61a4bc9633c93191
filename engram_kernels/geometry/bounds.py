"""Bounds of a geometry's numbers, so that a typing error in a config is an error at once and not an hour of work."""

import math
import operator
import sys
from numbers import Real

INT64 = (-(2**63), 2**63 - 1)
#: Fields of EngramConfig that are whole numbers: least, most. What is published lies far within.
BOUNDS = {
    "max_ngram": (2, 64),
    "heads": (1, 1024),
    "row_width": (1, 2**31),
    "hidden_size": (1, 2**31),
    "branches": (1, 1024),
    "raw_vocab_size": (1, 2**31),
    "row_multiple": (1, 2**31),
    "conv_kernel": (0, 1024),
    "layers": (0, 2**31),
    "table_sizes": (2, 2**63 - 1),
    "vocab_size": INT64,
    "pad_id": INT64,
    "eos_id": INT64,
    "seed": INT64,
}
#: Hash columns of all layers together, each of which has a prime to be found: 48 in DeepSeek-V4.1.
MAX_COLUMNS = 4096


def whole(value, name: str, where: str, bounds: tuple[int, int]) -> int:
    """``value`` as an int; ValueError unless it is a whole number within the bounds, both of which are allowed."""
    number = as_integer(value)
    if number is None:
        raise ValueError(f"{where}: {name} must be an integer, got {short(value)}")
    least, most = bounds
    if not least <= number <= most:
        expected = f"at least {least}" if number < least else f"at most {most:,}"
        raise ValueError(f"{where}: {name} must be {expected}, got {short(number)}")
    return number


def as_integer(value) -> int | None:
    """A whole number of Python, NumPy or torch as an int; None for anything else, booleans among it."""
    # True counts as 1 for Python and for torch, and is no number where one is asked for.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def finite(value, name: str, where: str, least: float = -math.inf) -> float:
    """``value`` as a float; ValueError unless it is a finite number of at least ``least``."""
    number = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not least <= number <= sys.float_info.max or number < -sys.float_info.max:
        expected = "a finite number" + (f" of at least {least:g}" if least > -math.inf else "")
        raise ValueError(f"{where}: {name} must be {expected}, got {short(value)}")
    return float(number)


def short(value) -> str:
    """A value as an error shows it, which may be a list of any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
