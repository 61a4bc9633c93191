"""Memory that Python code frees or shrinks under plans, caches, states and prefetchers: an error, no fault.

tests/tables/test_freed.py has tables.
"""

import copy
import multiprocessing.reduction

import pytest
import torch

import engram_kernels
from engram_kernels import (
    EngramConfig,
    EngramState,
    EngramTable,
    HashPlan,
    NgramCache,
    Prefetcher,
    hash_lookup,
    ngram_hash,
)
from tests.ops import test_arguments, test_arguments_gate

HOW = {
    "set": lambda x: x.set_(),
    "data": lambda x: setattr(x, "data", x.data[:0].clone()),
    "resize": lambda x: x.resize_(0),
    "storage": lambda x: x.untyped_storage().resize_(0),
    "part of the storage": lambda x: x.untyped_storage().resize_(x.element_size()),
}
CONFIG = EngramConfig(
    layers=(0, 2), max_ngram=3, heads=2, row_width=8, table_sizes=(50, 60), hidden_size=16, branches=2, conv_kernel=3,
    raw_vocab_size=40, format="float32",
)  # fmt: skip
IDS = torch.arange(12)
FREED = "(was|were) freed|must be contiguous, of shape"


def plan():
    return HashPlan.build(CONFIG, torch.arange(40))


def tables():
    return [EngramTable.from_tensors(torch.randn(rows, 8), placement="cpu") for rows in CONFIG.rows_per_layer]


def spoil(how, x):
    """Whether it had an effect."""
    try:
        HOW[how](x)
    except RuntimeError as error:  # of memory that NumPy shares
        assert "resizable" in str(error) or "resize" in str(error)
        return False
    return True


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["multipliers", "primes", "offsets", "reciprocals", "orders", "token_map"])
@pytest.mark.kernel
def test_plans(device, name, how):
    own, rows = plan().to(device), [EngramTable.from_tensors(table.weight, placement="cpu") for table in tables()]
    ids = IDS.to(device)
    calls = {"ngram_hash": lambda: ngram_hash(ids, own)}
    if device.type == "cpu":
        prefetcher = Prefetcher(own, rows, 16)
        calls |= {"hash_lookup": lambda: hash_lookup(ids, own, rows), "Prefetcher.start": lambda: prefetcher.start(ids)}
    for call in calls.values():  # after this one the launches are kept
        call()
    if not spoil(how, getattr(own, name)):
        return  # what executes machine code on a CPU shares the memory with NumPy, and it cannot be freed
    for where, call in calls.items():
        with pytest.raises(ValueError, match=f"^{where}: (the memory of )?plan.{name} ({FREED})"):
            call()


def test_plans_whose_memory_moves():
    """Into shared memory, as for another process, or in a copy: what they hash is the same."""
    own = plan()
    expected = ngram_hash(IDS, own)
    for other in (copy.deepcopy(own), copy.copy(own)):
        assert torch.equal(ngram_hash(IDS, other), expected)
    multiprocessing.reduction.ForkingPickler.dumps(own)
    own.token_map.share_memory_()
    assert own.token_map.is_shared() and torch.equal(ngram_hash(IDS, own), expected)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["keys", "stamps", "clock", "counts"])
def test_caches(name, how):
    """The cache hands out other tensors over its memory, of which the storage is all that can be spoilt."""
    own, rows = plan(), tables()
    cache, expected = NgramCache(own, rows, entries=16, min_tokens=0), hash_lookup(IDS, own, rows)
    hash_lookup(IDS, own, rows, cache=cache)
    spoil(how, getattr(cache.state, name))
    assert torch.equal(hash_lookup(IDS, own, rows, cache=cache), expected)
    assert sum(map(sum, cache.stats().hits)) > 0


@pytest.mark.parametrize("how", ["storage", "part of the storage"])
def test_caches_on_kernels(how, monkeypatch):
    own, rows = plan(), tables()
    monkeypatch.setattr("engram_kernels.cache.store.takes_kernels", lambda device: True)
    cache = NgramCache(own, rows, entries=16, min_tokens=0)
    assert spoil(how, cache.state.rows)
    for call in (lambda: hash_lookup(IDS, own, rows, cache=cache), cache.stats, cache.clear):
        with pytest.raises(ValueError, match="^NgramCache.*: the memory of the cache was freed or resized"):
            call()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("part", ["value", "scale", "cursor"])
def test_states(part, how):
    state, slots = EngramState(CONFIG, 3, "cpu", dtype=torch.float32), torch.tensor([1], dtype=torch.int32)
    step = state.begin(IDS[None], slots)
    assert spoil(how, getattr(step.conv_state(2), part))
    for where, call in {
        "EngramStep.commit": step.commit,
        "EngramState.begin": lambda: state.begin(IDS[None], slots),
        "EngramState.layer_slots": lambda: step.conv_state(0),
        "EngramState.reset": state.reset,
        "EngramState.conv_states|EngramState.layer_slots": lambda: state.conv_states(1),
    }.items():
        with pytest.raises(ValueError, match=f"^({where}): the memory of the state was freed or resized"):
            call()


@pytest.mark.parametrize("how", HOW)
def test_prefetchers(how):
    own, rows = plan(), tables()
    prefetcher, expected = Prefetcher(own, rows, 16), hash_lookup(IDS, own, rows)
    prefetcher.start(IDS)
    assert spoil(how, prefetcher.rows(1))
    if "storage" not in how:  # rows() gives a view of its own
        assert torch.equal(prefetcher.rows(1), expected[1])
        return
    for where, call in {"rows": lambda: prefetcher.rows(0), "start": lambda: prefetcher.start(IDS)}.items():
        with pytest.raises(ValueError, match=f"^Prefetcher.{where}: the memory of the prefetcher was freed or resized"):
            call()


GIVEN = dict(
    ngram_hash=test_arguments.valid("ngram_hash"),
    lookup=test_arguments.valid("lookup"),
    hash_lookup=test_arguments.valid("hash_lookup"),
    gate_residual=test_arguments_gate.valid("gate_residual"),
    gate_conv_residual=test_arguments_gate.valid("gate_conv_residual"),
)


@pytest.mark.parametrize("how", ["storage", "part of the storage"])
@pytest.mark.parametrize("op", GIVEN)
def test_arguments(op, how):
    """Tensors that are given to an op; torch's own functions fault on them."""
    for name in [name for name, value in GIVEN[op].items() if isinstance(value, torch.Tensor) and value.numel() > 1]:
        arguments = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in GIVEN[op].items()}
        spoil(how, arguments[name])
        with pytest.raises(ValueError, match=f"^{op}: {name} must have memory of [0-9]+ bytes, got [0-9]+"):
            getattr(engram_kernels, op)(**arguments)


def test_tables_of_freed_memory():
    for given in ([torch.ones(8, 32)], [torch.ones(8, 32).to(torch.float8_e4m3fn), torch.ones(8, 1).to(torch.uint8)]):
        given[-1].untyped_storage().resize_(0)
        for placement in ("cpu", "staged", "host"):
            with pytest.raises(ValueError, match="^EngramTable.from_tensors: (weight|scale) must have memory of"):
                EngramTable.from_tensors(*given, placement=placement)
