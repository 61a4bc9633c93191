"""Real limits of the system: the size of a file, and in a forked child a small disk in a mount namespace of its own."""

import ctypes
import os
import pickle
import resource
import traceback
from contextlib import contextmanager

import pytest
import torch

_NEWNS, _NEWUSER, _MS_REC, _MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


def in_child(function, *arguments):
    """What ``function(*arguments)`` returns in a forked process, whose limits and mounts end with it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        torch.set_num_threads(1)  # threads of torch's do not come along
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        with open(write, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        worked, result = pickle.load(file)
    os.waitpid(child, 0)
    assert worked, result
    return result


@contextmanager
def file_size(limit):
    """No file may grow beyond ``limit`` bytes: EFBIG, since Python ignores the signal that comes with it."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def mount_disk(folder, size):
    """Put an empty disk of ``size`` bytes on ``folder``, seen by this process alone; needs no root. Ends with it."""
    user, group = os.getuid(), os.getgid()
    _call(_libc.unshare, _NEWUSER | _NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _call(_libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call(_libc.mount, b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def _call(function, *arguments):
    if function(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _can_mount(folder):
    try:
        mount_disk(folder, 65536)
        return None
    except OSError as error:
        return str(error)


@pytest.fixture
def small_disks(tmp_path):
    """Skips where the system lets nobody mount a disk in a namespace of its own, as some containers do."""
    reason = in_child(_can_mount, tmp_path)
    if reason is not None:
        pytest.skip(f"user and mount namespaces are not to be had here: {reason}")
