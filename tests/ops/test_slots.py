"""History by slot: the rows, gradients and cache of a history gathered before, in all ops that hash."""

import pytest
import torch

from engram_kernels import EngramTable, NgramCache, hash_lookup, ngram_hash, reference
from engram_kernels.launching.tokens import Tokens
from engram_kernels.tables.view import view_tables
from engram_kernels.testing import tables
from engram_kernels.testing.guards import Guarded
from tests.support.launches import launch_hash_lookup, launch_ngram_hash

from .test_hash_rows import parts_of
from .test_hashing import oracle, ragged, small_plan

#: Of the five sequences of ragged(): one twice, -1 for none, one that does not exist.
SLOTS = (4, -1, 0, 4, 7)


def by_slot(device, dtype=torch.int64):
    """Tokens whose history is a row of seven, and the history that they have."""
    ids, cu, _, dead = ragged()
    generator = torch.Generator().manual_seed(8)
    history = torch.randint(0, 40, (7, 2), generator=generator).to(dtype)
    history[0, 0] = -1
    tokens = Tokens(ids, cu, history, dead, torch.tensor(SLOTS, dtype=torch.int32))
    wanted = torch.stack([history[slot] if 0 <= slot < 7 else torch.full((2,), -1, dtype=dtype) for slot in SLOTS])
    return Tokens(*(part.to(device) for part in tokens)), wanted


@pytest.mark.parametrize("dialect", ["map", "raw", "eos"])
def test_reference_equals_oracle(dialect):
    plan = small_plan(dialect=dialect)
    tokens, wanted = by_slot("cpu")
    expected = oracle(tokens.token_ids, plan, tokens.cu_seqlens, wanted, tokens.dead)
    assert torch.equal(ngram_hash(tokens.token_ids, plan, **tokens.options), expected)
    assert torch.equal(tokens.gathered().history, wanted) and tokens.gathered().slots is None


@pytest.mark.kernel
@pytest.mark.parametrize("dialect", ["map", "raw", "eos"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernel_hashes(device, dialect, dtype):
    plan = small_plan(dialect=dialect)
    tokens, wanted = by_slot(device, dtype)
    out = Guarded((19, *plan.primes.shape), plan.index_dtype, device)
    launch_ngram_hash(tokens.token_ids, plan.to(device), *tokens[1:4], out.tensor, slots=tokens.slots)
    ids, cu, _, dead = ragged()
    assert torch.equal(out.check().cpu(), oracle(ids, plan, cu, wanted, dead))


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["direct", "head", "address"])
def test_kernel_looks_up(device, order):
    plan = small_plan()
    parts = parts_of(plan, 32, "e4m3_ue8m0")
    placed = [tables.place(*part, device) for part in parts]
    tokens, wanted = by_slot(device)
    out = Guarded((2, 19, 4, 32), torch.float32, device)
    view = view_tables(placed, device)
    launch_hash_lookup(
        tokens.token_ids, plan.to(device), view, *tokens[1:4], out.tensor, False, None, order, tokens.slots
    )
    options = dict(tokens.options, history=wanted.to(device), slots=None)
    expected = hash_lookup(tokens.token_ids, plan.to(device), placed, out_dtype=torch.float32, **options)
    assert tables.same_bits(out.check(), expected, truncated=False)


@pytest.mark.kernel
def test_kernel_asks_a_cache(device):
    """What another cache does for gathered history, its counts too."""
    plan, (tokens, wanted) = small_plan().to(device), by_slot(device)
    placed = [tables.place(*part, device) for part in parts_of(small_plan(), 32, "e4m3_ue8m0")]
    caches = [NgramCache(plan, placed, entries=6, ways=2, min_tokens=0) for _ in range(2)]
    given = tokens.options, dict(tokens.options, history=wanted.to(device), slots=None)
    for _ in range(2):
        rows = [
            hash_lookup(tokens.token_ids, plan, placed, cache=cache, **options)
            for cache, options in zip(caches, given, strict=True)
        ]
        assert tables.same_bits(*rows, truncated=False)
    assert torch.equal(caches[0].state.keys, caches[1].state.keys)
    assert torch.equal(caches[0].state.counts, caches[1].state.counts)


@pytest.mark.kernel
def test_kernel_takes_slots_of_a_batch(device):
    """``[B, S]`` with a slot each; one token, as in decode."""
    plan = small_plan(max_ngram=4, heads=2)
    history = torch.arange(15).view(5, 3)
    ids, slots = torch.tensor([[7], [8], [9]]), torch.tensor([3, -1, 1], dtype=torch.int32)
    expected = reference.ngram_hash(ids, plan, history=history, slots=slots)
    moved = dict(history=history.to(device), slots=slots.to(device))
    assert torch.equal(ngram_hash(ids.to(device), plan.to(device), **moved).cpu(), expected)
    whole = torch.tensor([[9, 10, 11, 7], [-1, -1, -1, 8], [3, 4, 5, 9]])
    assert torch.equal(expected[:, 0], reference.ngram_hash(whole, plan, dead=whole < 0)[:, -1])


def test_a_gradient_is_that_of_the_history_at_the_time():
    """The backward pass hashes again: after slots have moved on it finds the rows of the forward pass all the same."""
    plan = small_plan()
    made = [EngramTable.from_tensors(weight, placement="cpu") for weight, _ in parts_of(plan, 32, "float32")]
    for table in made:
        table.requires_row_grad_()
    tokens, wanted = by_slot("cpu")
    grads = []
    for options in (dict(tokens.options, history=wanted, slots=None), tokens.options):
        rows = hash_lookup(tokens.token_ids, plan, made, **options)
        if options["slots"] is not None:
            tokens.history.fill_(5)
        rows.sum().backward()
        grads.append([table.row_grad for table in made])
        for table in made:
            table.row_grad = None
    for alone, by_slots in zip(*grads, strict=True):
        assert torch.equal(alone.ids, by_slots.ids) and torch.equal(alone.values, by_slots.values)
