"""What PTX instructions give, by the manual's words, in Python's exact numbers, for tests/compiled/test_forms.py.

:func:`oracle` takes an opcode and returns a function from the operands' bits to the result's bits, or to a
:class:`Near`, or None where the manual leaves it open. Nothing is shared with tests/machine.
"""

import math
import operator
from fractions import Fraction
from functools import partial
from math import copysign, inf, isinf, isnan, nan
from typing import NamedTuple

import torch

from .float_formats import BFLOAT16, FLOAT16, FLOAT32, square_root

TINY = 2.0**-126
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
COMPARISONS |= {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
FORMATS = {"f32": FLOAT32, "bf16": BFLOAT16, "f16": FLOAT16}
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().tolist()


class Near(NamedTuple):
    """An approximate result: at most ``allowed`` from the true one."""

    true: float
    allowed: float


def oracle(opcode):
    base, *words = opcode.split(".")
    kind = words[-1]
    if base == "cvt":
        return _conversion(words)
    if base in ("add", "sub", "fma") and words[1:] in (["f32", "bf16"], ["f32", "f16"]):
        return _mixed(_float(base, ["rn", "f32"]), FORMATS[kind])
    if kind == "pred":
        return lambda *bits: LOGIC[base](*bits) if base != "not" else 1 - bits[0]
    if base == "selp":
        return lambda a, b, p: a if p else b
    if base == "setp":
        return _comparison(words[0], kind)
    if kind in ("f32x2", "bf16x2", "f16x2"):
        half, width = oracle(opcode.removesuffix("x2")), 32 if kind == "f32x2" else 16
        low = (1 << width) - 1
        return lambda *bits: half(*(each & low for each in bits)) | half(*(each >> width for each in bits)) << width
    if kind == "f32":
        return _float(base, words)
    if kind in ("bf16", "f16"):
        narrow = FORMATS[kind]
        return lambda *bits: narrow.encode(EXACT[base](*map(narrow.decode, bits)))
    return _integer(base, words)


def _mixed(function, narrow):
    """All operands but the last are of the narrow format."""
    return lambda *bits: function(*(FLOAT32.encode(narrow.decode(each)) for each in bits[:-1]), bits[-1])


def signed(bits, kind):
    """The number that the bits mean."""
    width = int(kind[1:])
    return bits - (1 << width) if kind[0] == "s" and bits >> width - 1 else bits


# ---- integers
def _integer(base, words):
    kind, mode = words[-1], words[0]
    width = int(kind[1:])
    exact = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "min": min, "max": max, "abs": abs}
    exact |= {"neg": operator.neg, "not": operator.invert, **LOGIC}
    if base in exact:
        return lambda *bits: exact[base](*(signed(each, kind) for each in bits)) % (1 << width)
    if base in ("mul", "mad"):
        wide = 2 * width if mode == "wide" else width

        def multiply(a, b, c=0):
            product = signed(a, kind) * signed(b, kind)
            product = product >> width if mode == "hi" else product
            return (product + c) % (1 << wide)

        return multiply
    if base in ("div", "rem"):

        def divide(a, b):
            a, b = signed(a, kind), signed(b, kind)
            if not b:
                return None
            quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
            return (quotient if base == "div" else a - quotient * b) % (1 << width)

        return divide
    if base == "shl":
        return lambda a, n: (a << n) % (1 << width) if n < width else 0
    if base == "shr":
        return lambda a, n: (signed(a, kind) >> min(n, width)) % (1 << width)
    return {
        "bfe": lambda a, position, length: _field(a, position & 255, length & 255, kind),
        "bfi": lambda a, b, position, length: _insert(a, b, position & 255, length & 255, width),
        "popc": lambda a: bin(a).count("1"),
        "clz": lambda a: width - a.bit_length(),
        "brev": lambda a: int(f"{a:032b}"[::-1], 2),
        "prmt": _permute,
        "lop3": lambda a, b, c, table: _by_bit(a, b, c, table & 255),
        "shf": lambda a, b, n: _funnel(mode, b << 32 | a, n & 31),
    }[base]


def _field(a, position, length, kind):
    top = int(kind[1:]) - 1
    sign = a >> min(position + length - 1, top) & 1 if kind[0] == "s" and length else 0
    bits = [
        a >> position + place & 1 if place < length and position + place <= top else sign for place in range(top + 1)
    ]
    return sum(bit << place for place, bit in enumerate(bits))


def _insert(a, b, position, length, width):
    for place in range(length):
        if position + place < width:
            b = b & ~(1 << position + place) | (a >> place & 1) << position + place
    return b


def _permute(a, b, selector):
    data, out = (b << 32 | a).to_bytes(8, "little"), 0
    for place in range(4):
        pick = selector >> 4 * place & 15
        byte = data[pick & 7]
        out |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * place
    return out


def _by_bit(a, b, c, table):
    picks = [(a >> place & 1) << 2 | (b >> place & 1) << 1 | c >> place & 1 for place in range(32)]
    return sum((table >> pick & 1) << place for place, pick in enumerate(picks))


def _funnel(side, both, amount):
    return (both << amount >> 32 if side == "l" else both >> amount) & 0xFFFFFFFF


# ---- float32
def _flush(x):
    return copysign(0.0, x) if abs(x) < TINY else x


def _float(base, words):
    flush = "ftz" in words
    if base in ("abs", "neg"):
        return lambda a: a & 0x7FFFFFFF if base == "abs" else a ^ 0x80000000
    if base == "copysign":
        return lambda a, b: a & 0x80000000 | b & 0x7FFFFFFF
    exact = "rn" in words or base in ("add", "sub", "mul", "min", "max")
    function = EXACT[base] if exact else APPROXIMATE[f"div.{words[0]}" if base == "div" else base]
    if base in ("min", "max"):
        function = partial(function, spread="NaN" in words)

    def apply(*bits):
        operands = [FLOAT32.decode(each) for each in bits]
        result = function(*(map(_flush, operands) if flush else operands))
        if not exact:
            return Near(_flush(result.true) if flush else result.true, result.allowed)
        bits = FLOAT32.encode(result)
        return bits & 0x80000000 if flush and not bits & 0x7F800000 else bits

    return apply


def _plain(function):
    """Exact in fractions; Python's own floats say what comes of infinities and NaN, and the sign of a zero."""

    def apply(*operands):
        rough = function(*operands)
        if not all(map(math.isfinite, operands)):
            return rough
        fraction = function(*(Fraction(each) for each in operands))
        return fraction if fraction else rough

    return apply


def _divide(a, b):
    if isnan(a) or isnan(b) or isinf(a) and isinf(b) or a == b == 0:
        return nan
    sign = copysign(1.0, a) * copysign(1.0, b)
    if isinf(a) or b == 0:
        return sign * inf
    if isinf(b) or a == 0:
        return sign * 0.0
    return Fraction(a) / Fraction(b)


def _root(a):
    if isnan(a) or a < 0:
        return nan
    return a if a == 0 or isinf(a) else square_root(a)


def _minimum(a, b, spread):
    if isnan(a) or isnan(b):
        return nan if spread or isnan(a) and isnan(b) else b if isnan(a) else a
    return min(a, b, key=lambda x: (x, copysign(1, x)))


def _maximum(a, b, spread):
    return -_minimum(-a, -b, spread)


EXACT = {
    "add": _plain(lambda a, b: a + b),
    "sub": _plain(lambda a, b: a - b),
    "mul": _plain(lambda a, b: a * b),
    "fma": _plain(lambda a, b, c: a * b + c),
    "div": _divide,
    "sqrt": _root,
    "rcp": lambda a: _divide(1.0, a),
    "min": _minimum,
    "max": _maximum,
}


def _near(function, allowed):
    def apply(*operands):
        true = function(*operands)
        return Near(float(true), allowed(float(true), *operands))

    return apply


def _ex2(a):
    return nan if isnan(a) else inf if a > 1100 else 0.0 if a < -1100 else 2.0**a


def _lg2(a):
    return nan if isnan(a) or a < 0 else -inf if a == 0 else inf if isinf(a) else math.log2(a)


def _rsqrt(a):
    if isnan(a) or a < 0:
        return nan
    return copysign(inf, a) if a == 0 else 0.0 if isinf(a) else 1 / math.sqrt(a)


def _ulps(count):
    return lambda true, *_: count * max(2.0 ** (math.frexp(true)[1] - 24), 2.0**-149) if math.isfinite(true) else 0.0


def _div_approx(a, b):
    if 2.0**126 < abs(b) < inf:
        return nan if isinf(a) or isnan(a) else copysign(1.0, a) * copysign(0.0, b)
    return _divide(a, b)


def _relative(share):
    return lambda true, *_: abs(true) * share


APPROXIMATE = {
    "ex2": _near(_ex2, _relative(2.0**-22)),
    "lg2": _near(_lg2, lambda true, a: 2.0**-22 if 0.5 < a < 2 else abs(true) * 2.0**-22),
    "sqrt": _near(lambda a: nan if isnan(a) or a < 0 else a if a == 0 else math.sqrt(a), _relative(2.0**-23)),
    "rsqrt": _near(_rsqrt, _relative(2.0**-22.9)),
    "rcp": _near(lambda a: _divide(1.0, a), _relative(2.0**-23)),
    "tanh": _near(math.tanh, _relative(2.0**-11)),
    "div.full": _near(_divide, _ulps(2)),
    "div.approx": _near(_div_approx, _ulps(2)),
}


def _comparison(name, kind):
    if kind != "f32":
        return lambda a, b: int(COMPARISONS[name](signed(a, kind), signed(b, kind)))
    unordered = name == "nan" or len(name) == 3 and name[-1] == "u"

    def compare(a, b):
        a, b = FLOAT32.decode(a), FLOAT32.decode(b)
        if isnan(a) or isnan(b):
            return int(unordered)
        return int(name == "num" or name != "nan" and COMPARISONS[name[:2]](a, b))

    return compare


# ---- conversions
def _conversion(words):
    *modes, result, source = words
    if source == "e4m3x2":
        return lambda a: FLOAT16.encode(E4M3[a & 255]) | FLOAT16.encode(E4M3[a >> 8]) << 16
    if result in ("bf16x2", "f16x2"):
        narrow = FORMATS[result[:-2]]
        return lambda a, b: narrow.encode(FLOAT32.decode(a)) << 16 | narrow.encode(FLOAT32.decode(b))
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}.get(modes[0] if modes else "")
    if (source, result) == ("bf16", "f32"):
        return lambda a: a << 16  # NaN too
    if source in FORMATS and result in FORMATS:

        def between(a):
            x = FORMATS[source].decode(a)
            if whole and math.isfinite(x):
                x = copysign(float(whole(x)), x)
            return FORMATS[result].encode(x)

        return between
    if result == "f32":
        return lambda a: FLOAT32.encode(Fraction(signed(a, source)))
    if source == "f32":
        return lambda a: _to_integer(whole, FLOAT32.decode(a), result)
    width = int(result[1:])  # a register of 16 bits extends a byte
    return lambda a: signed(signed(a, source) % (1 << width), result) % (1 << max(width, 16))


def _to_integer(whole, x, kind):
    width = int(kind[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    if isnan(x):
        return 1 << 63 if width == 64 else 0
    return (low if x < low else high if x > high else whole(x)) % (1 << width)
