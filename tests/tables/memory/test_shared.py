"""Placement "shared": one copy for several processes, its pages and registration, and what is left behind."""

import gc
import os

import pytest
import torch

from engram_kernels import EngramTable, lookup
from engram_kernels.tables.memory import allocation as table_memory
from engram_kernels.tables.memory import shared as shared_memory
from engram_kernels.tables.memory import shared_protocol
from engram_kernels.tables.memory.pages import HUGE_PAGE, POPULATE_WRITE, Pages, _advise
from engram_kernels.testing import tables
from tests.support.documents import Document
from tests.support.gpu.drivers import Accountant, FakeDriver, mapped_ranges
from tests.support.processes.forks import in_a_fork
from tests.support.processes.peers import Peer
from tests.support.processes.sharing import SHM, attach, file_of, forked_writer, made


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """A driver, where there is one, is the test's own, and so is a pool of huge pages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shared_protocol, "_free_huge_pages", lambda: 0)


@pytest.mark.parametrize("kind", ["bfloat16", "e4m3", "e4m3_ue8m0", "nvfp4"])
def test_one_writer_and_readers_that_wait(peers, shared_name, kind):
    """The reader attaches first and gets what was written meanwhile, in the same memory; the last one removes it."""
    weight, scale = tables.random_parts(3000, 64, kind)
    peers[0].start(f"t = EngramTable.attach({shared_name!r}, 3000, 64, {kind!r}, timeout=1800); result = t.rows")
    table = made(shared_name, (3000, 64, kind), scale=tables.TABLE_SCALE)
    table.weight.view(torch.uint8).copy_(weight.view(torch.uint8))
    if table.format.group:
        table.scale.copy_(scale)
    table.publish()
    assert peers[0].answer() == 3000
    read = "from engram_kernels import lookup; result = lookup(t, torch.tensor([0, 2999]), out_dtype=torch.float32)"
    expected = lookup(table, torch.tensor([0, 2999]), out_dtype=torch.float32)
    assert peers[0].run(f"{read}.nan_to_num(7.5).tolist()") == expected.nan_to_num(7.5).tolist()
    table.weight[2999] = 1.0
    assert peers[0].run("result = t.weight[2999].float().tolist()") == [1.0] * len(table.weight[0])
    assert peers[1].run(f"t = EngramTable.attach({shared_name!r}, 3000, 64, {kind!r}, timeout=0); t.close()") is None
    table.close()
    with attach(shared_name, (3000, 64, kind)) as late:  # the writer is gone, its table is not
        assert torch.equal(late.weight.view(torch.uint8)[:2999], weight.view(torch.uint8)[:2999])
        assert late.own_scale == (float(torch.tensor(tables.TABLE_SCALE)) if table.format.table_scale else None)
        assert file_of(shared_name).exists()
    assert peers[0].run("t.close()") is None
    assert not file_of(shared_name).exists()


def test_from_tensors_publishes(peers, shared_name):
    weight = torch.randn(100, 8)
    with EngramTable.from_tensors(weight, placement="shared", name=shared_name) as table:
        with pytest.raises(ValueError, match="EngramTable.publish: the table is published already"):
            table.publish()
        assert peers[0].run(
            f"result = EngramTable.attach({shared_name!r}, 100, 8, 'float32').weight.sum().item()"
        ) == float(weight.sum())
    peers[0].run("import gc; gc.collect()")


def test_a_program_that_ends_removes_its_table(shared_name):
    """Without closing it: what it holds goes at exit. Killed, its reader's hold keeps the table for others."""
    peer = Peer().wait_ready()
    peer.run(f"t = EngramTable.from_tensors(torch.ones(50, 8), placement='shared', name={shared_name!r})")
    assert file_of(shared_name).exists()
    peer.end()
    assert not file_of(shared_name).exists()
    with forked_writer(shared_name, publish=True):
        kept = attach(shared_name)
    with attach(shared_name):
        kept.close()


def test_pages_are_there_and_collapsed(shared_name):
    """All of them from the start, reported to progress; huge once it is published, or with the reason why not."""
    calls = []
    with made(shared_name, (40_000, 256, "e4m3_ue8m0"), progress=lambda *call: calls.append(call)) as table:
        nbytes = 40_000 * 264
        assert calls[-1] == (table._mapping.nbytes,) * 2 and nbytes <= calls[-1][0] < nbytes + 4096
        assert table.memory_report().resident >= nbytes
        assert os.stat(file_of(shared_name)).st_blocks * 512 >= nbytes
        table.weight.view(torch.uint8).copy_(torch.arange(256, dtype=torch.uint8))
        table.publish(progress=lambda *call: calls.append(call))
        report = table.memory_report()
        assert report.huge == 10 << 20 or "huge pages" in report.warnings[0]
        assert (table.weight.view(torch.uint8) == torch.arange(256, dtype=torch.uint8)).all()
        with attach(shared_name, (40_000, 256, "e4m3_ue8m0")) as reader:
            assert reader.weight.view(torch.uint8)[39_999, 7] == 7


def test_registration_comes_with_publishing_and_attaching(shared_name, monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(table_memory, "_driver", lambda: driver)
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    # In small pages, as where no huge one was to be had when the table was made.
    monkeypatch.setattr(Pages, "back", lambda _, *part: _advise(*part, POPULATE_WRITE))
    held, original = [], Pages.collapse
    monkeypatch.setattr(Pages, "collapse", lambda *call: held.append(len(driver.held)) or original(*call))
    with made(shared_name, (40_000, 256, "float32")) as large:
        large.publish()
        assert held == [0]  # pinned pages could not move any more
    driver.released.clear()
    with made(shared_name) as table:
        with pytest.raises(ValueError, match=r"^op: tensors on cuda:0 need a registered \(published\) shared table"):
            table.check_readable_on(gpu, "op")
        table.publish()
        table.check_readable_on(gpu, "op")
        with attach(shared_name) as reader:
            reader.check_readable_on(other, "op")
            assert reader.memory_report().chunks == table.memory_report().chunks == 1
            assert reader.weight.data_ptr() != table.weight.data_ptr() and len(driver.held) == 2
        assert len(driver.held) == 1
    assert driver.held == {} and len(driver.released) == 2


def test_two_tables_over_one_file(shared_name):
    """Each holds it: the first to close leaves the other what it reads."""
    with made(shared_name) as table:
        table.weight.view(torch.uint8).fill_(0x38)
        table.scale.fill_(127)
        table.publish()
        first, second = attach(shared_name), attach(shared_name)
    first.close()
    assert file_of(shared_name).exists() and lookup(second, torch.tensor([2999])).eq(1).all()
    second.close()


def test_a_fork_reads_and_removes_nothing(shared_name):
    """Shared memory stays shared; a fork that closes or ends leaves file and locks to its parent."""
    with made(shared_name) as table:
        table.publish()

        def child():
            table.weight.view(torch.uint8)[5] = 9
            table.close()
            return file_of(shared_name).exists()

        assert in_a_fork(child)
        assert (table.weight.view(torch.uint8)[5] == 9).all() and file_of(shared_name).exists()
        with pytest.raises(FileExistsError):
            made(shared_name)


def test_many_tables_leak_nothing(shared_name, monkeypatch):
    driver = Accountant()
    monkeypatch.setattr(table_memory, "_driver", lambda: driver)
    monkeypatch.setattr(shared_memory, "ensure_huge", lambda *_: None)  # reads smaps, 10 ms each time
    made(shared_name).close()
    gc.collect()
    ranges, files = len(mapped_ranges()), len(os.listdir("/proc/self/fd"))
    for round in range(100):
        table = made(shared_name)
        table.publish()
        reader = attach(shared_name)
        with pytest.raises(FileExistsError):
            made(shared_name)
        with pytest.raises(ValueError):
            attach(shared_name, (3001, 64, "e4m3_ue8m0"))
        for held in (table, reader):
            if round % 2:
                held.close()
        del table, reader, held
        assert not file_of(shared_name).exists()
    assert driver.held == {} and len(driver.released) == 200
    assert len(mapped_ranges()) <= ranges + 8 and len(os.listdir("/proc/self/fd")) == files


def test_hugetlbfs_is_taken_where_it_has_room(shared_name, monkeypatch):
    """A folder of /dev/shm stands for a mount with a pool of 8 MiB: what fits lies there, and is found there."""
    pool = SHM / f"pool-{os.getpid()}"
    pool.mkdir()
    monkeypatch.setattr(shared_protocol, "_folders", lambda: iter([pool, SHM]))
    monkeypatch.setattr(shared_protocol, "_free_huge_pages", lambda: 8 << 20)
    try:
        with made(shared_name) as table:
            assert [path.name for path in pool.iterdir()] == [f"engram-{shared_name}"]
            table.publish()
            with attach(shared_name) as reader:
                assert reader.rows == 3000
            monkeypatch.setattr(shared_protocol, "_free_huge_pages", lambda: 0)
            with pytest.raises(FileExistsError):  # though it would go to /dev/shm now
                made(shared_name)
        assert not list(pool.iterdir())
        with made(shared_name):
            assert file_of(shared_name).exists() and not list(pool.iterdir())
    finally:
        pool.rmdir()


def test_hugetlbfs_itself(shared_name, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folders = [folder for folder in shared_protocol._folders() if folder != SHM]
    if not folders or shared_protocol._free_huge_pages() < 8 << 20:
        pytest.skip("needs a hugetlbfs mount that this user can write to, and 4 free huge pages")
    with made(shared_name) as table:
        assert (folders[0] / f"engram-{shared_name}").exists()
        table.weight.view(torch.uint8).fill_(3)
        table.publish()
        report = table.memory_report()
        assert report.huge == report.resident >= table.nbytes and not report.warnings
        with attach(shared_name) as reader:
            assert (reader.weight.view(torch.uint8) == 3).all()
    assert not (folders[0] / f"engram-{shared_name}").exists()


def test_free_huge_pages_are_what_the_kernel_says(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(shared_protocol, "_HUGETLB", tmp_path)
    assert shared_protocol._free_huge_pages() == 0
    (tmp_path / "free_hugepages").write_text("7\n")
    (tmp_path / "resv_hugepages").write_text("2\n")
    assert shared_protocol._free_huge_pages() == 5 * HUGE_PAGE


def test_the_documents_example():
    """The block of docs/host_memory.md that takes several processes, in this one."""
    (block,) = [each for each in Document("docs/host_memory.md").blocks() if ".attach(" in each]
    space = dict(EngramTable=EngramTable, lookup=lookup, torch=torch)
    exec(block.replace('"layer1"', f'"document-{os.getpid()}"'), space)
    space["reader"].close()
