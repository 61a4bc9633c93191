"""Bounds of a geometry's numbers, so that a typing error in a config is an error at once and not an hour of work."""

import math
import sys
from numbers import Integral, Real

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
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{where}: {name} must be an integer, got {short(value)}")
    least, most = bounds
    if not least <= value <= most:
        expected = f"at least {least}" if value < least else f"at most {most:,}"
        raise ValueError(f"{where}: {name} must be {expected}, got {short(value)}")
    return int(value)


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
