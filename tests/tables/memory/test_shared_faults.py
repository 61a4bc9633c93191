"""Placement "shared": what each of several processes can do wrong is a clear error in bounded time."""

import gc
import os
import re
import time
import types
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramTable, lookup
from engram_kernels.tables.memory import allocation as table_memory
from engram_kernels.tables.memory import shared as shared_memory
from engram_kernels.tables.memory import shared_protocol
from engram_kernels.tables.memory.pages import HUGE_PAGE, Pages
from tests.support.gpu.drivers import FakeDriver, mapped_ranges
from tests.support.patience import HANG
from tests.support.processes.sharing import SHAPE, SHM, attach, file_of, forked_writer, made


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """A driver, where there is one, is the test's own, and so is a pool of huge pages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shared_protocol, "_free_huge_pages", lambda: 0)


class Clock:
    """Time that goes on while somebody sleeps, and only then."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_reader_waits_no_longer_than_it_said(shared_name, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(shared_memory, "time", clock)
    with pytest.raises(
        TimeoutError, match=f"^EngramTable.attach: there was no shared table '{shared_name}' after 0.2 s"
    ):
        attach(shared_name, timeout=0.2)
    with made(shared_name):
        expected = f"process {os.getpid()} had not published the table in {file_of(shared_name)} after 0.2 s"
        with pytest.raises(TimeoutError, match=expected):
            attach(shared_name, timeout=0.2)
    assert clock.now == pytest.approx(0.4)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", None])
def test_timeouts_are_checked(timeout):
    with pytest.raises(ValueError, match="EngramTable.attach: timeout must be a finite number of at least 0, got"):
        attach("x", timeout=timeout)


def test_a_writer_that_dies_while_readers_wait(peers, shared_name):
    with forked_writer(shared_name) as writer:
        for peer in peers:
            peer.start(f"EngramTable.attach({shared_name!r}, *{SHAPE}, timeout={HANG})")
        time.sleep(0.1)
    answers = [peer.answer() for peer in peers]
    # Not that their time is over. The first to notice removes the file, the other finds it gone.
    for answer in answers:
        assert re.match(f"WriterDied: EngramTable.attach: process {writer}.* died or gave up", answer)
    assert not file_of(shared_name).exists()


def test_a_writer_that_died_before_the_reader_came(shared_name):
    with forked_writer(shared_name):
        pass
    with pytest.raises(RuntimeError, match="died or gave up; the file is removed"):
        attach(shared_name, timeout=HANG)


def test_a_writer_that_gives_up_leaves_nothing(shared_name):
    with pytest.raises(KeyError), made(shared_name):
        raise KeyError
    assert not file_of(shared_name).exists()
    table = made(shared_name)
    del table
    gc.collect()
    assert not file_of(shared_name).exists()


def test_a_name_in_use_is_refused(peers, shared_name):
    """By another process or this one, filling or published; what a dead one left is not in use."""
    expected = f"^EngramTable.empty: {file_of(shared_name)} exists, and is a shared table in use"
    with forked_writer(shared_name):
        for _ in range(2):
            with pytest.raises(FileExistsError, match=expected):
                made(shared_name)
    with made(shared_name) as table:
        assert (
            peers[0]
            .run(f"EngramTable.empty(*{SHAPE}, placement='shared', name={shared_name!r})")
            .startswith("FileExistsError: EngramTable.empty:")
        )
        table.publish()
        with pytest.raises(FileExistsError, match=expected):
            made(shared_name)


def test_what_killed_processes_left_goes_with_the_next_table(shared_name):
    with forked_writer(f"{shared_name}-other", publish=True):
        assert file_of(f"{shared_name}-other").exists()
    with made(shared_name):
        assert not file_of(f"{shared_name}-other").exists()


@pytest.mark.parametrize(
    ("shape", "scale", "expected"),
    [
        ((3001, 64, "e4m3"), None, "must have rows 3001, got 3000"),
        ((3000, 32, "e4m3"), None, "must have width 32, got 64"),
        ((3000, 64, "e4m3_ue8m0"), None, "must have format e4m3_ue8m0, got e4m3"),
        ((3000, 64, "e4m3"), 0.5, "must have scale 0.5, got 0.1"),
    ],
)
def test_another_geometry_is_refused_at_once(shared_name, shape, scale, expected):
    """Even before it is published: waiting would not help."""
    with made(shared_name, (3000, 64, "e4m3"), scale=0.1) as table:
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^EngramTable.attach: {file_of(shared_name)} {expected}"):
                attach(shared_name, shape, timeout=HANG, scale=scale)
            if not shared_protocol.is_complete(table._mapping._fd):
                table.publish()
        with attach(shared_name, (3000, 64, "e4m3"), scale=0.1) as same:
            assert float(same.scale) == float(torch.tensor(0.1))


def test_files_that_are_none_of_ours(shared_name):
    path = file_of(shared_name)
    for content in (b"", b"engram", bytes(4 << 20)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^EngramTable.attach: {path} is no table of engram_kernels"):
            attach(shared_name, timeout=HANG)
        with pytest.raises(FileExistsError, match="none of this package's"):
            made(shared_name)
        assert path.read_bytes() == content
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="is no table of engram_kernels, or another user's"):
        attach(shared_name, timeout=HANG)
    path.unlink()


def test_other_versions_and_truncated_files(shared_name, monkeypatch):
    with made(shared_name) as table:
        table.publish()
        monkeypatch.setattr(shared_protocol, "_VERSION", 3)
        with pytest.raises(ValueError, match="has version 2 of the layout, this package reads 3"):
            attach(shared_name)
        monkeypatch.undo()
        os.truncate(file_of(shared_name), HUGE_PAGE + 5)
        with pytest.raises(ValueError, match="is truncated: 2,097,157 bytes"):
            attach(shared_name)


def test_a_file_that_shrinks_under_the_mapping_is_an_error(shared_name):
    """Reading on would end the process."""
    with made(shared_name) as table:
        table.publish()
        reader = attach(shared_name)
        os.truncate(file_of(shared_name), HUGE_PAGE + 4096)
        for broken in (table, reader):
            with pytest.raises(
                ValueError, match=f"^lookup: {file_of(shared_name)} shrank to 2,101,248 bytes while mapped"
            ):
                lookup(broken, torch.tensor([2999]))
            with pytest.raises(ValueError, match="shrank to 2,101,248 bytes"):
                _ = broken.weight
        reader.close()


@pytest.mark.parametrize("name_", ["", "a/b", "a b", "x" * 129, 7, None])
def test_names_are_checked(name_):
    for make in (lambda: made(name_), lambda: attach(name_)):
        with pytest.raises((ValueError, TypeError), match="placement 'shared' needs a name|name must be a text"):
            make()
    with pytest.raises(ValueError, match="placement 'shared' needs a name, and no other takes one, got 'x'"):
        EngramTable.empty(5, 8, "float32", placement="host", name="x")
    with pytest.raises(ValueError, match="EngramTable.publish: only placement 'shared' is published, got 'cpu'"):
        EngramTable.empty(5, 8, "float32", placement="cpu").publish()


def test_no_room(shared_name, monkeypatch):
    """Seen beforehand, and where others were faster by the reservation: an error now, not a SIGBUS later."""
    huge = (2**36, 256, "e4m3_ue8m0")
    with pytest.raises(RuntimeError, match=r"bytes do not fit in /dev/shm, [\d,]+ are free; enlarge it \(mount -o"):
        made(shared_name, huge)
    with monkeypatch.context() as unlimited:
        unlimited.setattr(os, "statvfs", lambda folder: types.SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))
        made(shared_name).close()
    monkeypatch.setattr(shared_protocol, "available_host_memory", lambda: 1 << 20)
    with pytest.raises(RuntimeError, match="4,194,304 bytes do not fit in host memory, 1,048,576 are free"):
        made(shared_name)
    monkeypatch.setattr(shared_protocol, "check_fits", lambda *_: None)
    monkeypatch.setattr(Pages, "fault_in", lambda *_, **__: "EFAULT")
    with pytest.raises(RuntimeError, match=r"do not fit in /dev/shm \((No space left on device|File too large)\), "):
        made(shared_name, huge)
    assert not file_of(shared_name).exists()
    monkeypatch.setattr(shared_protocol, "_SHM", Path("/no/such/folder"))
    with pytest.raises(RuntimeError, match="no shared memory can be made in /no/such/folder: No such file"):
        made(shared_name)


def test_a_refused_registration_undoes_what_it_began(shared_name, monkeypatch):
    driver = FakeDriver(refuse_at=0)
    monkeypatch.setattr(table_memory, "_driver", lambda: driver)
    with made(shared_name) as table:
        with pytest.raises(RuntimeError, match="the driver refused to register host memory"):
            table.publish()
        with pytest.raises(TimeoutError):  # nobody was let in
            attach(shared_name)
        driver.refuse_at = 1
        table.publish()
        ranges = len(mapped_ranges())
        with pytest.raises(RuntimeError, match="the driver refused to register host memory"):
            attach(shared_name)
        assert len(mapped_ranges()) <= ranges + 2
    assert driver.held == {} and not file_of(shared_name).exists()  # the reader's hold on the file went too


def test_two_writers_that_chose_different_folders_at_once(shared_name, monkeypatch):
    """Neither saw the other's file before it had its own name: the one in the later folder gives way."""
    pool = SHM / f"pool-{os.getpid()}"
    pool.mkdir()
    monkeypatch.setattr(shared_protocol, "_folders", lambda: iter([pool, SHM]))
    monkeypatch.setattr(shared_protocol, "_free_huge_pages", lambda: 0)
    original = os.link

    def late(source, target, **options):
        (pool / f"engram-{shared_name}").write_bytes(b"another's")
        original(source, target, **options)

    monkeypatch.setattr(os, "link", late)
    try:
        with pytest.raises(FileExistsError, match=str(pool)):
            made(shared_name)
        assert not file_of(shared_name).exists()
    finally:
        (pool / f"engram-{shared_name}").unlink()
        pool.rmdir()
