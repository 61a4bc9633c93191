"""Lookups through a cache in compiled graphs: rows, and what the cache holds and counts, as eager calls leave it."""

import pytest
import torch

from engram_kernels import hash_lookup
from tests.ops.test_hashing import small_plan
from tests.ops.test_registration import CHECKS, counted

from .test_lookup import Pair, stream

pytestmark = [pytest.mark.kernel, pytest.mark.graphs]


def same_state(pair, other):
    """Equal keys, stamps, counts and clock; keys of empty ways are nobody's."""
    (keys, stamps, *rest), (others, wanted, *more) = pair.cache.state[:4], other.cache.state[:4]
    held = wanted > 0
    return torch.equal(stamps, wanted) and torch.equal(keys[held], others[held]) and all(map(torch.equal, rest, more))


@pytest.mark.parametrize(
    ("backend", "name", "out_format"),
    [
        ("counting", "float16", "values"),
        ("aot_eager", "e4m3_ue8m0", "storage"),
        ("aot_eager", "nvfp4", "storage"),
        ("aot_eager", "mxfp4", "values"),
    ],
)
def test_one_graph_of_several_lookups(device, backend, name, out_format):
    """In their order, a dropped result's too; short calls go past the cache in the same graph."""
    pair, other = (Pair(device, small_plan(), 32, name) for _ in range(2))
    for each in (pair, other):
        each.cache.min_tokens = 3

    def step(ids, own, out=None):
        options = dict(cache=own.cache, out_format=out_format)
        first = hash_lookup(ids, own.moved, own.tables, **options)
        hash_lookup(ids.flip(0), own.moved, own.tables, **options)
        return first, hash_lookup(ids + 1, own.moved, own.tables, out=out, **options)

    graphs = None
    if backend == "counting":
        run, graphs = counted(step)
    else:
        torch.compiler.reset()
        run = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for ids in stream((19, 2, 9, 13)):
        ids = (ids % 39).to(device)
        found, wanted = run(ids, pair), step(ids, other)
        for a, b in zip(found, wanted, strict=True):
            for part, expected in zip(*((x if isinstance(x, tuple) else (x,)) for x in (a, b)), strict=True):
                assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))
        assert same_state(pair, other)
    stats, wanted = pair.cache.stats(), other.cache.stats()
    assert stats.bypassed_calls == wanted.bypassed_calls == 3
    assert graphs is None or len(graphs) == 1


def test_rows_that_change_between_runs(device):
    """A graph sees them, as an eager call does; it writes to out too."""
    pair = Pair(device, small_plan(), 8, "float32")

    def step(ids, out):
        return hash_lookup(ids, pair.moved, pair.tables, cache=pair.cache, out=out)

    torch.compiler.reset()
    run, ids = torch.compile(step, backend="aot_eager", fullgraph=True), torch.arange(9, device=device)
    for _ in range(2):
        out = torch.empty(2, 9, pair.plan.primes.shape[1], 8, device=device)
        assert run(ids, out) is out
        assert torch.equal(out, hash_lookup(ids, pair.moved, pair.tables))
        pair.tables[1].weight.mul_(2)


def test_opcheck_and_a_cache_that_is_gone(device):
    pair = Pair(device, small_plan(), 8, "float32")
    ids = torch.arange(9, device=device)
    out = torch.empty(2, 9, pair.plan.primes.shape[1], 8, device=device)
    options = (pair.cache.turns, pair.cache.name, None, False, None, None)
    op = torch.ops.engram.hash_lookup_cached.default
    torch.library.opcheck(op, (ids, *(None,) * 4, out, None, *options), test_utils=CHECKS)
    with pytest.raises(ValueError, match="hash_lookup: the cache of this compiled graph is no longer there"):
        op(ids, *(None,) * 4, out, None, pair.cache.turns, "none", *options[2:])
