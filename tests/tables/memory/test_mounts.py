"""Shared tables on hugetlbfs and on tmpfs with huge pages, mounted for the test and seen by it alone.

In a child's mount namespace, which takes root, as does the pool; skipped where the system refuses.
"""

import ctypes
import os
from pathlib import Path

import pytest
import torch

from engram_kernels import EngramTable
from engram_kernels.tables.memory import kept
from tests.faults.limits import in_child
from tests.support.checkpoints import save
from tests.support.processes.peers import Peer

ROWS, WIDTH = 40_000, 64  # 10 MB: five huge pages
NAME = f"mounts-{os.getpid()}"
POOL = Path("/proc/sys/vm/nr_hugepages")
_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


def _call(function, *arguments):
    if function(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mounted(mounts):
    """Mount (kind, folder, options) for this process and those it starts."""
    _call(_libc.unshare, _NEWNS)
    _call(_libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    for kind, folder, options in mounts:
        _call(_libc.mount, b"none", os.fsencode(folder), kind.encode(), 0, options.encode())


def _refusal(mounts):
    try:
        mounted(mounts)
    except OSError as error:
        return str(error)


@pytest.fixture
def mount(request, tmp_path):
    """(what to mount, the folder that tables go to then)."""
    pool = int(POOL.read_text()) if POOL.exists() else None
    mounts, folder = [("tmpfs", "/dev/shm", f"size=64m,huge={request.param}")], Path("/dev/shm")
    if request.param == "hugetlbfs":
        folder = tmp_path / "huge"
        folder.mkdir()
        mounts = [("tmpfs", "/dev/shm", "size=64m"), ("hugetlbfs", folder, "pagesize=2M")]
    if (reason := in_child(_refusal, mounts)) is not None:
        pytest.skip(f"mounts of its own are not to be had here: {reason}")
    try:
        if request.param == "hugetlbfs":
            try:
                POOL.write_text(str(pool + 16))
            except OSError as error:
                pytest.skip(f"the pool of huge pages cannot be set here: {error}")
            if int(POOL.read_text()) < pool + 16:
                pytest.skip("the system has no 16 huge pages left for the pool")
        yield mounts, folder
    finally:
        if request.param == "hugetlbfs":
            POOL.write_text(str(pool))


def life(mounts, folder, path):
    """Load, publish, keep, attach from a new process, free; what was seen on the way."""
    mounted(mounts)
    torch.cuda.is_available = lambda: False
    file = folder / f"engram-{NAME}"
    start = dict(placement="shared", name=NAME, keep=True)
    table = EngramTable.from_safetensors(path, **start)
    report = table.memory_report()
    seen = dict(there=file.exists(), huge=report.huge, resident=report.resident, notes=report.warnings)
    table.close()
    reader = Peer().wait_ready()
    try:
        call = f"EngramTable.from_safetensors({str(path)!r}, **{start})"
        seen["read"] = reader.run(f"t = {call}; result = [t.attached, t.weight[-1, -1].item(), t.weight.sum().item()]")
        seen["listed"] = [(each.path, each.pids == (reader.pid,)) for each in kept.list_shared()]
        EngramTable.free(NAME)
        seen["freed"] = not file.exists() and reader.run("result = t.weight[0, 0].item()") == 1
    finally:
        reader.end()
    other = EngramTable.empty(ROWS, WIDTH, "float32", placement="shared", name=NAME)  # not kept: it goes by itself
    other.publish()
    there = file.exists()
    other.close()
    seen["goes"] = there and not file.exists()
    return seen


@pytest.mark.parametrize("mount", ["hugetlbfs", "always", "advise", "never"], indirect=True)
def test_a_kept_table_on(mount, tmp_path, request):
    mounts, folder = mount
    path = save(tmp_path / "a.safetensors", {"embed.weight": torch.ones(ROWS, WIDTH)})
    seen = in_child(life, mounts, folder, path)
    assert seen["there"] and seen["read"] == [True, 1, ROWS * WIDTH] and seen["freed"] and seen["goes"]
    assert seen["listed"] == [(folder / f"engram-{NAME}", True)]
    assert seen["resident"] >= ROWS * WIDTH * 4
    # Of tmpfs the kernel may have none to give; that is said then.
    assert seen["huge"] >= 8 << 20 or (folder == Path("/dev/shm") and "huge pages" in seen["notes"][0]), seen
