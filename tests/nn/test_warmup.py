"""Warming up: it compiles every variant of the kernels that steps launch afterwards, and changes no state.

Triton's key of a variant is formed here from what the interpreter is given: types and alignment of tensors, what is
None, constants, and of integers that may be specialised whether they are 1 or a multiple of 16.
"""

import pytest
import torch
import triton

from engram_kernels import EngramState, EngramTable, NgramCache, Prefetcher, warmup
from engram_kernels.nn.warmup import variant_lengths
from engram_kernels.ops.row_kernels import order as read_order
from engram_kernels.serving import policy
from tests.conftest import package_kernels
from tests.support.launches import forget_launches

from .test_engram import FORMS, built

pytestmark = pytest.mark.kernel
MAX_TOKENS = 36


def parts_of(form, device, placement=None, cached=False, projecting=False):
    """The last layer's module of a form, and a prefetcher and a state for it."""
    module, plan, tables = built(form, device)
    if placement is not None:
        tables = [EngramTable.from_tensors(table.weight, placement=placement) for table in tables]
    module.requires_grad_(False)
    cache = NgramCache(plan, tables, entries=16, min_tokens=4) if cached else None
    options = dict(layers=module.config.layers, cache=cache)
    if projecting:
        options |= dict(projections=[module.project] * len(tables), kv_width=module.wkv.out_features, depth=2)
    prefetcher = Prefetcher(plan, tables, MAX_TOKENS, **options)
    state = EngramState(module.config, 3, device, dtype=torch.float32, max_drafts=2)
    return module, prefetcher, state


def sizes_of(values):
    """An integer as Triton specialises it."""
    return "1" if values == 1 else (values.bit_length() > 31, values % 16 == 0)


def record(monkeypatch):
    """The set that variants launched from now on go to, by Triton's search, which launches that are kept spare."""
    forget_launches()
    seen = set()
    free = {name: unspecialised(kernel) for name, kernel in package_kernels().items()}
    kind = type(package_kernels()["hash_lookup_kernel"])
    run = kind.run

    def watch(self, *args, grid, warmup, **kwargs):
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        key = [self.fn.__name__]
        for name, value in sorted(values.items()):
            if isinstance(value, torch.Tensor):
                value = value.dtype, value.data_ptr() % 16 == 0
            elif isinstance(value, int) and not isinstance(value, bool) and name.islower():
                value = value.bit_length() > 31 if name in free[self.fn.__name__] else sizes_of(value)
            elif isinstance(value, float):
                value = float
            key.append((name, str(value)))
        seen.add(tuple(key))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(kind, "run", watch)
    return seen


def unspecialised(kernel):
    """Names that a kernel declares as not to be specialised."""
    if isinstance(kernel, triton.runtime.jit.JITFunction):
        return {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    return set(kernel.kwargs.get("do_not_specialize") or ())


def steps(module, prefetcher, state, device, lengths):
    """Steps of an engine: one or two sequences, padding behind them, and each kind of commit."""
    for tokens in lengths:
        ids = torch.randint(0, 40, (tokens,), device=device)
        cu = torch.tensor([0, tokens // 2, tokens - tokens // 5], dtype=torch.int32, device=device)
        slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
        step = state.begin(ids, slots, cu_seqlens=cu)
        prefetcher.start(ids, **step.options)
        hidden = torch.randn(tokens, 2, 24, device=device)
        ahead = (
            dict(kv=prefetcher.kv(module.layer)) if prefetcher.projects else dict(rows=prefetcher.rows(module.layer))
        )
        module(hidden, **ahead, state=step)
        prefetcher.release()
        step.commit(*([cu.diff()] if tokens % 2 else []))
    state.reset(slots)


@pytest.mark.parametrize("form", ["v41", "paper"])
def test_no_variant_is_left_to_compile(form, device, monkeypatch):
    if device.type == "cpu":  # a table worth sorting, with layers worth a launch each
        monkeypatch.setattr(read_order, "_REACH", 0)
        monkeypatch.setattr(read_order, "_IN_FLIGHT", 40)
        monkeypatch.setattr(read_order, "_SORTED_FROM", 700)
        monkeypatch.setitem(policy._LAUNCH_BYTES, "host", 3000)
    parts = parts_of(form, device, "host" if device.type == "cpu" else None)
    seen = record(monkeypatch)
    warmup([parts[0]], MAX_TOKENS, prefetcher=parts[1], state=parts[2])
    assert torch.equal(parts[2]._history, torch.full_like(parts[2]._history, -1))
    warmed = set(seen)
    names = {key[0] for key in warmed}
    assert {"copy_tokens_kernel", "commit_history_kernel", "hash_lookup_kernel"} <= names
    assert ("conv_residual_kernel" if form == "paper" else "gate_residual_kernel") in names
    lengths = [1, 3, 5, 8, 9, 17, 21, 33]
    steps(*parts, device, lengths)
    assert not {key for key in seen if key not in warmed}


def test_without_a_prefetcher_or_a_state(device, monkeypatch):
    module, *_ = parts_of("paper", device)
    seen = record(monkeypatch)
    warmup([module], 5, dead=True, id_dtype=torch.int32)
    warmed = set(seen)
    ids, dead = torch.arange(3, dtype=torch.int32, device=device), torch.arange(3, device=device) == 1
    cu = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    module(torch.randn(3, 2, 24, device=device), ids, cu_seqlens=cu, dead=dead)
    assert warmed == seen
    module(torch.randn(3, 2, 24, device=device), ids.long(), cu_seqlens=cu, dead=dead)
    assert warmed != seen


def test_with_a_cache(device, monkeypatch):
    """Steps below its least number of tokens go past it."""
    parts = parts_of("v41", device, cached=True)
    seen = record(monkeypatch)
    warmup([parts[0]], 9, prefetcher=parts[1], state=parts[2])
    warmed = set(seen)
    assert {"probe_cache_kernel", "hash_lookup_kernel"} <= {key[0] for key in warmed}
    steps(*parts, device, [1, 3, 4, 5, 8, 9])
    assert not {key for key in seen if key not in warmed}


def test_with_projections(device, monkeypatch):
    """They are run too, at every length, for an engine's may be kernels; both sets of buffers have equal variants."""
    module, prefetcher, state = parts_of("v41", device, projecting=True)
    projected, project = [], module.project
    prefetcher._side.projections = [lambda rows, out: (projected.append(len(rows)), project(rows, out))] * 2
    seen = record(monkeypatch)
    warmup([module], 9, prefetcher=prefetcher, state=state)
    assert set(projected) == set(variant_lengths([module], 9, prefetcher))
    warmed = set(seen)
    steps(module, prefetcher, state, device, [1, 3, 9, 1, 1, 3])
    assert not {key for key in seen if key not in warmed}


@pytest.mark.parametrize("form", FORMS)
def test_lengths_take_every_variant(form, device):
    """Each length that a variant begins at, by comparing neighbours rather than by collecting."""
    module, prefetcher, _ = parts_of(form, device)
    lengths = variant_lengths([module], MAX_TOKENS, prefetcher)
    assert {1, 17, MAX_TOKENS} <= set(lengths)
    assert ({9, 17} <= set(lengths)) == bool(module.config.conv_kernel)
    module(torch.randn(1, 2, 24, device=device), torch.zeros(1, dtype=torch.int64, device=device))


def test_arguments(device):
    module, prefetcher, _ = parts_of("v41", device)
    module(torch.randn(1, 2, 24, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match=r"warmup: engrams must be Engram modules, got \['int'\]"):
        warmup([3], 8)
    module.table = None
    with pytest.raises(
        TypeError, match="warmup: engrams must have an EngramTable where there is no prefetcher, got No"
    ):
        warmup([module], 8)
    with pytest.raises(ValueError, match="warmup: max_tokens must be a positive int, got 0"):
        warmup([module], 0)
    with pytest.raises(ValueError, match="warmup: max_tokens must be at most prefetcher's 36, got 37"):
        warmup([module], 37, prefetcher=prefetcher)
    with pytest.raises(TypeError, match="warmup: id_dtype must be int32 or int64, got torch.int16"):
        warmup([module], 3, id_dtype=torch.int16)
