"""What the demo checks against: the geometry of DeepSeek-V4.1-Flash, worked out again without this package.

Nothing here imports engram_kernels or torch. Row ids come from scalar Python integers, primes from trial division, row
contents from a closed form of their id and an e4m3 decoder of its own, the gate from float64 in another formulation.
P tokens checked, L layers, C columns, R elements a row, H branches, D hidden size.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

LAYERS = (1, 14)
MAX_NGRAM = 4
HEADS = 8
TABLE_SIZE = 16_000_000
PAD_ID = 2
WIDTH, GROUP = 256, 32
EPS = CLAMP = 1e-6
PUBLISHED_ROWS = (384_006_168, 384_016_682)
#: SHA-256 of the token map as little-endian int32, from the published layout.
TOKEN_MAP_SHA256 = "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"
_CHUNK_ROWS = 4096  # rows worked on at once: temporaries of 4 MiB
_CHUNK_TOKENS = 32  # tokens of the gate worked on at once: temporaries of 5 MiB


@dataclass
class Check:
    """One check over the whole run. A check that compared nothing has not passed."""

    name: str
    against: str
    checked: int = 0
    wrong: int = 0
    first: str = ""  #: the first thing that was wrong
    worst: float = 0.0  #: largest error as a share of its tolerance, where there is one

    @property
    def passed(self) -> bool:
        return self.checked > 0 and self.wrong == 0

    def add(self, right: np.ndarray, describe) -> None:
        """Count the elements of a boolean array; ``describe`` turns the index of the first wrong one into words."""
        self.checked += right.size
        self.wrong += right.size - int(np.count_nonzero(right))
        if not self.first and not right.all():
            self.first = describe(*(int(index) for index in np.argwhere(~right)[0]))

    def __str__(self) -> str:
        if not self.checked:
            return f"nothing was compared with {self.against}"
        if self.wrong:
            return f"{self.wrong:,} of {self.checked:,} differ from {self.against}; first {self.first}"
        share = f"; largest error {self.worst:.2f} of half a bfloat16 unit and float32's share" if self.worst else ""
        return f"{self.checked:,} compared with {self.against}{share}"


class ScalarHash:
    """Row ids of one n-gram at a time, in Python integers."""

    def __init__(self, token_map: list[int], table_size: int = TABLE_SIZE):
        self._token_map = token_map
        self._pad = token_map[PAD_ID]
        columns = (MAX_NGRAM - 1) * HEADS
        # One table size for all orders, so "none used twice in a model" makes them consecutive primes.
        primes = _primes_from(table_size, len(LAYERS) * columns)
        self.primes = [primes[first : first + columns] for first in range(0, len(primes), columns)]
        bound = max(1, (2**63 - 1) // (max(token_map) + 1) // 2)
        draws = [np.random.default_rng(10007 * layer).integers(0, bound, MAX_NGRAM) for layer in LAYERS]
        self.multipliers = [[2 * int(draw) + 1 for draw in layer] for layer in draws]

    @property
    def rows_per_layer(self) -> tuple[int, ...]:
        return tuple(sum(primes) for primes in self.primes)

    def window(self, tokens: list[int], position: int) -> tuple[int, ...]:
        """Compressed ids that the n-grams ending at ``position`` read, newest first."""
        return tuple(
            self._token_map[tokens[position - shift]] if position >= shift else self._pad for shift in range(MAX_NGRAM)
        )

    def row_ids(self, tokens: list[int], positions) -> np.ndarray:
        """int64 ``[P, L, C]`` for these positions of the whole text."""
        rows = [self._rows_at(self.window(tokens, position)) for position in positions]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(LAYERS), (MAX_NGRAM - 1) * HEADS)

    def _rows_at(self, window: tuple[int, ...]) -> list[list[int]]:
        layers = []
        for multipliers, primes in zip(self.multipliers, self.primes, strict=True):
            rows, first_row, mix = [], 0, window[0] * multipliers[0]
            for order in range(2, MAX_NGRAM + 1):
                mix ^= window[order - 1] * multipliers[order - 1]
                for head in range(HEADS):
                    prime = primes[(order - 2) * HEADS + head]
                    rows.append(first_row + mix % prime)
                    first_row += prime
            layers.append(rows)
        return layers


def _primes_from(start: int, count: int) -> list[int]:
    primes, number = [], start
    while len(primes) < count:
        if number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            primes.append(number)
        number += 1
    return primes


def distinct_ngrams(scalar: ScalarHash, tokens: list[int]) -> dict[int, int]:
    """Order -> distinct n-grams (after the token map) of the text."""
    windows = [scalar.window(tokens, position) for position in range(len(tokens))]
    return {order: len({window[:order] for window in windows}) for order in range(2, MAX_NGRAM + 1)}


def token_map_digest(token_map: list[int]) -> str:
    return hashlib.sha256(np.array(token_map, dtype="<i4").tobytes()).hexdigest()


def stored_row(layer: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 bytes ``[n, R]`` and scale bytes ``[n, R / 32]`` of rows ``ids [n]`` of the layer at position ``layer``.

    Magnitude bytes are 1..126, so no element is zero (as all of an unwritten row is) or NaN; scales are 2^-8 .. 2^0.
    """
    start = np.uint64((layer + 1) * 0xD1B54A32D192ED03 % 2**64)
    key = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    key ^= key >> np.uint64(29)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    low, high = key.astype(np.uint32)[:, None], (key >> np.uint64(32)).astype(np.uint32)[:, None]
    mixed = low + np.arange(WIDTH + WIDTH // GROUP, dtype=np.uint32) * np.uint32(0x9E3779B1)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x85EBCA77)
    mixed += high
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE3D)
    element, group = mixed[:, :WIDTH], mixed[:, WIDTH:]
    magnitude = ((element & np.uint32(0xFFFF)) * np.uint32(126) >> np.uint32(16)) + np.uint32(1)
    weight = (magnitude | (element >> np.uint32(31)) << np.uint32(7)).astype(np.uint8)
    return weight, (np.uint32(119) + (group >> np.uint32(16)) % np.uint32(9)).astype(np.uint8)


def _decode_e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if byte >> 7 else magnitude


def row_values(layer: int, ids: np.ndarray) -> np.ndarray:
    """bfloat16 bits ``[n, R]`` (uint16) of what reading these rows gives; exact, since e4m3 has 4 significant bits."""
    weight, scale = stored_row(layer, ids)
    value = np.array([_decode_e4m3(byte) for byte in range(256)], dtype=np.float32)[weight]
    value *= np.ldexp(np.float32(1), scale.astype(np.int32) - 127).repeat(GROUP, axis=1)
    return (value.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def check_row_ids(check: Check, actual: np.ndarray, expected: np.ndarray, positions: np.ndarray) -> None:
    """``[P, L, C]`` against ``[P, L, C]``."""

    def describe(token, layer, column):
        got, want = actual[token, layer, column], expected[token, layer, column]
        return f"at token {positions[token]:,}, layer {LAYERS[layer]}, column {column}: {got:,} instead of {want:,}"

    check.add(actual == expected, describe)


def check_rows(check: Check, actual: np.ndarray, ids: np.ndarray, positions: np.ndarray) -> None:
    """bfloat16 bits ``[L, P, C, R]`` of the rows read, against the closed form of the ids ``[P, L, C]`` due there."""
    columns = ids.shape[-1]
    for layer in range(ids.shape[1]):
        due, rows = ids[:, layer].reshape(-1), actual[layer].reshape(-1, WIDTH)
        for begin in range(0, len(due), _CHUNK_ROWS):
            right = (rows[begin : begin + _CHUNK_ROWS] == row_values(layer, due[begin : begin + _CHUNK_ROWS])).all(1)

            def describe(index, layer=layer, due=due, rows=rows, begin=begin):
                token, column = divmod(begin + index, columns)
                what = "reads as other values" if rows[begin + index].any() else "reads as zeros"
                where = f"token {positions[token]:,}, layer {LAYERS[layer]}, column {column}"
                return f"at {where}: row {due[begin + index]:,} {what}"

            check.add(right, describe)


def check_gate(check: Check, layer: int, positions: np.ndarray, read, truncates: bool) -> None:
    """The gated residual addition of one layer against float64.

    read: slice of P -> (hidden, key, value, query_norm, key_norm, result) in float64; result holds bfloat16 values.
    truncates: results are cut to bfloat16 (Triton's interpreter) rather than rounded.

    With dot = sum(hidden key w) and w = query_norm key_norm, the specification's d is
    sqrt(D) dot / sqrt((sum(hidden^2) + D eps) (sum(key^2) + D eps)); its sigmoid is (1 + tanh(x / 2)) / 2.
    Tolerance: half a unit in the last place of bfloat16 (a whole one where cut), and what float32 may add. Sums of D
    terms run in lanes, whose rounding errors have random signs: 64 * 2^-24 of the sum of magnitudes is allowed for d.
    The gate moves by a quarter of the change in sqrt(|d|), and near d = 0, where the sign may flip, by twice that.
    """
    relative = 2.0**-7 if truncates else 2.0**-8
    for begin in range(0, len(positions), _CHUNK_TOKENS):
        hidden, key, value, query_norm, key_norm, result = read(slice(begin, begin + _CHUNK_TOKENS))
        size = hidden.shape[-1]
        weighted = hidden * key * (query_norm * key_norm)
        length = np.sqrt(((hidden**2).sum(-1) + size * EPS) * ((key**2).sum(-1) + size * EPS)) / np.sqrt(size)
        d, spread = weighted.sum(-1) / length, 64 * 2.0**-24 * np.abs(weighted).sum(-1) / length
        root = np.sqrt(np.maximum(np.abs(d), CLAMP))
        gate = (1 + np.tanh(np.where(d < 0, -root, root) / 2)) / 2
        doubt = np.where(np.abs(d) <= spread, 2 * np.sqrt(np.maximum(2 * spread, CLAMP)), spread / root) / 4
        addend = gate[..., None] * value[:, None, :]
        expected = hidden + addend
        tolerance = relative * np.abs(expected) + (doubt + 2.0**-20)[..., None] * np.abs(value)[:, None, :]
        tolerance += 2.0**-20 * np.abs(hidden)
        share = np.abs(result - expected) / tolerance
        check.worst = float(np.maximum(check.worst, share.max()))

        def describe(token, branch, element, begin=begin, result=result, expected=expected):
            got, want = result[token, branch, element], expected[token, branch, element]
            where = f"token {positions[begin + token]:,}, layer {LAYERS[layer]}, branch {branch}, element {element}"
            return f"at {where}: {got:.6g} instead of {want:.6g}"

        check.add(share <= 1, describe)
