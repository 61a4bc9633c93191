"""What numbers do, in the terms of the PTX manual. Arrays of the instruction's own type come in and go out.

Approximate instructions round correctly, unless within :func:`approximation`.
"""

import contextlib

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
s8, s16, s32, s64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
UNSIGNED = {8: u8, 16: u16, 32: u32, 64: u64}
SIGNED = {8: s8, 16: s16, 32: s32, 64: s64}
NAN = np.array([0x7FFFFFFF], u32).view(f32)[0]  # the one that float32 instructions give
SMALLEST_NORMAL = f32(2.0**-126)


class _Approximation:
    error = 0.0


@contextlib.contextmanager
def approximation(error):
    """Approximate instructions err by up to ``error`` times what the manual allows; which way depends on the input."""
    before, _Approximation.error = _Approximation.error, float(error)
    try:
        yield
    finally:
        _Approximation.error = before


def _off(exact, allowed, *inputs):
    """The float64 result as an approximation of it gives it: off by up to ``allowed``, once it has been rounded."""
    if not _Approximation.error:
        return exact
    allowed = np.fmax(allowed - np.spacing(np.abs(exact).astype(f32)).astype(f64) / 2, 0)
    bits = u64(0)
    for each in inputs:
        bits = (bits * u64(31) + np.ascontiguousarray(each).view(u32)) * u64(0x9E3779B97F4A7C15)
    share = (bits >> u64(40)).astype(f64) / 2.0**23 - 1.0
    return np.where(np.isfinite(exact) & (allowed != 0), exact + _Approximation.error * share * allowed, exact)


def canonical(x):
    """Every NaN of float32 is the same one."""
    bad = x != x
    return np.where(bad, NAN, x) if bad.any() else x


def flushed(x):
    """.ftz: subnormal numbers are zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(f32(0), x), x)


def flushing(function):
    """The .ftz form: operands and result are flushed."""

    def flushing_form(*operands):
        return flushed(function(*(flushed(each) for each in operands)))

    return flushing_form


def paired(function):
    """The .f32x2 form: both halves of 64 bits."""

    def paired_form(*operands):
        halves = function(*(each.view(f32).reshape(-1, 2) for each in operands))
        return np.ascontiguousarray(halves).view(u64)[:, 0]

    return paired_form


# ---- float32
def fma(a, b, c):
    """Rounded once: the product is exact in float64, and where the sum is not, its last bit is made odd."""
    a, b, c = a.astype(f64), b.astype(f64), c.astype(f64)
    product = a * b
    total = product + c
    rounded = total.astype(f32)
    bits = total.view(s64)
    # Rounding twice matters only at a tie of float32, and where float32 is subnormal and ties stand elsewhere.
    risky = ((bits & 0x1FFFFFFF) == 0x10000000) | (np.abs(rounded) <= SMALLEST_NORMAL)
    if risky.any():
        back = total - product
        lost = (product - (total - back)) + (c - back)
        risky &= (lost != 0) & np.isfinite(total) & ((bits & 1) == 0) & (total != 0)
        odd = np.where(risky, bits + np.where((lost > 0) == (total > 0), 1, -1), bits)
        rounded = odd.view(f64).astype(f32)
    return canonical(rounded)


def smaller(a, b):
    """min.f32: a number where the other is NaN, and -0 below +0."""
    return canonical(np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b)))


def larger(a, b):
    return canonical(np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b)))


def spreading_nan(function):
    """The .NaN form: NaN where either is."""

    def nan_form(a, b):
        return np.where((a != a) | (b != b), NAN, function(a, b))

    return nan_form


def ex2(a):
    exact = np.exp2(a.astype(f64))
    result = _off(exact, exact * 2.0**-22, a).astype(f32)
    return canonical(np.where(a == 0, f32(1), result))


def lg2(a):
    exact = np.log2(a.astype(f64))
    allowed = np.where((a > 0.5) & (a < 2), 2.0**-22, np.abs(exact) * 2.0**-22)
    return canonical(_off(exact, allowed, a).astype(f32))


def sqrt_rn(a):
    return canonical(np.sqrt(a))


def sqrt_approx(a):
    exact = np.sqrt(a.astype(f64))
    return canonical(_off(exact, exact * 2.0**-23, a).astype(f32))


def rsqrt(a):
    exact = 1 / np.sqrt(a.astype(f64))
    return canonical(_off(exact, exact * 2.0**-22.9, a).astype(f32))


def rcp_rn(a):
    return canonical((1 / a.astype(f64)).astype(f32))


def rcp_approx(a):
    exact = 1 / a.astype(f64)
    return canonical(_off(exact, exact * 2.0**-23, a).astype(f32))


def tanh(a):
    exact = np.tanh(a.astype(f64))
    return canonical(_off(exact, exact * 2.0**-11, a).astype(f32))


def div_full(a, b):
    """At most 2 ulp off."""
    exact = a.astype(f64) / b.astype(f64)
    if _Approximation.error:
        exact = _off(exact, 2 * np.spacing(np.abs(exact).astype(f32)).astype(f64), a, b)
    return canonical(exact.astype(f32))


def div_approx(a, b):
    """As div.full, but 0, or NaN for an infinity, where 2^126 < abs(b) < 2^128."""
    quotient = div_full(a, b)
    huge = (np.abs(b) > f32(2.0**126)) & np.isfinite(b)
    zero = np.copysign(f32(0), np.where(np.signbit(a) ^ np.signbit(b), f32(-1), f32(1)))
    return np.where(huge, np.where(np.isfinite(a), zero, NAN), quotient)


# ---- integers
def mul_hi_u64(a, b):
    low, half = u64(0xFFFFFFFF), u64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = (a_low * b_low >> half) + (a_low * b_high & low) + (a_high * b_low & low)
    return a_high * b_high + (a_low * b_high >> half) + (a_high * b_low >> half) + (middle >> half)


def mul_hi_s64(a, b):
    high = mul_hi_u64(a.view(u64), b.view(u64))
    high = high - np.where(a < 0, b.view(u64), u64(0)) - np.where(b < 0, a.view(u64), u64(0))
    return high.view(s64)


def quotient(a, b):
    """Truncated. The manual leaves division by zero open, of which forms.py takes care."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~b.dtype.type(0), a // safe)
    return np.where(b == 0, b.dtype.type(-1), (a - np.fmod(a, safe)) // safe)


def remainder(a, b):
    """Of the truncated quotient."""
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def shl(a, amount):
    """Amounts beyond the width give 0."""
    width = u32(a.dtype.itemsize * 8)
    return np.where(amount >= width, a.dtype.type(0), a << np.minimum(amount, width - u32(1)).astype(a.dtype))


def shr(a, amount):
    """Amounts beyond the width give 0, or the sign."""
    width = u32(a.dtype.itemsize * 8)
    moved = a >> np.minimum(amount, width - u32(1)).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(amount >= width, a.dtype.type(0), moved)


def bfe(a, position, length):
    """A field of bits, extended by its sign for signed types; the low 8 bits of position and length count."""
    width = a.dtype.itemsize * 8
    position, length = (position & u32(255)).astype(s64), (length & u32(255)).astype(s64)
    held = np.minimum(length, np.maximum(width - position, 0)).astype(u64)  # bits that are in the register
    field = shr(a.view(UNSIGNED[width]), position.astype(u32)).astype(u64)
    field &= shl(np.full(1, 1, u64), held.astype(u32)) - u64(1)
    if a.dtype.kind == "i":
        top = np.clip(np.minimum(position + length, width) - 1, 0, width - 1).astype(u32)
        negative = (shr(a.view(UNSIGNED[width]), top) & a.view(UNSIGNED[width]).dtype.type(1)).astype(bool)
        field |= np.where(negative & (length != 0), ~(shl(np.full(1, 1, u64), held.astype(u32)) - u64(1)), u64(0))
    return field.astype(UNSIGNED[width]).view(a.dtype)


def bfi(field, base, position, length):
    """The low bits of ``field`` in the place of some of ``base``."""
    one = np.full(1, 1, field.dtype)
    position, length = position & u32(255), length & u32(255)
    mask = shl(shl(one, length) - one, position)
    return (shl(field, position) & mask) | (base & ~mask)


def brev(a):
    out = np.zeros_like(a)
    for place in range(32):
        out |= ((a >> u32(place)) & u32(1)) << u32(31 - place)
    return out


def clz(a):
    """Zeros above the highest bit set."""
    count = np.zeros(a.shape, u32)
    width = a.dtype.itemsize * 8
    for place in range(width):
        count += (a >> a.dtype.type(place)) == 0
    return count


def prmt(a, b, selector):
    """Four bytes picked out of eight; the selector's fourth bit asks for the byte's sign instead."""
    out = u32(0)
    if len(selector) == 1:  # as nearly always: a constant
        for place in range(4):
            pick = int(selector[0]) >> 4 * place & 15
            byte = ((b if pick & 4 else a) >> u32(8 * (pick & 3))) & u32(255)
            out = out | ((byte >> u32(7)) * u32(255) if pick & 8 else byte) << u32(8 * place)
        return out | np.zeros(np.broadcast_shapes(a.shape, b.shape), u32)
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    for place in range(4):
        pick = (selector >> u32(4 * place)) & u32(15)
        byte = ((both >> ((pick & u32(7)) << u32(3)).astype(u64)) & u64(0xFF)).astype(u32)
        byte = np.where((pick & u32(8)) != 0, np.where(byte >= u32(128), u32(255), u32(0)), byte)
        out = out | (byte << u32(8 * place))
    return out


def lop3(a, b, c, table):
    """Any function of three bits; ``table`` is 8 bits."""
    out = u32(0)
    for place in range(8):
        if int(table[0]) >> place & 1:
            out = out | (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return out | np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), u32)


def shf_left(low, high, amount):
    """shf.l.wrap: the upper 32 bits of 64, shifted left by the amount modulo 32."""
    return (((high.astype(u64) << u64(32) | low) << (amount & u32(31)).astype(u64)) >> u64(32)).astype(u32)


def shf_right(low, high, amount):
    return ((high.astype(u64) << u64(32) | low) >> (amount & u32(31)).astype(u64)).astype(u32)


# ---- conversions
def round_bf16(x):
    """float32 to the bits of bfloat16; every NaN is 0x7fff."""
    bits = x.view(u32)
    rounded = ((bits.astype(u64) + u64(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u64(16)).astype(u16)
    return np.where(x != x, u16(0x7FFF), rounded)


def round_f16(x):
    """float32 to the bits of float16; every NaN is 0x7fff."""
    return np.where(x != x, u16(0x7FFF), x.astype(f16).view(u16))


def widen_bf16(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def rounded_once(function, widen, narrow):
    """Sum, difference or product of two 16-bit floats: float32 has over twice their bits, so it rounds them once."""
    return lambda a, b: narrow(canonical(function(widen(a), widen(b))))


def both_halves(function):
    """For packed operands of 2 x 16 bits what ``function`` is for 16."""

    def halves(a, b):
        low, high = (
            function((a >> u32(shift)).astype(u16), (b >> u32(shift)).astype(u16)).astype(u32) for shift in (0, 16)
        )
        return high << u32(16) | low

    return halves


def widen_f16(bits):
    return canonical(bits.view(f16).astype(f32))


def _e4m3_table():
    code = np.arange(256, dtype=s32)
    exponent, fraction = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent.astype(f64) - 10))
    halves = np.where(code & 128, -size, size).astype(f16).view(u16)
    return np.where((code & 127) == 127, u16(0x7FFF), halves)


E4M3 = _e4m3_table()


def widen_e4m3x2(pair):
    """Two bytes of e4m3 to two of float16, which holds them all."""
    return E4M3[pair & u16(0xFF)].astype(u32) | (E4M3[pair >> u16(8)].astype(u32) << u32(16))


def to_integer(rounding, kind):
    """cvt.rzi and its kin: saturated; NaN is 0, or the top bit alone for 64 bits."""
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    nan = 0 if np.iinfo(kind).bits < 64 else 1 << 63

    def integer_form(a):
        x = rounding(a.astype(f64))
        below, above = x <= float(low), x >= float(high)
        inside = np.where(below | above | (x != x), 0.0, x)
        whole = np.where(below, kind(low), np.where(above, kind(high), inside.astype(kind)))
        return np.where(x != x, np.array(nan, u64).astype(UNSIGNED[np.iinfo(kind).bits]).view(kind), whole)

    return integer_form
