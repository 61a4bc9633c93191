"""Placement "staged": the ring of pinned slots, on a runtime that copies as late as it may, and what kernels then read.

On a GPU the same tests run on its streams.
"""

import threading

import numpy as np
import pytest
import torch

from engram_kernels import EngramTable, hash_lookup, lookup, ngram_hash
from engram_kernels.ops.row_kernels.output import make_view_out
from engram_kernels.tables import staging
from engram_kernels.tables.staging import StagingRing, StreamRuntime, stage
from engram_kernels.testing import tables
from tests.ops.test_hash_rows import parts_of, wanted
from tests.ops.test_hashing import oracle, ragged, small_plan
from tests.ops.test_rows import ids_around, truncating
from tests.support.launches import launch_layers, launch_lookup

ROWS = 301


class LateRuntime:
    """Copies at the last moment that order allows: a slot that is written before its event is waited for shows."""

    def __init__(self):
        self.waiting, self.done, self.blocks = [], 0, []

    def pinned(self, nbytes):
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def block(self, nbytes):
        self.blocks.append(torch.full((nbytes,), 0xA5, dtype=torch.uint8))
        return self.blocks[-1]

    def copy(self, target, source):
        assert len(target) == len(source)
        self.waiting.append((target, source))

    def event(self):
        return Event(self, len(self.waiting))

    def finish(self):
        self.copy_until(len(self.waiting))

    def copy_until(self, end):
        for target, source in self.waiting[self.done : end]:
            target.copy_(source)
        self.done = max(self.done, end)


class Event:
    def __init__(self, runtime, end):
        self.runtime, self.end = runtime, end

    def synchronize(self):
        self.runtime.copy_until(self.end)

    def query(self):
        return self.runtime.done >= self.end


def sources_of(weight, scale):
    groups = [scale] if isinstance(scale, torch.Tensor) else []
    return [part.view(torch.uint8).numpy() for part in (weight, *groups)]


def fetched(runtime, ids, sources, **options):
    """What a kernel would find at the addresses it is given: (local ids, rows, scales or None)."""
    ring = StagingRing(runtime, **options)
    descriptor, local = ring.fetch(sources, ids.numpy(), ROWS, 7, 2)
    ring.close()
    block = runtime.blocks[-1]
    rows_at, scales_at, count, bits = descriptor[0].tolist()
    assert (count, bits) == (len(ids), 7) and rows_at % 16 == 0 and scales_at % 8 == 0
    found = [local]
    for at, source in zip((rows_at, scales_at), sources, strict=False):
        width = source.shape[1]
        found.append(block[at - block.data_ptr() :][: count * width].view(count, width))
    return found


def right(found, ids, sources):
    inside = (ids >= 0) & (ids < ROWS)
    local, *parts = found
    expected = torch.where(inside, torch.arange(len(ids)), -1)
    stored = [torch.from_numpy(source)[ids[inside].long()] for source in sources]
    equal = all(torch.equal(part[inside], rows) for part, rows in zip(parts, stored, strict=True))
    return equal and torch.equal(local, expected.int())


@pytest.mark.parametrize("slot_bytes", [1300, 2048, 1 << 16])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_slots_are_reused_after_their_copies(slots, slot_bytes, count):
    """Slots of one row and of all rows; more rows than all slots hold, several times over."""
    sources = sources_of(*tables.random_parts(ROWS, 256, "e4m3_ue8m0"))
    ids = ids_around(ROWS, (max(count, 8),))[:count]
    assert right(fetched(LateRuntime(), ids, sources, slots=slots, slot_bytes=slot_bytes), ids, sources)


@pytest.mark.parametrize("broken", ["event", "finish"])
def test_the_runtime_shows_what_is_not_ordered(monkeypatch, broken):
    """Without waiting for events a slot is overwritten, without the last wait the kernel reads what was there."""
    sources = sources_of(*tables.random_parts(ROWS, 256, "e4m3_ue8m0"))
    ids = torch.arange(100)
    if broken == "event":
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
    else:
        monkeypatch.setattr(LateRuntime, "finish", lambda self: None)
    ring = StagingRing(LateRuntime(), slots=2, slot_bytes=2048)
    _, local = ring.fetch(sources, ids.numpy(), ROWS, 0, 2)
    block = ring._runtime.blocks[-1]
    at = staging._layout([4, 256, 8], 100)[0][1]
    rows = block[at:][: 100 * 256].view(100, 256)
    assert not torch.equal(rows, torch.from_numpy(sources[0])[:100])


def test_calls_from_several_threads_share_a_ring():
    sources = sources_of(*tables.random_parts(ROWS, 64, "bfloat16"))
    runtime = LateRuntime()
    ring, wrong = StagingRing(runtime, slots=2, slot_bytes=4096, threads=2), []

    def call(seed):
        ids = torch.randint(0, ROWS, (200,), generator=torch.Generator().manual_seed(seed))
        for _ in range(5):
            descriptor, _ = ring.fetch(sources, ids.numpy(), ROWS, 0, 16)
            (block,) = [b for b in list(runtime.blocks) if 0 <= int(descriptor[0, 0]) - b.data_ptr() < len(b)]
            rows = block[int(descriptor[0, 0]) - block.data_ptr() :][: 200 * 128].view(200, 128)
            if not torch.equal(rows, torch.from_numpy(sources[0])[ids]):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(runtime.blocks) == 20
    ring.close()


def test_a_slot_holds_a_row():
    with pytest.raises(ValueError, match="StagingRing: a slot must hold a row of 268 bytes, got 1200"):
        fetched(
            LateRuntime(), torch.arange(3), sources_of(*tables.random_parts(ROWS, 256, "e4m3_ue8m0")), slot_bytes=1200
        )


def test_an_error_in_a_gathering_thread_is_raised(monkeypatch):
    """After the other threads are done; the ring is as good as before."""
    sources, ids = sources_of(*tables.random_parts(ROWS, 64, "bfloat16")), torch.arange(100)
    runtime, original = LateRuntime(), np.take
    ring = StagingRing(runtime, slots=1, threads=2)

    def take(source, ids, **options):
        if ids[0] == 50:
            raise KeyError("second half")
        return original(source, ids, **options)

    monkeypatch.setattr(np, "take", take)
    with pytest.raises(KeyError, match="second half"):
        ring.fetch(sources, ids.numpy(), ROWS, 0, 2)
    monkeypatch.undo()
    descriptor, local = ring.fetch(sources, ids.numpy(), ROWS, 0, 2)
    rows = runtime.blocks[-1][int(descriptor[0, 0]) - runtime.blocks[-1].data_ptr() :][: 100 * 128].view(100, 128)
    assert torch.equal(rows, torch.from_numpy(sources[0])[:100]) and local.tolist() == ids.tolist()
    ring.close()


def test_an_error_leaves_no_copy_into_a_block_that_may_be_reused(monkeypatch):
    """The second slot's gather raises while the first one's copy is under way: the caller's stream waits for it."""
    sources, ids = sources_of(*tables.random_parts(ROWS, 64, "bfloat16")), np.arange(40)
    runtime, original = LateRuntime(), np.take

    def take(source, ids, **options):
        if ids[0] > 0:
            raise KeyError("second slot")
        return original(source, ids, **options)

    monkeypatch.setattr(np, "take", take)
    with pytest.raises(KeyError, match="second slot"):
        StagingRing(runtime, slots=2, slot_bytes=4096, threads=1).fetch(sources, ids, ROWS, 0, 2)
    assert 0 < len(runtime.waiting) == runtime.done


def test_without_pinned_memory_it_warns_once_and_works():
    class Bare(LateRuntime):
        def pinned(self, nbytes):
            raise RuntimeError("CUDA error: out of memory\nmore")

    sources = sources_of(*tables.random_parts(ROWS, 64, "bfloat16"))
    with pytest.warns(
        RuntimeWarning, match=r"staging without pinned memory, .* \(CUDA error: out of memory\)"
    ) as caught:
        assert right(fetched(Bare(), torch.arange(50), sources), torch.arange(50), sources)
    assert len(caught) == 1


def test_on_a_cpu_a_staged_table_reads_as_others_do():
    weight, scale = tables.random_parts(ROWS, 64, "e4m3_ue8m0")
    table = tables.place(weight, scale, torch.device("cpu"), "staged")
    assert table.weight.data_ptr() == weight.data_ptr()
    ids = ids_around(ROWS)
    expected = tables.rounded(tables.expected_values(weight, scale, ids), torch.float32)
    assert tables.same_bits(lookup(table, ids, out_dtype=torch.float32), expected, truncated=False)
    with EngramTable.empty(10**9, 256, "e4m3_ue8m0", placement="staged") as large:
        large.weight[10**9 - 1] = 1.0
        assert large.memory_report().resident <= 4 << 20 and not large.memory_report().chunks


def test_a_gpu_that_captures_cannot_wait_for_ids(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table = tables.place(*tables.random_parts(ROWS, 64, "bfloat16"), torch.device("cpu"), "staged")
    with pytest.raises(ValueError, match="^lookup: placement 'staged' reads row ids on the CPU, which no CUDA graph"):
        stage(table, torch.arange(3), "lookup")
    assert not table.rings


def test_closing_a_table_closes_its_ring():
    table = tables.place(*tables.random_parts(ROWS, 64, "bfloat16"), torch.device("cpu"), "staged")
    runtime = LateRuntime()
    table.rings[torch.device("cpu")] = ring = StagingRing(runtime, threads=2)
    ring.fetch(sources_of(table.weight, None), np.arange(100), ROWS, 0, 2)
    assert any("engram-staging" in thread.name for thread in threading.enumerate())
    table.close()
    assert not table.rings and not any("engram-staging" in thread.name for thread in threading.enumerate())


def small_ring(table, device):
    """The table with a ring that wraps many times."""
    runtime = StreamRuntime(device) if device.type == "cuda" else LateRuntime()
    table.rings[device] = StagingRing(runtime, slots=2, slot_bytes=4096, threads=2)
    return table


def looked_up(table, ids, out_dtype=None, storage=False):
    """lookup on a GPU; without one the launch that it would make."""
    if ids.is_cuda:
        return lookup(table, ids, out_dtype=out_dtype, out_format="storage" if storage else "values")
    local, view = stage(table, ids, "lookup")
    out = make_view_out(view, ids.shape, ids.device, out_dtype, storage)
    launch_lookup(local, view, out, storage, None)
    return out


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "width"), [("float32", 4), ("bfloat16", 80), ("e4m3", 160), ("e4m3_ue8m0", 256), ("nvfp4", 160)]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernel_reads_staged_rows(device, name, width, dtype):
    weight, scale = tables.random_parts(ROWS, width, name)
    table, ids = small_ring(tables.place(weight, scale, device, "staged"), device), ids_around(ROWS, (9, 6), dtype)
    expected = tables.expected_values(weight, scale, ids)
    for out_dtype in (torch.float32, torch.bfloat16):
        values = looked_up(table, ids.to(device), out_dtype)
        assert tables.same_bits(values, tables.rounded(expected, out_dtype), truncated=truncating(out_dtype))
    column = ids.to(device)[:, 2:3]  # strided, and few enough for one copy
    values = looked_up(table, column, torch.float32)
    assert tables.same_bits(values, tables.rounded(expected[:, 2:3], torch.float32), truncated=False)
    rows, scales = looked_up(table, ids.to(device), storage=True)
    inside = (ids >= 0) & (ids < ROWS)
    assert torch.equal(rows.cpu().view(torch.uint8)[inside], weight.view(torch.uint8)[ids[inside].long()])
    if name == "e4m3_ue8m0":
        assert torch.equal(scales.cpu()[inside], scale[ids[inside].long()]) and not scales.cpu()[~inside].any()


@pytest.mark.kernel
def test_kernel_reads_staged_rows_of_any_alignment(device):
    """A tensor of a checkpoint begins where its header ends."""
    weight, _ = tables.random_parts(ROWS, 64, "bfloat16")
    storage = torch.zeros(weight.nbytes + 2, dtype=torch.uint8)
    shifted = storage[2:].view(torch.bfloat16).view(ROWS, 64).copy_(weight)
    ids = torch.arange(ROWS, device=device)
    values = looked_up(small_ring(EngramTable.from_tensors(shifted, placement="staged"), device), ids)
    assert torch.equal(values.cpu(), weight)


@pytest.mark.kernel
@pytest.mark.parametrize("placements", [("staged", "staged"), ("staged", "host"), ("device", "staged")])
@pytest.mark.parametrize("name", ["e4m3_ue8m0", "bfloat16", "nvfp4"])
def test_kernel_hash_lookup_of_mixed_placements(device, placements, name):
    """Staged layers beside others, in one output; row ids come to the CPU once."""
    plan = small_plan()
    parts = parts_of(plan, 64, name)
    if device.type == "cpu":
        placements = ["cpu" if placement == "device" else placement for placement in placements]
    placed = [tables.place(*part, device, placement) for part, placement in zip(parts, placements, strict=True)]
    for table in placed:
        if table.placement == "staged":
            small_ring(table, device)
    ids, cu, history, dead = ragged()
    options = dict(cu_seqlens=cu.to(device), history=history.to(device), dead=dead.to(device))
    expected = wanted(parts, oracle(ids, plan, cu, history, dead), torch.float32)
    if device.type == "cuda":
        out = hash_lookup(ids.to(device), plan.to(device), placed, out_dtype=torch.float32, **options)
    else:
        row_ids = ngram_hash(ids, plan, **options)
        out = torch.empty(*expected.shape)
        launch_layers(row_ids, placed, out, False, 2)
    assert tables.same_bits(out, expected, truncated=False)
