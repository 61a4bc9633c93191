"""A Prefetcher over tables whose rows the CPU reads from files: start() does not wait for the drive, rows() does."""

import threading

import pytest
import torch

from engram_kernels import EngramTable, Prefetcher, hash_lookup
from engram_kernels.ops import hash_rows
from engram_kernels.tables.memory.direct import LEAST
from engram_kernels.testing import tables
from tests.ops.test_hashing import ragged, small_plan

WIDTH = 32


@pytest.fixture(params=["mapped", "memory_bytes"])
def files(request, tmp_path):
    """(plan, tables read from files, the same in memory)."""
    plan = small_plan()
    loaded = [tables.cpu_table(rows, WIDTH, "float32", seed) for seed, rows in enumerate(plan.rows_per_layer)]
    options = dict(placement="cpu", mapped=True, memory_bytes=LEAST if request.param == "memory_bytes" else None)
    paths = [each.save_safetensors(tmp_path / f"{layer}.safetensors") for layer, each in enumerate(loaded)]
    read = [EngramTable.from_safetensors(path, **options) for path in paths]
    yield plan, read, loaded
    for each in read:
        each.close()


class Drive:
    """Lookups of a table wait until it answers, as they come to rows that lie in files."""

    def __init__(self, monkeypatch):
        self.answers, self.asked, self.error = threading.Event(), threading.Event(), None
        found = hash_rows.rows_at_hand

        def late(*arguments):
            self.asked.set()
            assert self.answers.wait(60)
            if self.error is not None:
                raise self.error
            return found(*arguments)

        monkeypatch.setattr(hash_rows, "rows_at_hand", late)


@pytest.mark.parametrize("inference", [False, True])
def test_a_start_does_not_wait_for_the_drive(files, monkeypatch, inference):
    plan, read, loaded = files
    token_ids, *_ = ragged(plan.vocab_size)
    with torch.inference_mode(inference):
        prefetcher = Prefetcher(plan, read, 64, projections=[project] * 2, kv_width=WIDTH)
        drive = Drive(monkeypatch)
        prefetcher.start(token_ids)
        assert drive.asked.wait(60)
        drive.answers.set()
        wanted = hash_lookup(token_ids, plan, loaded)
        for layer in range(2):
            assert torch.equal(prefetcher.rows(layer), wanted[layer])
            assert torch.equal(prefetcher.kv(layer), wanted[layer].sum(-2))


def project(rows, out):
    out.copy_(rows.sum(-2))


def test_starts_follow_each_other(files):
    """Buffers are taken again once the thread is done with them; several starts in flight keep to themselves."""
    plan, read, loaded = files
    token_ids, *_ = ragged(plan.vocab_size)
    given = [token_ids.roll(shift) for shift in range(6)]
    plain = Prefetcher(plan, read, 64)
    for each in given:
        plain.start(each)
    assert torch.equal(plain.rows(1), hash_lookup(given[-1], plan, loaded)[1])
    several = Prefetcher(plan, read, 64, depth=2)
    before = several.start(given[0])
    for earlier, each in zip(given, given[1:], strict=False):
        started = several.start(each)
        assert torch.equal(before.rows(0), hash_lookup(earlier, plan, loaded)[0])
        before.release()
        before = started


def test_what_fails_in_the_thread_is_an_error_of_its_readers(files, monkeypatch):
    plan, read, loaded = files
    token_ids, *_ = ragged(plan.vocab_size)
    prefetcher, drive = Prefetcher(plan, read, 64), Drive(monkeypatch)
    drive.error = OSError("byte 4,096 cannot be read")
    prefetcher.start(token_ids)
    drive.answers.set()
    for _ in range(2):
        with pytest.raises(OSError, match="byte 4,096 cannot be read"):
            prefetcher.rows(0)
    prefetcher.release()
    drive.error = None
    prefetcher.start(token_ids)
    assert torch.equal(prefetcher.rows(0), hash_lookup(token_ids, plan, loaded)[0])


def test_tables_in_memory_need_no_thread(files):
    plan, _, loaded = files
    assert Prefetcher(plan, loaded, 64)._thread is None
