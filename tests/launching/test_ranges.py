"""Ranges for torch's profiler: every group of launches has one where they are on, kept ones too; else none."""

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from engram_kernels import (
    EngramConfig,
    EngramState,
    NgramCache,
    Prefetcher,
    gate_conv_residual,
    gate_residual,
    hash_lookup,
    lookup,
    ngram_hash,
    set_ranges,
)
from engram_kernels.launching.exchange import Ranks
from engram_kernels.launching.ranges import ranged
from engram_kernels.ops import hash_rows, hashing, rows
from engram_kernels.ops.gate import GATE
from engram_kernels.tables.staging import StagingRing, stage
from engram_kernels.tables.view import view_tables
from engram_kernels.testing import tables
from tests.ops.test_hash_rows import parts_of
from tests.ops.test_hashing import small_plan
from tests.tables.test_staging import LateRuntime

STEP = {"ngram_hash", "lookup", "hash_lookup", "cached_lookup", "gate_residual", "gate_conv_residual"}
STEP |= {"copy_tokens", "project", "commit"}
CONFIG = dict(layers=(1, 3), max_ngram=3, heads=2, row_width=32, table_sizes=(5, 5), hidden_size=8, branches=2)
CONFIG |= dict(raw_vocab_size=50, vocab_size=None, pad_id=2, eos_id=None, window="pad", multiplier_rule="numpy", seed=0)
CONFIG |= dict(row_multiple=1, format="float32", eps=1e-6, projection_bias=False, conv_kernel=2, conv_eps=None)
CONFIG |= dict(norm_offset=0.0, zero_gate="copysign")


@pytest.fixture(autouse=True)
def switched_off():
    yield
    set_ranges(False)


def step_on(device):
    """A step of an engine, and calls of the ops that it makes no use of."""
    plan = small_plan()
    placed = [tables.place(*part, device) for part in parts_of(plan, 16, "bfloat16")]
    plan = plan.to(device)
    cache = NgramCache(plan, placed, entries=8, ways=2, min_tokens=0)
    projecting = dict(projections=[lambda rows, out: out.copy_(rows.flatten(-2)[..., :6])] * 2, kv_width=6)
    prefetcher = Prefetcher(plan, placed, 8, **projecting)
    state = EngramState(EngramConfig(**CONFIG), 2, device, dtype=torch.float32)
    ids, slots = torch.arange(4, device=device).view(2, 2), torch.arange(2, dtype=torch.int32, device=device)
    hidden, key = (torch.ones(4, 2, 8, device=device) for _ in range(2))
    value, norm = torch.ones(4, 8, device=device), torch.ones(2, 8, device=device)
    gate = (hidden, key, value, norm, norm)
    row_ids = torch.zeros(3, 2, dtype=torch.int32, device=device)

    def step():
        begun = state.begin(ids, slots)
        prefetcher.start(ids)
        for layer in range(2):
            prefetcher.rows(layer), prefetcher.kv(layer)
        ngram_hash(ids, plan), lookup(placed[0], row_ids), hash_lookup(ids, plan, placed, cache=cache)
        gate_residual(*gate, eps=1e-6)
        weight = torch.ones(2, 8, 2, device=device)
        gate_conv_residual(*gate, norm, weight, dilation=3, eps=1e-6, conv_eps=1e-6)
        begun.commit()

    return step


def names_of(work):
    """What is after "engram." in the names of ranges, how often each."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    found = {event.key: event.count for event in profiler.key_averages()}
    return {name.removeprefix("engram."): count for name, count in found.items() if name.startswith("engram.")}


def check_step(device):
    step = step_on(device)
    assert not names_of(step), "off at first"
    assert set_ranges(True) is False
    for _ in range(2):  # what was kept while they were off is kept no longer; then what was kept while they are on
        found = names_of(step)
        assert found.keys() == STEP
        assert found["project"] == 2 and found["ngram_hash"] == found["commit"] == found["cached_lookup"] == 1
    assert set_ranges(False) is True
    assert not names_of(step)


def test_a_step_by_the_reference():
    check_step(torch.device("cpu"))


@pytest.mark.kernel
def test_a_step_by_kernels(device):
    check_step(device)


@pytest.mark.kernel
def test_where_autograd_records(device):
    hidden = torch.ones(4, 2, 8, device=device, requires_grad=True)
    value, norm = torch.ones(4, 8, device=device), torch.ones(2, 8, device=device)
    weight = torch.ones(2, 8, 2, device=device)
    set_ranges(True)

    def forward():
        gate_residual(hidden, hidden, value, norm, norm, eps=1e-6)
        gate_conv_residual(hidden, hidden, value, norm, norm, norm, weight, dilation=3, eps=1e-6, conv_eps=1e-6)

    assert names_of(forward) == dict(gate_residual=1, gate_conv_residual=1)


@pytest.mark.kernel
def test_registered_ops(device):
    """As compiled graphs call them."""
    plan = small_plan()
    placed = [tables.place(*part, device) for part in parts_of(plan, 16, "bfloat16")]
    plan, ids = plan.to(device), torch.arange(5, device=device)
    row_ids = torch.zeros(3, 2, dtype=torch.int32, device=device)

    def calls():
        hashing.ngram_hash_op(ids, None, None, None, None, *plan.parts())
        rows.lookup_op(row_ids, *view_tables(placed[:1], device), None, False, None, None)
        view = view_tables(placed, device)
        hash_rows.hash_lookup_op(ids, None, None, None, None, *view, None, False, None, None, *plan.parts())

    calls()
    set_ranges(True)
    for _ in range(2):
        assert names_of(calls) == dict(ngram_hash=1, lookup=1, hash_lookup=1)


def test_staging():
    table = tables.place(*tables.random_parts(31, 64, "bfloat16"), torch.device("cpu"), "staged")
    table.rings[torch.device("cpu")] = StagingRing(LateRuntime(), threads=1)
    set_ranges(True)
    assert names_of(lambda: stage(table, torch.arange(3), "lookup")) == dict(stage=1)


def test_exchange():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks, sent = Ranks(None, "test"), torch.arange(3)
        set_ranges(True)
        assert names_of(lambda: ranks.exchange(sent, [3], [3], "test", "rows")) == dict(exchange=1)
    finally:
        dist.destroy_process_group()


def test_nothing_is_wrapped_where_they_are_off():
    assert ranged("anything", print) is print
    set_ranges(True)
    assert ranged("anything", print) is not print


def test_a_change_forgets_kept_launches_and_nothing_else_does():
    plan, ids = small_plan(), torch.arange(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GATE, "_kept", {plan: {"form": "kept"}})
        set_ranges(False)
        assert GATE._kept
        set_ranges(True)
        assert not GATE._kept
    assert torch.equal(ngram_hash(ids, plan), ngram_hash(ids, plan))


def test_torch_compile_sees_no_switch():
    """One graph, whether ranges are on or off, and no counter of the table in its guards."""
    table = tables.place(*tables.random_parts(31, 64, "bfloat16"), torch.device("cpu"))
    compiled, ids, before = [], torch.arange(6).view(3, 2), table.metrics()

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    graph = torch.compile(lambda ids: lookup(table, ids), backend=backend, fullgraph=True)
    first = graph(ids)
    assert table.metrics() == before, "calls of graphs are not counted"
    eager = lookup(table, ids)
    set_ranges(True)
    assert torch.equal(graph(ids), first) and torch.equal(first, eager) and len(compiled) == 1


def test_the_switch_takes_no_numbers():
    with pytest.raises(ValueError, match="set_ranges: enabled must be True or False, got 1"):
        set_ranges(1)
