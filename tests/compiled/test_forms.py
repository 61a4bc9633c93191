"""Each arithmetic instruction that the executor knows, against exact numbers on edge cases and random bits."""

import itertools
import math

import numpy as np
import pytest

from tests import machine
from tests.machine.instructions.forms import FORMS
from tests.support.instructions.float_formats import FLOAT32
from tests.support.instructions.oracles import Near, oracle
from tests.support.instructions.snippets import bits_of, instruction_kernel, kinds, outcome

FLOATS = [0.0, 2.0**-149, 2.0**-126 - 2.0**-149, 2.0**-126, 0.1, 0.5, 1.0, 1 + 2.0**-23, 1.5, 2.0, 2.5, 3.0, 10.0]
FLOATS += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504.0, 65520.0, 2.0**-24, 2.0**-25, 2.0**24]
FLOATS += [
    2.0**31,
    2.0**63,
    2.0**64,
    2.0**126,
    2.0**127,
    (2 - 2.0**-23) * 2.0**127,
    2.0**-133,
    1.5 * 2.0**-133,
    math.inf,
]
NANS = [0x7FC00000, 0x7F800001, 0xFFC12345, 0x7FFFFFFF]
SHIFTS = [0, 1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 263, 2**31, 2**32 - 1]
MOST = 2500  # combinations of two or three operands, out of all
PERMUTATIONS = [0x3210, 0x7654, 0x9991, 0xAAA2, 0xBBB3, 0x8F0C, 0x0000, 0xFEDC, 0x5410, 0x7632, 0xFFFF3210]


def examples(kind, seed):
    """Bits worth trying for an operand."""
    random = np.random.default_rng(seed)
    bits = bits_of(kind)
    if kind == "pred":
        return [0, 1]
    if kind == "f32":
        edges = [FLOAT32.encode(each) for each in FLOATS]
        edges += [each | 0x80000000 for each in edges] + NANS
        return edges + random.integers(0, 2**32, 14).tolist() + (0x3F800000 + random.integers(0, 2**24, 8)).tolist()
    if kind in ("bf16x2", "f16x2"):
        halves = examples(kind.removesuffix("x2"), seed)
        return [low | high << 16 for low, high in zip(halves, halves[7:] + halves[:7], strict=True)]
    if kind == "f32x2":
        halves = examples("f32", seed)
        return [low | high << 32 for low, high in zip(halves, halves[5:] + halves[:5], strict=True)]
    if bits == 16 and kind in ("f16", "bf16", "e4m3x2"):
        edges = [0, 1, 0x3FF, 0x400, 0x7F, 0x80, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF, 0x3C01]
        edges += [each | 0x8000 for each in edges] + list(range(256)) + list(range(0, 2**16, 256))
        return edges + random.integers(0, 2**16, 1500).tolist()
    top = 1 << bits - 1
    edges = [0, 1, 2, 3, 5, 7, 100, top - 2, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1, 0x55 * top * 2 // 255]
    return (
        edges + SHIFTS[-2:-1] * (bits == 32) + [int(each) for each in random.integers(0, 2 * top, 12, np.uint64, False)]
    )


def combinations(opcode, sources):
    """Operands' bits, a tuple for each thread."""
    base = opcode.split(".")[0]
    lists = [examples(kind, place) for place, kind in enumerate(sources)]
    if base in ("shl", "shr", "shf", "bfe", "bfi"):
        first = len(sources) - (2 if base in ("bfe", "bfi") else 1)
        lists[first:] = [SHIFTS] * (len(lists) - first)
    if base == "prmt":
        lists[2] = PERMUTATIONS
    if len(lists) > 2:
        limit = {"f32": 22, "f32x2": 22, "bf16": 9, "f16": 9}
        random = np.random.default_rng(7)
        picks = [
            random.permutation(len(each))[: limit.get(kind, 14)] for each, kind in zip(lists, sources, strict=True)
        ]
        lists = [[each[at] for at in pick] for each, pick in zip(lists, picks, strict=True)]
    found = list(itertools.product(*lists))
    if len(sources) > 1 and len(found) > MOST:
        found = [found[at] for at in np.random.default_rng(5).permutation(len(found))[:MOST]]
    return found + (near_ties() if opcode in ("fma.rn.f32", "fma.f32") else [])


def columns(operands):
    return [np.array([int(each) for each in column], np.uint64) for column in zip(*operands, strict=True)]


def near_ties():
    """fma operands whose sum lies a little beside a tie of float32, and sums that cancel, and tiny ones."""
    random, found = np.random.default_rng(3), []
    for _ in range(400):
        a, b = (1 + 2.0**-23 * float(random.integers(0, 2**23)) for _ in range(2))
        product = a * b  # exact in float64
        c = float(np.float32(-product * (1 if random.integers(2) else 2.0 ** int(random.integers(0, 50)))))
        scale = 2.0 ** int(random.integers(-75, 2))
        tie = 2.0 ** int(random.integers(20, 30)), 2.0 ** -int(random.integers(20, 60))
        found += [(a, b, c), (a * scale, b * scale, 2.0**-149), (a * scale, b * scale, c * 2.0**-120)]
        found += [
            (tie[0] + 1, 1 + 2.0**-23, tie[1]),
            (1 + 2.0**-12, 1 + 2.0**-12, -tie[1]),
            (1.0, tie[0] * 1.5 + 1, 0.5),
        ]
    # Ties of subnormal numbers, of which float64 loses the last bit: the largest becomes normal if it is rounded twice.
    for steps in (2**22, 2**22 + 1, 2**22 + 2, 2**23 - 2, 2**23 - 1):
        for sign, other in itertools.product((1, -1), (1, -1)):
            found.append((sign * 2.0**-75 * (1 + 2.0**-23), 2.0**-75 * (1 - 2.0**-23), other * steps * 2.0**-149))
    return [tuple(FLOAT32.encode(float(np.float32(x))) for x in each) for each in found]


def check(opcode, got, operands, exact=True):
    wanted = oracle(opcode)
    for bits, values in zip(got.tolist(), operands, strict=True):
        expected = wanted(*values)
        if isinstance(expected, Near):
            true, allowed = expected
            number = FLOAT32.decode(bits)
            if exact:
                allowed = max(abs(true) * 2.0**-24, 2.0**-150) * 1.0001 if true and math.isfinite(true) else 0
            if allowed and math.isfinite(number):
                near = abs(number - true) <= max(allowed, 2.0**-149) or "ftz" in opcode and abs(true) < 2.0**-125
            else:
                near = abs(bits - FLOAT32.encode(true)) <= (1 if math.isfinite(true) and allowed else 0)
            assert near, f"{opcode} of {[hex(x) for x in values]}: {number!r}, near {true!r}"
        else:
            assert bits == expected, f"{opcode} of {[hex(x) for x in values]}: {bits:#x}, not {expected:#x}"


@pytest.mark.parametrize("opcode", [each for each in sorted(FORMS) if not each.startswith("lop3")])
def test_form(opcode):
    form = FORMS[opcode]
    operands = combinations(opcode, form.sources)
    operands = [each for each in operands if oracle(opcode)(*each) is not None]
    assert len(operands) >= 2
    result = outcome(opcode, form.result, form.sources, columns(operands))
    check(opcode, result, operands)


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x80, 0x01, 0x00, 0xFF])
def test_lop3(table):
    operands = list(itertools.product(examples("b32", 0)[:12], examples("b32", 1)[:12], examples("b32", 2)[:12]))
    taken = columns(operands)
    result = outcome("lop3.b32", "b32", ("b32",) * 3, taken, [f"{table:#x}U"])
    wanted = oracle("lop3.b32")
    assert result.tolist() == [wanted(*each, table) for each in operands]


@pytest.mark.parametrize("selector", PERMUTATIONS)
def test_permutations_by_a_constant(selector):
    operands = list(itertools.product(examples("b32", 0), examples("b32", 1)[::3]))
    result = outcome("prmt.b32", "b32", ("b32",) * 2, columns(operands), [f"{selector:#x}U"])
    check("prmt.b32", result, [(*each, selector) for each in operands])


APPROXIMATE = [each for each in sorted(FORMS) if ".approx" in each or each == "div.full.f32"]


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximation_stays_within_what_the_manual_allows(opcode):
    form = FORMS[opcode]
    operands = combinations(opcode, form.sources)
    taken = columns(operands)
    exact = outcome(opcode, form.result, form.sources, taken)
    with machine.approximation(1.0):
        off = outcome(opcode, form.result, form.sources, taken)
    check(opcode, off, operands, exact=False)
    assert (off != exact).sum() > 4  # it does err
    again = outcome(opcode, form.result, form.sources, taken)
    assert (again == exact).all()  # and no longer, once the context is left


@pytest.mark.parametrize("kind", ["u16", "s32", "u64"])
@pytest.mark.parametrize("base", ["div", "rem"])
def test_division_by_zero_is_undefined(base, kind):
    arrays = [np.zeros(32, f"u{bits_of(kind) // 8}") for _ in range(3)]
    arrays[1][:], arrays[2][:] = 7, 2
    text = instruction_kernel(f"{base}.{kind}", kind, (kind, kind))
    assert kinds(text, arrays) == []
    arrays[2][5] = 0
    assert kinds(text, arrays) == ["undefined"]
