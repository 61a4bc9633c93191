"""The arithmetic instructions that the executor knows: FORMS, from an opcode to what it computes.

Instructions of memory, warps and control are elsewhere (translation.TABLE); any opcode in neither is a fault.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from operator import add, and_, invert, mul, or_, sub, xor

import numpy as np

from . import values
from .values import f32, f64, u16, u32, u64


@dataclass(frozen=True)
class Form:
    """``function`` takes and gives arrays of the types named; ``undefined`` says what of the result is undefined.

    Types are as in an opcode; f16, bf16 and the packed ones go as their bits. ``wide`` allows registers wider than the
    type.
    """

    function: Callable
    result: str
    sources: tuple[str, ...]
    undefined: Callable | None = None  # of (operands, undefined bits of them); None: where any operand is
    unspecified: Callable | None = None  # of the operands: where the manual leaves the result open
    wide: bool = False


@cache
def dtype_of(kind):
    """numpy's type of a PTX type."""
    if kind == "pred":
        return np.dtype(bool)
    packed = {"bf16": u16, "f16": u16, "bf16x2": u32, "f16x2": u32, "e4m3x2": u16, "f32x2": u64, "f32": f32, "f64": f64}
    if kind in packed:
        return np.dtype(packed[kind])
    return np.dtype((values.SIGNED if kind[0] == "s" else values.UNSIGNED)[int(kind[1:])])


def _undefined_and(operands, undefined):
    """A defined zero decides an and."""
    (a, b), (lost_a, lost_b) = operands, undefined
    return (lost_a & ~((b == 0) & ~lost_b)) | (lost_b & ~((a == 0) & ~lost_a))


def _undefined_or(operands, undefined):
    (a, b), (lost_a, lost_b) = operands, undefined
    return (lost_a & ~((b == 1) & ~lost_b)) | (lost_b & ~((a == 1) & ~lost_a))


def _undefined_select(operands, undefined):
    return undefined[2] | np.where(operands[2], undefined[0], undefined[1])


def _by_zero(a, b):
    return b == 0


FORMS = {}


def _integers():
    for bits in (16, 32, 64):
        for kind in (f"u{bits}", f"s{bits}"):
            same = partial(Form, result=kind)
            dtype = dtype_of(kind)
            FORMS[f"add.{kind}"] = same(add, sources=(kind,) * 2)
            FORMS[f"sub.{kind}"] = same(sub, sources=(kind,) * 2)
            FORMS[f"mul.lo.{kind}"] = same(mul, sources=(kind,) * 2)
            FORMS[f"mad.lo.{kind}"] = same(lambda a, b, c: a * b + c, sources=(kind,) * 3)
            FORMS[f"div.{kind}"] = same(values.quotient, sources=(kind,) * 2, unspecified=_by_zero)
            FORMS[f"rem.{kind}"] = same(values.remainder, sources=(kind,) * 2, unspecified=_by_zero)
            FORMS[f"min.{kind}"] = same(np.minimum, sources=(kind,) * 2)
            FORMS[f"max.{kind}"] = same(np.maximum, sources=(kind,) * 2)
            FORMS[f"shr.{kind}"] = same(values.shr, sources=(kind, "u32"))
            if kind[0] == "s":
                FORMS[f"abs.{kind}"] = same(np.abs, sources=(kind,))
                FORMS[f"neg.{kind}"] = same(np.negative, sources=(kind,))
            if bits == 64:
                high = values.mul_hi_u64 if kind == "u64" else values.mul_hi_s64
            else:
                twice, wide = dtype_of(f"{kind[0]}{2 * bits}"), f"{kind[0]}{2 * bits}"

                def multiply(a, b, twice=twice):
                    return a.astype(twice) * b.astype(twice)

                def high(a, b, bits=bits, dtype=dtype, multiply=multiply):
                    return (multiply(a, b) >> bits).astype(dtype)

                FORMS[f"mul.wide.{kind}"] = Form(multiply, wide, (kind,) * 2)
                FORMS[f"mad.wide.{kind}"] = Form(
                    lambda a, b, c, multiply=multiply: multiply(a, b) + c, wide, (kind, kind, wide)
                )
            FORMS[f"mul.hi.{kind}"] = same(high, sources=(kind,) * 2)
            if bits > 16:
                FORMS[f"bfe.{kind}"] = same(values.bfe, sources=(kind, "u32", "u32"))
    for kind in ("b16", "b32", "b64"):
        same = partial(Form, result=kind)
        FORMS[f"and.{kind}"] = same(and_, sources=(kind,) * 2, undefined=_undefined_and)
        FORMS[f"or.{kind}"] = same(or_, sources=(kind,) * 2)
        FORMS[f"xor.{kind}"] = same(xor, sources=(kind,) * 2)
        FORMS[f"not.{kind}"] = same(invert, sources=(kind,))
        FORMS[f"shl.{kind}"] = same(values.shl, sources=(kind, "u32"))
        FORMS[f"shr.{kind}"] = same(values.shr, sources=(kind, "u32"))
    for kind in ("b32", "b64"):
        FORMS[f"popc.{kind}"] = Form(lambda a: np.bitwise_count(a).astype(u32), "u32", (kind,))
        FORMS[f"clz.{kind}"] = Form(values.clz, "u32", (kind,))
        FORMS[f"bfi.{kind}"] = Form(values.bfi, kind, (kind, kind, "u32", "u32"))
    FORMS["brev.b32"] = Form(values.brev, "b32", ("b32",))
    FORMS["prmt.b32"] = Form(values.prmt, "b32", ("b32",) * 3)
    FORMS["lop3.b32"] = Form(values.lop3, "b32", ("b32",) * 4)
    FORMS["shf.l.wrap.b32"] = Form(values.shf_left, "b32", ("b32", "b32", "u32"))
    FORMS["shf.r.wrap.b32"] = Form(values.shf_right, "b32", ("b32", "b32", "u32"))


def _predicates():
    FORMS["and.pred"] = Form(and_, "pred", ("pred",) * 2, _undefined_and)
    FORMS["or.pred"] = Form(or_, "pred", ("pred",) * 2, _undefined_or)
    FORMS["xor.pred"] = Form(xor, "pred", ("pred",) * 2)
    FORMS["not.pred"] = Form(invert, "pred", ("pred",))
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    compare |= {"gt": np.greater, "ge": np.greater_equal}
    for bits in (16, 32, 64):
        for kind in (f"b{bits}", f"u{bits}", f"s{bits}"):
            for name, function in compare.items():
                if kind[0] != "b" or name in ("eq", "ne"):
                    FORMS[f"setp.{name}.{kind}"] = Form(function, "pred", (kind,) * 2)
        for name, alias in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            FORMS[f"setp.{name}.u{bits}"] = FORMS[f"setp.{alias}.u{bits}"]
        for kind in (f"b{bits}", f"u{bits}", f"s{bits}", *(["f32"] if bits == 32 else [])):
            FORMS[f"selp.{kind}"] = Form(
                lambda a, b, p: np.where(p, a, b), kind, (kind, kind, "pred"), _undefined_select
            )
    for name, function in compare.items():

        def ordered(a, b, function=function):
            return function(a, b) & (a == a) & (b == b)

        def unordered(a, b, function=function):
            return function(a, b) | (a != a) | (b != b)

        FORMS[f"setp.{name}.f32"] = Form(ordered, "pred", ("f32",) * 2)
        FORMS[f"setp.{name}u.f32"] = Form(unordered, "pred", ("f32",) * 2)
    FORMS["setp.num.f32"] = Form(lambda a, b: (a == a) & (b == b), "pred", ("f32",) * 2)
    FORMS["setp.nan.f32"] = Form(lambda a, b: (a != a) | (b != b), "pred", ("f32",) * 2)


def _floats():
    two = {
        "add": lambda a, b: values.canonical(a + b),
        "sub": lambda a, b: values.canonical(a - b),
        "mul": lambda a, b: values.canonical(a * b),
    }
    three = {"fma.rn": values.fma}
    for count, functions in ((2, two), (3, three)):
        for name, function in functions.items():
            for opcode in {name, name.removesuffix(".rn") + ".rn"}:
                FORMS[f"{opcode}.f32"] = Form(function, "f32", ("f32",) * count)
                FORMS[f"{opcode}.ftz.f32"] = Form(values.flushing(function), "f32", ("f32",) * count)
                FORMS[f"{opcode}.f32x2"] = Form(values.paired(function), "f32x2", ("f32x2",) * count)
    for kind, widen in (("bf16", values.widen_bf16), ("f16", values.widen_f16)):

        def mixed(a, b, c, widen=widen):
            return values.fma(widen(a), widen(b), c)

        def mixed_sum(a, b, widen=widen):
            return values.canonical(widen(a) + b)

        def mixed_difference(a, b, widen=widen):
            return values.canonical(widen(a) - b)

        FORMS[f"fma.rn.f32.{kind}"] = Form(mixed, "f32", (kind, kind, "f32"))
        FORMS[f"add.rn.f32.{kind}"] = Form(mixed_sum, "f32", (kind, "f32"))
        FORMS[f"sub.rn.f32.{kind}"] = Form(mixed_difference, "f32", (kind, "f32"))
    narrow_types = {"bf16": (values.widen_bf16, values.round_bf16), "f16": (values.widen_f16, values.round_f16)}
    for kind, conversions in narrow_types.items():
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            once = values.rounded_once(function, *conversions)
            for opcode in (name, f"{name}.rn"):
                FORMS[f"{opcode}.{kind}"] = Form(once, kind, (kind,) * 2)
                FORMS[f"{opcode}.{kind}x2"] = Form(values.both_halves(once), f"{kind}x2", (f"{kind}x2",) * 2)
    one = {"abs": np.abs, "neg": np.negative}
    for name, function in (("min", values.smaller), ("max", values.larger)):
        FORMS[f"{name}.f32"] = Form(function, "f32", ("f32",) * 2)
        FORMS[f"{name}.NaN.f32"] = Form(values.spreading_nan(function), "f32", ("f32",) * 2)
        FORMS[f"{name}.ftz.f32"] = Form(values.flushing(function), "f32", ("f32",) * 2)
    FORMS["copysign.f32"] = Form(lambda sign, size: np.copysign(size, sign), "f32", ("f32",) * 2)
    FORMS["div.rn.f32"] = Form(lambda a, b: values.canonical(a / b), "f32", ("f32",) * 2)
    FORMS["div.full.f32"] = Form(values.div_full, "f32", ("f32",) * 2)
    FORMS["div.approx.f32"] = Form(values.div_approx, "f32", ("f32",) * 2)
    one |= {"sqrt.rn": values.sqrt_rn, "rcp.rn": values.rcp_rn, "tanh.approx": values.tanh}
    for name, function in one.items():
        FORMS[f"{name}.f32"] = Form(function, "f32", ("f32",))
    approximate = {"ex2": values.ex2, "lg2": values.lg2, "sqrt": values.sqrt_approx, "rsqrt": values.rsqrt}
    for name, function in (approximate | {"rcp": values.rcp_approx}).items():
        FORMS[f"{name}.approx.f32"] = Form(function, "f32", ("f32",))
        FORMS[f"{name}.approx.ftz.f32"] = Form(values.flushing(function), "f32", ("f32",))


def _cut(a, to):
    return a.astype(to)


def _conversions():
    integers = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "us"]
    for result in integers:
        for source in integers:
            cut = partial(_cut, to=dtype_of(result))
            FORMS[f"cvt.{result}.{source}"] = Form(cut, result, (source,), wide=True)
        FORMS[f"cvt.rn.f32.{result}"] = Form(lambda a: a.astype(f32), "f32", (result,), wide=True)
    roundings = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for name, function in roundings.items():
        FORMS[f"cvt.{name}.f32.f32"] = Form(lambda a, function=function: values.canonical(function(a)), "f32", ("f32",))
        for kind in ("s32", "u32", "s64", "u64"):
            FORMS[f"cvt.{name}.{kind}.f32"] = Form(values.to_integer(function, dtype_of(kind).type), kind, ("f32",))
    for kind, narrow, widen in (
        ("bf16", values.round_bf16, values.widen_bf16),
        ("f16", values.round_f16, values.widen_f16),
    ):
        FORMS[f"cvt.rn.{kind}.f32"] = Form(narrow, kind, ("f32",))
        FORMS[f"cvt.f32.{kind}"] = Form(widen, "f32", (kind,))

        def narrow_both(high, low, narrow=narrow):
            return narrow(high).astype(u32) << u32(16) | narrow(low).astype(u32)

        FORMS[f"cvt.rn.{kind}x2.f32"] = Form(narrow_both, f"{kind}x2", ("f32",) * 2)
    FORMS["cvt.rn.bf16.f16"] = Form(lambda a: values.round_bf16(values.widen_f16(a)), "bf16", ("f16",))
    FORMS["cvt.rn.f16.bf16"] = Form(lambda a: values.round_f16(values.widen_bf16(a)), "f16", ("bf16",))
    FORMS["cvt.rn.f16x2.e4m3x2"] = Form(values.widen_e4m3x2, "f16x2", ("e4m3x2",))


for _fill in (_integers, _predicates, _floats, _conversions):
    _fill()
