"""Binary floating point in exact arithmetic: rounding of fractions to any format, written for nothing but tests."""

from dataclasses import dataclass
from fractions import Fraction
from math import copysign, inf, isqrt, nan


@dataclass(frozen=True)
class Format:
    exponent_bits: int
    fraction_bits: int

    @property
    def bias(self):
        return (1 << self.exponent_bits - 1) - 1

    def decode(self, bits):
        """The number, as a Python float, which holds all of these formats exactly."""
        sign = -1.0 if bits >> self.exponent_bits + self.fraction_bits & 1 else 1.0
        exponent = bits >> self.fraction_bits & (1 << self.exponent_bits) - 1
        fraction = bits & (1 << self.fraction_bits) - 1
        if exponent == (1 << self.exponent_bits) - 1:
            return nan if fraction else sign * inf
        if exponent == 0:
            return sign * fraction * 2.0 ** (1 - self.bias - self.fraction_bits)
        return sign * (1 + fraction / 2**self.fraction_bits) * 2.0 ** (exponent - self.bias)

    def encode(self, value):
        """Bits of the nearest number to a float or Fraction, ties to even; of NaN all but the sign are set."""
        if value != value:
            return (1 << self.exponent_bits + self.fraction_bits) - 1
        negative = copysign(1.0, value) < 0 if isinstance(value, float) else value < 0
        sign = int(negative) << self.exponent_bits + self.fraction_bits
        infinity = (1 << self.exponent_bits) - 1 << self.fraction_bits
        if value in (inf, -inf):
            return sign | infinity
        size, exponent = abs(Fraction(value)), 1 - self.bias
        if size:
            exponent = max(exponent, _floor_log2(size))
        steps = round(size / Fraction(2) ** (exponent - self.fraction_bits))  # Python rounds ties to even
        # A subnormal has no exponent bits; steps that round up to the next power carry into them.
        bits = steps + ((exponent + self.bias - 1) << self.fraction_bits)
        return sign | min(bits, infinity)


def _floor_log2(size):
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess - (Fraction(2) ** guess > size)


def square_root(value):
    """A Fraction that rounds as the root does: its first bits, and a bit for what is left."""
    value = Fraction(value)
    shift = 400
    scaled = (value.numerator << 2 * shift) // value.denominator
    root = isqrt(scaled)
    return Fraction(2 * root + (root * root != scaled), 2 << shift)


FLOAT32, BFLOAT16, FLOAT16 = Format(8, 23), Format(8, 7), Format(5, 10)
