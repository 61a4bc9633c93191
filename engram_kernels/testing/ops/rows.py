"""lookup: rows of every format and width against a scalar decoder, bit for bit."""

from collections.abc import Iterator
from functools import cache, partial

import numpy as np
import torch

from engram_kernels.geometry.row_format import FORMATS

from ..guards import Guarded
from ..inputs import ROW_CASES, ROWS, ids_around
from ..oracles import e2m1_value, e4m3_value, ue8m0_value
from ..tables import TABLE_SCALE, expected_values, random_parts, rounded
from .call import Call, Case, Place, require, require_bits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cases() -> Iterator[Case]:
    def case(name: str, make, *arguments) -> Case:
        return Case("lookup", f"lookup/{name}", partial(make, *arguments))

    widths = dict(reversed(ROW_CASES))  # the first of each format
    for name, width in ROW_CASES:
        yield case(f"{name}/width_{width}", around, name, width, None, torch.int64)
        yield case(f"{name}/width_{width}/out_float32", around, name, width, torch.float32, torch.int64)
    for name, width in widths.items():
        for dtype in ("bfloat16", "float16"):
            yield case(f"{name}/out_{dtype}", around, name, width, DTYPES[dtype], torch.int64)
        yield case(f"{name}/int32_ids", around, name, width, None, torch.int32)
        yield case(f"{name}/storage", storage, name, width)
        yield case(f"{name}/given_out", given_out, name, width)
        yield case(f"{name}/one_row", of_ids, name, width, torch.tensor([[0, 1, -1], [0, -(2**63), 2**63 - 1]]), 1)
        yield case(f"{name}/no_ids", of_ids, name, width, torch.empty(0, 3, dtype=torch.int64), ROWS)
    for shape in ((), (4,), (2, 3)):
        ids = ids_around(ROWS, (*shape, 8))
        yield case(f"shapes/dimensions_{ids.dim()}", of_ids, "bfloat16", 80, ids, ROWS)
    yield case("strided_ids/one_layer", of_ids, "bfloat16", 80, ids_around(ROWS, (9, 3, 5))[:, 1], ROWS)
    yield case("strided_ids/every_other", of_ids, "bfloat16", 80, ids_around(ROWS, (45,))[1::2], ROWS)
    yield case("repeated_ids", of_ids, "bfloat16", 80, ids_around(ROWS).repeat(3, 1) // 5, ROWS)
    for dtype in DTYPES:
        yield case(f"special_values/{dtype}", special_values, DTYPES[dtype])
        yield case(f"every_e4m3_code/out_{dtype}", every_e4m3, DTYPES[dtype])
        for name in ("mxfp4", "nvfp4"):
            yield case(f"every_e2m1_code/{name}/out_{dtype}", every_e2m1, name, DTYPES[dtype], None)
    for size, own_scale in (("tiny", 1e-40), ("huge", 3e38)):
        yield case(f"every_e2m1_code/nvfp4/{size}_scale", every_e2m1, "nvfp4", torch.float32, own_scale)
    yield case("missing_row_of_infinite_products", missing_row)


@cache
def _expected(name: str, width: int, ids_dtype: torch.dtype) -> np.ndarray:
    return expected_values(*random_parts(ROWS, width, name), ids_around(ROWS, dtype=ids_dtype))


def around(name: str, width: int, dtype, ids_dtype, place: Place) -> Call:
    """Ids inside, on both edges and outside. dtype: asked for; None is the format's own."""
    table, ids = place.table(*random_parts(ROWS, width, name)), ids_around(ROWS, dtype=ids_dtype)
    expected = rounded(_expected(name, width, ids_dtype), dtype or table.default_out_dtype)
    options = {} if dtype is None else dict(out_dtype=dtype)
    return _call(table, ids, expected, place, options)


def of_ids(name: str, width: int, ids: torch.Tensor, rows: int, place: Place) -> Call:
    """A table of ``rows`` rows, in the format's own dtype."""
    weight, scale = random_parts(rows, width, name)
    table = place.table(weight, scale)
    return _call(table, ids, rounded(expected_values(weight, scale, ids), table.default_out_dtype), place)


def storage(name: str, width: int, place: Place) -> Call:
    """Bytes as the table has them, and their scales; zeros for rows that are not there."""
    weight, scale = random_parts(ROWS, width, name)
    ids = ids_around(ROWS)
    inside = (ids >= 0) & (ids < ROWS)

    def stored(part):
        return part.view(torch.uint8)[ids.clamp(0, ROWS - 1)].masked_fill(~inside[..., None], 0)

    def check(result):
        require(isinstance(result, tuple) and len(result) == 2, "the result must be a pair (rows, scales)")
        rows, scales = result
        require(isinstance(rows, torch.Tensor) and rows.dtype == weight.dtype, f"rows must be {weight.dtype}")
        require_bits(rows.view(torch.uint8), stored(weight), place.device)
        if FORMATS[name].group:
            require_bits(scales, stored(scale), place.device)
        elif FORMATS[name].table_scale:
            require(float(scales) == np.float32(TABLE_SCALE), f"scales must be the table's own, got {scales}")
        else:
            require(scales is None, f"scales of {name} must be None, got {type(scales).__name__}")

    return Call((place.table(weight, scale), place.put(ids)), check, dict(out_format="storage"))


def given_out(name: str, width: int, place: Place) -> Call:
    """All of ``out`` is written, and nothing around it."""
    table, ids = place.table(*random_parts(ROWS, width, name)), ids_around(ROWS)
    guarded = Guarded((*ids.shape, width), table.default_out_dtype, place.device)
    expected = rounded(_expected(name, width, torch.int64), table.default_out_dtype)

    def check(result):
        require(result is guarded.tensor, "the result must be the tensor given as out")
        require_bits(guarded.check(poisonous=True), expected, place.device)

    return Call((table, place.put(ids)), check, dict(out=guarded.tensor))


def special_values(dtype: torch.dtype, place: Place) -> Call:
    """NaN, infinities, both zeros, the least and the largest numbers, as they are."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    some = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, least, -least, info.max, info.min, 1.0]
    weight = torch.tensor(some).repeat(16)[: 9 * 16].view(9, 16).to(dtype)
    ids = torch.arange(9).view(3, 3)
    return _call(place.table(weight, None), ids, weight[ids], place)


def every_e4m3(dtype: torch.dtype, place: Place) -> Call:
    """All 256 codes by all 256 scales, NaN, subnormal and infinite products among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    weight, scale = codes.repeat(256, 1).view(torch.float8_e4m3fn), codes[:, None].repeat(1, 8)
    values = np.array([e4m3_value(code) for code in range(256)]) * np.array([[ue8m0_value(s)] for s in range(256)])
    return _call(place.table(weight, scale), codes.long(), rounded(values, dtype), place, dict(out_dtype=dtype))


def every_e2m1(name: str, dtype: torch.dtype, own_scale: float | None, place: Place) -> Call:
    """All 16 codes by all 256 scales, at every place of a row. own_scale: of nvfp4, TABLE_SCALE by default."""
    fmt, places = FORMATS[name], torch.arange(256)
    codes = (places[None, :] + places[:, None]) % 16  # row s, whose scales are s
    weight = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    scale = places.to(torch.uint8)[:, None].repeat(1, fmt.scale_bytes(256))
    value = e4m3_value if fmt.table_scale else ue8m0_value
    values = np.array([e2m1_value(code) for code in range(16)])[codes] * np.array([[value(s)] for s in range(256)])
    if fmt.table_scale:
        values = values * float(np.float32(own_scale or TABLE_SCALE))
    table = place.table(weight, scale, own_scale)
    return _call(table, places, rounded(values, dtype), place, dict(out_dtype=dtype))


def missing_row(place: Place) -> Call:
    """Zeros where there is no row, though every product of the table is infinite."""
    table = place.table(torch.full((2, 16), 448.0).to(torch.float8_e4m3fn), 3e38)
    expected = torch.full((3, 16), float("inf"), dtype=torch.bfloat16)
    expected[::2] = 0
    return _call(table, torch.tensor([-1, 1, 2]), expected, place)


def _call(table, ids: torch.Tensor, expected: torch.Tensor, place: Place, options: dict | None = None) -> Call:
    # Moved with its strides: a copy to a GPU makes views dense.
    base = ids if ids._base is None else ids._base
    moved = place.put(base).as_strided(ids.shape, ids.stride(), ids.storage_offset())
    return Call((table, moved), lambda result: require_bits(result, expected, place.device), options or {})
