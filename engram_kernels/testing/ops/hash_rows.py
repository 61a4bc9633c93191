"""hash_lookup: hash and rows in one call, against the oracles of both, bit for bit."""

from collections.abc import Iterator
from functools import partial

import torch

from engram_kernels import HashPlan

from ..guards import Guarded
from ..inputs import oracle, ragged, small_plan
from ..tables import expected_values, random_parts, rounded
from .call import Call, Case, Place, require, require_bits
from .hashing import some_ids

FORMS = (
    ("float32", 8),
    ("bfloat16", 80),
    ("float16", 16),
    ("e4m3", 16),
    ("e4m3_ue8m0", 64),
    ("nvfp4", 32),
    ("mxfp4", 96),
)


def cases() -> Iterator[Case]:
    def case(name: str, make, *arguments, **options) -> Case:
        return Case("hash_lookup", f"hash_lookup/{name}", partial(make, *arguments, **options))

    for name, width in FORMS:
        yield case(f"{name}/one_sequence", one_sequence, name, width, 19)
        yield case(f"{name}/sequences", sequences, name, width, False)
        yield case(f"{name}/given_out", one_sequence, name, width, 19, guarded=True)
    for dtype in (torch.float32, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield case(f"e4m3_ue8m0/out_{name}", one_sequence, "e4m3_ue8m0", 64, 19, dtype=dtype)
    for dialect in ("map", "raw", "eos"):
        for wrapping in (False, True):
            kind = "wrapping" if wrapping else "plain"
            hashed = dict(dialect=dialect, wrapping=wrapping)
            yield case(f"{dialect}/{kind}", one_sequence, "float32", 8, 19, **hashed)
            yield case(f"{dialect}/{kind}/invalid_ids", sequences, "float32", 8, True, **hashed)
    for tokens in (0, 1, 127):
        yield case(f"tokens_{tokens}", one_sequence, "bfloat16", 80, tokens, layers=3, max_ngram=4, heads=3)
    yield case("batch", batch)


def _parts(plan: HashPlan, name: str, width: int) -> list[tuple]:
    return [random_parts(rows, width, name, seed) for seed, rows in enumerate(plan.rows_per_layer)]


def _expected(parts: list[tuple], ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``[L, T, C, R]`` of row ids ``[T, L, C]``."""
    layers = [rounded(expected_values(*part, ids[:, layer]), dtype) for layer, part in enumerate(parts)]
    return torch.stack(layers)


def one_sequence(
    name: str, width: int, tokens: int, place: Place, dtype: torch.dtype | None = None, guarded=False, **hashed
) -> Call:
    """dtype: asked for; None is the format's own. guarded: into an ``out`` that has margins. hashed: of small_plan."""
    plan, ids = small_plan(**hashed), some_ids(tokens)
    parts = _parts(plan, name, width)
    tables = [place.table(*part) for part in parts]
    expected = _expected(parts, oracle(ids, plan), dtype or tables[0].default_out_dtype)
    options = {} if dtype is None else dict(out_dtype=dtype)
    arguments = place.put(ids), plan.to(place.device), tables
    if not guarded:
        return Call(arguments, lambda result: require_bits(result, expected, place.device), options)
    out = Guarded(expected.shape, expected.dtype, place.device)

    def check(result):
        require(result is out.tensor, "the result must be the tensor given as out")
        require_bits(out.check(poisonous=True), expected, place.device)

    return Call(arguments, check, dict(out=out.tensor))


def sequences(name: str, width: int, invalid: bool, place: Place, **hashed) -> Call:
    """Packed sequences with history, dead tokens and padding, whose rows are zeros."""
    plan, (ids, cu, history, dead) = small_plan(**hashed), ragged(invalid=invalid)
    parts = _parts(plan, name, width)
    tables = [place.table(*part) for part in parts]
    expected = _expected(parts, oracle(ids, plan, cu, history, dead), tables[0].default_out_dtype)
    options = dict(cu_seqlens=place.put(cu), history=place.put(history), dead=place.put(dead))
    arguments = place.put(ids), plan.to(place.device), tables
    return Call(arguments, lambda result: require_bits(result, expected, place.device), options, invalid)


def batch(place: Place) -> Call:
    """Rows of a batch are sequences: ``[L, B, S, C, R]``."""
    plan, ids = small_plan(), some_ids(15).view(3, 5)
    parts = _parts(plan, "bfloat16", 80)
    expected = torch.stack([_expected(parts, oracle(row, plan), torch.bfloat16) for row in ids], 1)
    arguments = place.put(ids), plan.to(place.device), [place.table(*part) for part in parts]
    return Call(arguments, lambda result: require_bits(result, expected, place.device))
