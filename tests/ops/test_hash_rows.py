"""hash_lookup: hash and rows in one launch, against the oracles of both."""

import pytest
import torch
import triton

from engram_kernels import HashPlan, hash_lookup, lookup, ngram_hash, reference
from engram_kernels.ops.row_kernels.hashed import hash_rows_config
from engram_kernels.tables.view import view_tables
from engram_kernels.testing import tables
from engram_kernels.testing.guards import Guarded
from tests.conftest import recent
from tests.support.launches import launch_hash_lookup

from .test_hashing import oracle, ragged, small_plan

CPU = torch.device("cpu")


def parts_of(plan, width, name) -> list[tuple[torch.Tensor, torch.Tensor | float | None]]:
    """One layer's (weight, scale) each."""
    return [tables.random_parts(rows, width, name, seed) for seed, rows in enumerate(plan.rows_per_layer)]


def wanted(parts, ids, dtype):
    """``[L, T, C, R]`` of oracle ids and oracle rows."""
    per_layer = [tables.expected_values(*part, ids[:, layer]) for layer, part in enumerate(parts)]
    return torch.stack([tables.rounded(values, dtype) for values in per_layer])


@pytest.mark.parametrize(
    ("name", "width"), [("float32", 8), ("e4m3", 16), ("e4m3_ue8m0", 64), ("nvfp4", 32), ("mxfp4", 96)]
)
def test_reference_equals_oracles(name, width):
    plan = small_plan()
    parts = parts_of(plan, width, name)
    placed = [tables.place(*part, torch.device("cpu")) for part in parts]
    ids, cu, history, dead = ragged()
    options = dict(cu_seqlens=cu, history=history, dead=dead)
    rows = reference.hash_lookup(ids, plan, placed, out_dtype=torch.float32, **options)
    expected = wanted(parts, oracle(ids, plan, cu, history, dead), torch.float32)
    assert tables.same_bits(rows, expected, truncated=False)
    assert tables.same_bits(
        hash_lookup(ids, plan, placed, out_dtype=torch.float32, **options), expected, truncated=False
    )


def test_reference_batch_and_out():
    plan = small_plan()
    placed = [tables.place(*part, torch.device("cpu")) for part in parts_of(plan, 8, "float32")]
    ids = torch.randint(0, 40, (3, 5))
    out = torch.empty(2, 3, 5, 4, 8)
    assert hash_lookup(ids, plan, placed, out=out) is out
    for b in range(3):
        assert torch.equal(out[:, b], hash_lookup(ids[b], plan, placed))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "width", "dialect", "wrapping", "invalid"),
    [
        ("e4m3_ue8m0", 256, "map", False, False),
        ("e4m3_ue8m0", 96, "raw", True, True),
        ("nvfp4", 256, "map", False, False),
        ("mxfp4", 160, "raw", True, True),
        ("e4m3", 160, "eos", False, True),
        ("bfloat16", 80, "map", True, False),
        ("float32", 4, "eos", True, False),
        ("float16", 1024, "raw", False, True),
    ],
)
def test_kernel(device, name, width, dialect, wrapping, invalid):
    plan = small_plan(dialect=dialect, wrapping=wrapping)
    parts = parts_of(plan, width, name)
    placed = [tables.place(*part, device) for part in parts]
    ids, cu, history, dead = ragged(invalid=invalid)
    expected_ids = oracle(ids, plan, cu, history, dead)
    moved = [x.to(device) for x in (ids, cu, history, dead)]
    for dtype, programs in ((torch.float32, None), (torch.bfloat16, 1)):
        out = Guarded((2, 19, 4, width), dtype, device)
        view = view_tables(placed, device)
        launch_hash_lookup(moved[0], plan.to(device), view, *moved[1:], out.tensor, False, programs)
        truncated = dtype == torch.bfloat16 and triton.knobs.runtime.interpret
        assert tables.same_bits(out.check(), wanted(parts, expected_ids, dtype), truncated=truncated)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["e4m3_ue8m0", "e4m3", "bfloat16", "nvfp4", "mxfp4"])
def test_kernel_storage(device, name):
    plan = small_plan()
    parts = parts_of(plan, 64, name)
    ids, cu, history, dead = ragged()
    moved = [x.to(device) for x in (ids, cu, history, dead)]
    options = dict(cu_seqlens=moved[1], history=moved[2], dead=moved[3], out_format="storage")
    rows, scales = hash_lookup(moved[0], plan.to(device), [tables.place(*p, device) for p in parts], **options)
    cpu = [tables.place(*p, torch.device("cpu")) for p in parts]
    options = dict(cu_seqlens=cu, history=history, dead=dead, out_format="storage")
    wanted_rows, wanted_scales = reference.hash_lookup(ids, plan, cpu, **options)
    assert torch.equal(rows.cpu().view(torch.uint8), wanted_rows.view(torch.uint8))
    assert (scales is None) == (wanted_scales is None)
    assert scales is None or torch.equal(scales.cpu(), wanted_scales)
    if name == "e4m3":
        assert torch.equal(scales, torch.tensor([scale for _, scale in parts]))


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_kernel_equals_hash_then_lookup(device, tokens):
    """One launch or two, any number of programs, alone or in a batch: the same bits."""
    plan = small_plan(layers=3, max_ngram=4, heads=3)
    placed = [tables.place(*part, device) for part in parts_of(plan, 32, "e4m3_ue8m0")]
    ids, plan = torch.randint(0, 40, (tokens,), device=device), plan.to(device)
    rows = hash_lookup(ids, plan, placed)
    assert tables.same_bits(hash_lookup(ids, plan, placed), rows, truncated=False)
    row_ids = ngram_hash(ids, plan)
    assert torch.equal(ngram_hash(ids, plan), row_ids)
    for layer, table in enumerate(placed):
        assert tables.same_bits(rows[layer], lookup(table, row_ids[:, layer]), truncated=False)
    for programs in (1, 2):
        assert tables.same_bits(hash_lookup(ids, plan, placed, programs=programs), rows, truncated=False)
        assert recent["hash_lookup_kernel"]["grid"] == (programs,)
    history = torch.cat([torch.full((3,), -1, device=device), ids])[-4:-1][None]
    alone = hash_lookup(ids[-1:], plan, placed, history=history)
    assert tables.same_bits(alone, rows[:, -1:], truncated=False)


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["direct", "head"])
@pytest.mark.parametrize("tokens", [17, 70])
def test_many_rows_are_hashed_at_once(device, order, tokens):
    """64 at a time where each program has as many, whole steps of copying or not: the bits of fewer at a time."""
    plan = small_plan(layers=2, max_ngram=3, heads=2)
    parts = parts_of(plan, 256, "e4m3_ue8m0")
    ids, dead = torch.randint(0, 40, (tokens,)), torch.arange(tokens) % 9 == 4
    expected, moved = wanted(parts, oracle(ids, plan, dead=dead), torch.float32), plan.to(device)
    placed = [tables.place(*part, device) for part in parts]
    view = view_tables(placed, device)
    for programs, at_once in ((1, 64), (1000, 16)):
        out = Guarded((2, tokens, 4, 256), torch.float32, device)
        launch_hash_lookup(ids.to(device), moved, view, None, None, dead.to(device), out.tensor, False, programs, order)
        assert recent["hash_lookup_kernel"]["BLOCK_HASH"] == at_once
        assert tables.same_bits(out.check(), expected, truncated=False)


def test_rows_hashed_at_once_hold_their_reason():
    """64 where all programs have as many, as soon as V4.1 has 176 tokens on 132 multiprocessors."""
    table = tables.place(*tables.random_parts(5, 256, "e4m3_ue8m0"), CPU)
    view = view_tables([table], CPU)
    for programs in (1, 4, 132):
        assert hash_rows_config(view, 64 * programs - 1, programs)[1] == 16
        assert hash_rows_config(view, 64 * programs, programs)[1] == 64
    wide = view._replace(format="float32", width=1024)
    assert [hash_rows_config(wide, rows, 2)[1] for rows in (127, 128)] == [4, 64]


@pytest.mark.kernel
def test_kernel_real_geometry(device, v41_plan):
    """V4.1's own hash (24 columns, 16 M rows each) and row format, on tables of 1,024 rows: most ids read as zeros."""
    ids = torch.randint(0, 129_280, (3,))
    row_ids = reference.ngram_hash(ids, v41_plan)
    parts = [tables.random_parts(1024, 256, "e4m3_ue8m0", seed) for seed in range(2)]
    small = HashPlan.from_parts(
        v41_plan.multipliers, v41_plan.primes % 40 + 2, pad=v41_plan.pad, token_map=v41_plan.token_map
    )
    for plan in (v41_plan, small):
        expected = wanted(parts, oracle(ids, plan), torch.float32)
        out = Guarded((2, 3, 24, 256), torch.float32, device)
        placed = [tables.place(*part, device) for part in parts]
        view = view_tables(placed, device)
        launch_hash_lookup(ids.to(device), plan.to(device), view, None, None, None, out.tensor, False, None)
        assert tables.same_bits(out.check(), expected, truncated=False)
    assert row_ids.max() > 2**24


@pytest.mark.kernel
@pytest.mark.parametrize("out_format", ["values", "storage"])
def test_columns_of_a_rank_are_those_of_the_whole(device, out_format):
    """Strided over three ranks, in both passes of the kernel's grid order, scales included."""
    plan = small_plan().to(device)
    placed = [tables.place(*part, device) for part in parts_of(plan, 32, "e4m3_ue8m0")]
    ids, cu, history, dead = (x.to(device) for x in ragged())
    options = dict(cu_seqlens=cu, history=history, dead=dead, out_format=out_format)
    whole = hash_lookup(ids, plan, placed, **options)
    for rank in range(3):
        columns = range(rank, plan.primes.shape[1], 3)
        for order in ("direct", "head", "address"):
            part = hash_lookup(ids, plan.select(columns=columns), placed, order=order, **options)
            for one, all_columns in zip(*([x] if out_format == "values" else x for x in (part, whole)), strict=True):
                assert torch.equal(one.view(torch.uint8), all_columns[:, :, columns].contiguous().view(torch.uint8))
