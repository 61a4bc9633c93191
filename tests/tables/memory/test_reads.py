"""Many reads at once: by io_uring and by threads the same results, and what files and interrupts do to them."""

import errno
import os

import numpy as np
import pytest

from engram_kernels.tables.memory import reads


def ring_or_skip():
    try:
        return reads.Ring(8)
    except OSError as error:
        pytest.skip(f"this machine refuses io_uring: {error.strerror}")


def test_reads_report_each_for_itself(tmp_path):
    """Errors and short reads by the number of the read, in whichever order they come back."""
    (tmp_path / "file").write_bytes(bytes(range(256)) * 32)
    buffer = np.zeros(64 * 512, dtype=np.uint8)
    offsets = np.array([0, 8000, 512, 9000, 4096])
    with open(tmp_path / "file", "rb") as file, open(tmp_path / "file", "ab") as closed_to_reading:
        for each in (ring_or_skip(), reads.Threads(2)):
            found = each.read(file.fileno(), offsets, buffer, np.arange(5) * 512, 512)
            assert found.tolist() == [512, 192, 512, 0, 512]
            assert bytes(buffer[:512]) == bytes(range(256)) * 2 == bytes(buffer[2048:2560])
            found = each.read(closed_to_reading.fileno(), offsets, buffer, np.arange(5) * 512, 512)
            assert found.tolist() == [-errno.EBADF] * 5
            each.close()


@pytest.mark.parametrize("make", [ring_or_skip, lambda: reads.Threads(2)])
def test_files_of_each_read_and_work_meanwhile(tmp_path, make):
    """More reads than are under way at once; what is done meanwhile is done once, and its error ends the reads."""
    contents = [os.urandom(40 * 512), os.urandom(40 * 512)]
    for name, content in zip("ab", contents, strict=True):
        (tmp_path / name).write_bytes(content)
    each, buffer, done = make(), np.zeros(60 * 512, dtype=np.uint8), []
    with open(tmp_path / "a", "rb") as first, open(tmp_path / "b", "rb") as second:
        fds = np.array([first.fileno(), second.fileno()]).repeat(30)
        offsets, places = np.tile(np.arange(5, 35), 2) * 512, np.arange(60) * 512
        found = each.read(fds, offsets, buffer, places, 512, lambda: done.append(1))
        assert (found == 512).all() and done == [1]
        assert bytes(buffer) == b"".join(content[5 * 512 : 35 * 512] for content in contents)

        def fail():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            each.read(fds, offsets, buffer, places, 512, fail)
        assert (each.read(fds, offsets, buffer, places, 512) == 512).all()
    each.close()


def test_an_interrupt_leaves_no_read_under_way(tmp_path, monkeypatch):
    """Ctrl-C as results are taken: the buffer is nobody else's afterwards, and the queue goes on."""
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    ring, buffer = ring_or_skip(), np.zeros(1 << 20, dtype=np.uint8)
    take, calls = ring._take, []

    def interrupted(found):
        take(found)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ring, "_take", interrupted)
    places = np.arange(256) * 4096
    with open(tmp_path / "file", "rb") as file:
        with pytest.raises(KeyboardInterrupt):
            ring.read(file.fileno(), places, buffer, places, 4096)
        assert ring._under_way() == 0
        assert (ring.read(file.fileno(), places, buffer, places, 4096) == 4096).all()
    assert bytes(buffer) == (tmp_path / "file").read_bytes()


def test_where_the_kernel_refuses_a_ring_threads_read(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(reads.Ring, "_call", refuse)
    assert isinstance(reads.reader(), reads.Threads)
