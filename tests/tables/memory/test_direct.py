"""Rows read from a file as they are asked for, with bounded memory: the same bits as a loaded table's, and what fails.

Each test runs with io_uring, where this machine has it, and with threads.
"""

import errno
import os
import re
import threading

import numpy as np
import pytest
import torch

from engram_kernels import EngramTable, NgramCache, hash_lookup, lookup
from engram_kernels.tables import files as table_files
from engram_kernels.tables.memory import direct, reads
from engram_kernels.tables.memory.direct import LEAST, DirectRows, Part
from engram_kernels.tables.memory.mapped_files import MappedFile
from engram_kernels.testing import tables
from tests.ops.test_hashing import ragged, small_plan
from tests.ops.test_rows import ids_around
from tests.tables.memory.test_reads import ring_or_skip
from tests.tables.test_staging import ROWS as STAGED_ROWS
from tests.tables.test_staging import LateRuntime, fetched, right

ROWS = 5000


@pytest.fixture(params=["io_uring", "threads"])
def way(request, monkeypatch):
    """How pages are read; a queue of 8 reads, which every gather fills several times."""
    if request.param == "io_uring":
        ring_or_skip().close()
        monkeypatch.setattr(direct, "reader", lambda: reads.Ring(8))
    else:
        monkeypatch.setattr(direct, "reader", lambda: reads.Threads(3))
    return request.param


@pytest.fixture
def saved(tmp_path):
    """``saved(format, width)``: (file, its table in memory)."""

    def save(name, width, rows=ROWS):
        table = tables.cpu_table(rows, width, name)
        return table.save_safetensors(tmp_path / "table.safetensors"), table

    return save


def opened(path, table, more=0, placement="cpu", **options):
    scales = table.rows * table.format.scale_bytes(table.width)
    options |= dict(mapped=True, memory_bytes=LEAST + scales + more)
    return EngramTable.from_safetensors(path, placement=placement, **options)


def same(found, wanted):
    if isinstance(wanted, tuple):
        return all(
            one is other if other is None else same(one, other) for one, other in zip(found, wanted, strict=True)
        )
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (found, wanted)))


FORMATS = [
    ("float32", 12),  # 48 bytes: rows across the border of two pages
    ("float64", 1024),  # two pages each
    ("bfloat16", 80),
    ("e4m3", 256),
    ("e4m3_ue8m0", 96),
    ("mxfp4", 160),
    ("nvfp4", 160),
]


@pytest.mark.parametrize(("name", "width"), FORMATS)
def test_rows_are_those_of_the_file(way, saved, name, width):
    """Ids of every kind, several times, with what the first call left in the cache."""
    path, whole = saved(name, width)
    with opened(path, whole) as table:
        for dtype in (torch.int64, torch.int32):
            ids = ids_around(ROWS, (70, 9), dtype=dtype)
            for options in (dict(), dict(out_format="storage")):
                assert same(lookup(table, ids, **options), lookup(whole, ids, **options))
        nothing = torch.tensor([[-1, ROWS]])
        assert same(lookup(table, nothing), lookup(whole, nothing))
        assert same(lookup(table, nothing[:0]), lookup(whole, nothing[:0]))


@pytest.mark.parametrize("name", ["bfloat16", "e4m3", "nvfp4"])
def test_hash_lookup(way, saved, tmp_path, name):
    """Layers of which one is read from its file; as values, as stored, with an n-gram cache."""
    plan = small_plan()
    loaded = [tables.cpu_table(rows, 32, name, seed) for seed, rows in enumerate(plan.rows_per_layer)]
    path = loaded[1].save_safetensors(tmp_path / "layer.safetensors")
    token_ids, *_ = ragged(plan.vocab_size)
    with opened(path, loaded[1]) as table:
        mixed = [loaded[0], table, *loaded[2:]]
        for options in (dict(), dict(out_format="storage")):
            wanted = hash_lookup(token_ids, plan, loaded, **options)
            assert same(hash_lookup(token_ids, plan, mixed, **options), wanted)
        caches = [NgramCache(plan, each, entries=64, min_tokens=0) for each in (loaded, mixed)]
        for cache, each in zip(caches, (loaded, mixed), strict=True):
            hash_lookup(token_ids, plan, each, cache=cache)
        assert caches[0].stats().hits == caches[1].stats().hits


def test_staged_blocks_take_rows_from_the_file(way, saved):
    """What a kernel finds in a staged block; an id outside takes any row, which its local id hides."""
    path, whole = saved("e4m3_ue8m0", 96, STAGED_ROWS)
    parts = [part.view(torch.uint8).numpy() for part in (whole.weight, whole.scale)]
    ids = ids_around(STAGED_ROWS, (100,))
    with opened(path, whole) as table:
        assert right(fetched(LateRuntime(), ids, [table.direct, parts[1]], slots=2, slot_bytes=2048), ids, parts)


def test_the_cache_holds_what_comes_again(way, saved):
    """Pages are read once where memory has room for all rows, and again where it has not."""
    path, whole = saved("e4m3", 256)
    ids = torch.arange(ROWS)[:, None]
    with opened(path, whole) as table:
        for _ in range(2):
            assert same(lookup(table, ids), lookup(whole, ids))
        counts = table.metrics()
        pages = -(-ROWS * 256 // 4096)
        assert counts["file_pages"] <= 1.5 * pages and counts["file_rows"] == 2 * ROWS
        assert counts["file_distinct"] == 2 * ROWS and counts["file_hits"] >= 0.95 * ROWS
    rows = table_of_few(path, whole)
    found = np.empty((ROWS, 256), dtype=np.uint8)
    for _ in range(2):
        rows.gather(ids[:, 0].numpy(), found)
        assert np.array_equal(found, whole.weight.view(torch.uint8).numpy())
    assert rows.cached_rows == 8 and rows.hits <= 8 * 2
    rows.close()


def table_of_few(path, whole):
    """Rows of a file with a cache of one set."""
    mapped = EngramTable.from_safetensors(path, placement="cpu", mapped=True)
    (file,) = mapped.files
    return DirectRows([Part(file, 4096, whole.rows)], 256, 0)


def test_neighbours_share_a_page(way, saved):
    path, whole = saved("e4m3", 256)
    with opened(path, whole) as table:
        lookup(table, torch.arange(16)[:, None])
        assert table.metrics()["file_pages"] == 1
        lookup(table, torch.tensor([[16, 17], [31, 16]]))
        assert table.metrics()["file_pages"] == 2


@pytest.mark.parametrize(("name", "width"), FORMATS)
def test_parts_in_several_files(way, tmp_path, name, width):
    """Rows that are parts of a checkpoint, whatever their files are called and wherever they begin."""
    whole = tables.cpu_table(ROWS, width, name)
    whole.save_safetensors(tmp_path, shard_bytes=whole.nbytes // 5)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    ids = ids_around(ROWS, (90, 4))
    with opened(tmp_path, whole) as table:
        assert len(table.files) > 4
        for options in (dict(), dict(out_format="storage")):
            assert same(lookup(table, ids, **options), lookup(whole, ids, **options))
        every = torch.arange(ROWS)[:, None]
        assert same(lookup(table, every), lookup(whole, every))
        last = max(table.files, key=lambda file: file.path)
        os.truncate(last.path, os.stat(last.path).st_size // 2)
        with pytest.raises(ValueError, match=f"{last.path} shrank"):
            lookup(table, ids)


def test_rows_are_read_ahead(way, saved, monkeypatch):
    """prefetch() returns while the drive has not answered; the gather that follows waits, and reads nothing more."""
    path, whole = saved("e4m3", 256)
    ids = torch.tensor([[-1, 7], [ROWS - 1, 7], [ROWS, 300]])
    with opened(path, whole) as table:
        lookup(table, torch.tensor([[4000]]))
        read, answer = table.direct._reader.read, threading.Event()

        def late(*arguments):
            assert answer.wait(60)
            return read(*arguments)

        monkeypatch.setattr(table.direct._reader, "read", late)
        table.prefetch(ids)
        assert table.metrics()["file_pages"] == 1
        answer.set()
        assert same(lookup(table, ids), lookup(whole, ids))
        counts = table.metrics()
        assert counts["file_pages"] == 4 and counts["file_prefetched"] == counts["file_hits"] == 3
        table.prefetch(torch.tensor([], dtype=torch.int32))
    whole.prefetch(ids)  # in memory: nothing to do
    with pytest.raises(ValueError, match="EngramTable.prefetch: the table is closed"):
        table.prefetch(ids)


def test_reading_ahead_counts_as_no_use(way, saved):
    """A row that was read ahead and asked for once stays no longer than one that was asked for once."""
    path, whole = saved("e4m3", 256)
    ahead, plain = (table_of_few(path, whole) for _ in range(2))
    found = np.empty((1, 256), dtype=np.uint8)
    for row in np.random.default_rng(0).integers(0, 20, 200):
        ids = np.array([row])
        ahead.prefetch(ids)
        ahead._reading_ahead[1].submit(lambda: None).result()
        for each in (ahead, plain):
            each.gather(ids, found)
            assert np.array_equal(found[0], whole.weight.view(torch.uint8)[row].numpy())
    assert ahead.hits == 200 and plain.hits < 150
    assert abs(ahead.prefetched - (200 - plain.hits)) < 20  # its clock runs twice as fast
    ahead.close(), plain.close()


def test_a_read_ahead_that_fails_is_left_to_the_lookup(way, saved, monkeypatch):
    path, whole = saved("e4m3", 256)
    with opened(path, whole) as table:
        lookup(table, torch.tensor([[0]]))
        read = table.direct._reader.read
        monkeypatch.setattr(table.direct._reader, "read", lambda *given: np.full(len(given[1]), -errno.EIO))
        table.prefetch(torch.tensor([1]))
        table.direct._reading_ahead[1].submit(lambda: None).result()
        monkeypatch.setattr(table.direct._reader, "read", read)
        assert same(lookup(table, torch.tensor([[1, 2]])), lookup(whole, torch.tensor([[1, 2]])))


def test_more_rows_than_the_buffer_and_a_batch_hold(way, saved, monkeypatch):
    monkeypatch.setattr(direct, "_BUFFER_PAGES", 16)
    monkeypatch.setattr(direct, "_WORK", 300_000)
    path, whole = saved("float32", 12)
    ids = torch.randint(0, ROWS, (700, 3))
    with opened(path, whole) as table:
        assert same(lookup(table, ids), lookup(whole, ids))


def test_without_direct_io_the_page_cache_is_given_back(way, saved, monkeypatch):
    reopened, given_back = MappedFile.reopened, []
    monkeypatch.setattr(MappedFile, "reopened", lambda self: (reopened(self)[0], False))
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: given_back.append(arguments[-1]))
    path, whole = saved("bfloat16", 80)
    ids = ids_around(ROWS, (70, 9))
    with opened(path, whole) as table:
        assert same(lookup(table, ids), lookup(whole, ids))
    assert os.POSIX_FADV_DONTNEED in given_back


def test_memory_is_bounded(way, saved):
    """What a table holds in the end is what it was given; 10 gathers more take nothing more."""
    rows = 60_000
    path, whole = saved("e4m3", 1024, rows)
    with opened(path, whole, 10 << 20) as table:
        kept = table.direct._kept.nbytes + sum(
            part.nbytes for part in (table.direct._cache.keys, table.direct._cache.stamps)
        )
        assert 10 << 20 <= kept <= LEAST + (10 << 20) and table.direct.cached_rows < rows
        for _ in range(10):
            lookup(table, torch.randint(0, rows, (500, 8)))
        assert table.direct._kept.nbytes <= kept


def test_the_cache_takes_memory_as_rows_come(way, saved):
    """Not a huge page for each: the first call would have most of them zeroed, and take as long as all that follow."""
    rows = 60_000
    path, whole = saved("e4m3", 1024, rows)
    with opened(path, whole, 40 << 20) as table:
        lookup(table, torch.randint(0, rows, (300, 1)))
        begin = table.direct._kept.ctypes.data
        with open("/proc/self/smaps") as lines:
            text = lines.read()
        resident = re.search(rf"^{begin:x}-.*?^Rss: +(\d+) kB", text, re.M | re.S)
        assert resident is not None and 0 < int(resident[1]) << 10 <= 2 * 300 * 4096


def test_a_fork_has_a_queue_of_its_own(way, saved):
    """torch's threads do not survive a fork: what is compared is what the table reads by itself."""
    path, whole = saved("e4m3", 256)
    ids, wanted = np.arange(0, ROWS, 7), whole.weight.view(torch.uint8).numpy()[::7]
    with opened(path, whole) as table:
        found = np.empty((len(ids), 256), dtype=np.uint8)
        table.direct.gather(ids[:50], found[:50])
        child = os.fork()
        if child == 0:
            table.direct.gather(ids, found)
            os._exit(0 if np.array_equal(found, wanted) else 1)
        table.direct.gather(ids, found)
        assert np.array_equal(found, wanted)
        assert os.waitpid(child, 0)[1] == 0


def test_a_file_that_shrinks_is_an_error(way, saved):
    path, whole = saved("e4m3", 256)
    with opened(path, whole) as table:
        os.truncate(path, 4096 + ROWS * 128)
        with pytest.raises(ValueError, match="shrank to"):
            lookup(table, torch.tensor([[ROWS - 1]]))
        with pytest.raises(ValueError, match="shrank to"):
            table.direct.gather(np.array([ROWS - 1]), np.empty((1, 256), dtype=np.uint8))


def test_a_file_that_is_replaced_stays_what_it_was(way, saved):
    path, whole = saved("e4m3", 256)
    ids = torch.arange(ROWS)[:, None]
    wanted = lookup(whole, ids)
    with opened(path, whole) as table:
        saved("e4m3", 256)
        assert same(lookup(table, ids), wanted)


def test_a_disk_that_fails_is_an_error(way, saved, monkeypatch):
    """The errno, the file and the place; the next gather reads again."""
    path, whole = saved("e4m3", 256)
    with opened(path, whole) as table:
        lookup(table, torch.tensor([[0]]))
        read = table.direct._reader.read
        monkeypatch.setattr(table.direct._reader, "read", lambda *given: np.full(len(given[1]), -errno.EIO))
        with pytest.raises(OSError, match="byte 4,096 cannot be read: Input/output error") as caught:
            lookup(table, torch.tensor([[1, 2]]))
        assert caught.value.errno == errno.EIO and caught.value.filename == str(path)
        monkeypatch.setattr(table.direct._reader, "read", read)
        assert same(lookup(table, torch.tensor([[1, 2]])), lookup(whole, torch.tensor([[1, 2]])))


def test_an_interrupt_leaves_no_key_without_its_row(way, saved, monkeypatch):
    """Ctrl-C when rows are known by their keys and not yet kept: the next lookup has the right ones."""
    path, whole = saved("e4m3", 256)
    ids = torch.arange(100)[:, None]
    with opened(path, whole) as table:
        cache = table.direct._cache
        keep = cache.keep

        def interrupted(group, keys):
            keep(group, keys)
            raise KeyboardInterrupt

        monkeypatch.setattr(cache, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lookup(table, ids)
        monkeypatch.setattr(cache, "keep", keep)
        assert same(lookup(table, ids), lookup(whole, ids))


def test_what_does_not_go_together_is_an_error(saved):
    path, whole = saved("e4m3_ue8m0", 96)
    scales = ROWS * 3
    for options, message in (
        (dict(memory_bytes=LEAST), "memory_bytes is for mapped=True"),
        (dict(mapped=True, memory_bytes=LEAST - 1), "memory_bytes must be"),
        (dict(mapped=True, memory_bytes=LEAST + scales - 1), f"at least {LEAST + scales:,}, {scales:,} of them for"),
    ):
        with pytest.raises(ValueError, match=message):
            EngramTable.from_safetensors(path, placement="cpu", **options)


def test_memory_that_is_not_there_is_an_error(saved, monkeypatch):
    """Before anything is read; what a small table cannot use is not asked for."""
    path, whole = saved("e4m3_ue8m0", 96)
    monkeypatch.setattr(table_files, "available_host_memory", lambda: 36_000_000)
    opened(path, whole, 1 << 40).close()
    monkeypatch.setattr(table_files, "available_host_memory", lambda: 30_000_000)
    with pytest.raises(
        MemoryError, match=r"memory_bytes=67,123,864 takes 3[\d,]+ bytes and 30,000,000 are available; give"
    ):
        opened(path, whole)


def test_such_a_table_is_not_written_to(saved):
    path, whole = saved("bfloat16", 80)
    rows = torch.zeros(1, 80, dtype=torch.bfloat16)
    with opened(path, whole) as table:
        for write in (
            lambda: table.write_rows(torch.tensor([1]), rows),
            lambda: table.overlay(torch.tensor([1]), rows),
            lambda: table.requires_row_grad_(),
            lambda: table.weight,
            lambda: table.save_safetensors(path),
        ):
            with pytest.raises(ValueError, match="memory_bytes="):
                write()


def test_torch_compile_is_told(saved):
    path, whole = saved("bfloat16", 80)
    with opened(path, whole) as table:
        with pytest.raises(Exception, match="torch.compile cannot hold"):
            torch.compile(lambda ids: lookup(table, ids), fullgraph=True, backend="eager")(torch.tensor([[1]]))
