"""Calls of the operating system that fail, are cut short, or end the process, one at a time."""

import builtins
import fcntl
import os
from contextlib import contextmanager

#: What saves and loads call. Reading calls are among them: a disk fails there as well.
CALLS = [
    (os, name)
    for name in (
        "open",
        "ftruncate",
        "fchmod",
        "fstat",
        "pwrite",
        "pread",
        "preadv",
        "fsync",
        "rename",
        "unlink",
        "listdir",
    )
]
CALLS += [(os, "posix_fallocate"), (os, "link"), (fcntl, "flock"), (builtins, "open")]


@contextmanager
def striking(number, strike):
    """``strike(*arguments)`` is called ahead of call ``number`` of CALLS in the block; yields the names of all so far.

    A number of None strikes never, which counts the calls.
    """
    seen = []

    def struck(name, function):
        def call(*args, **kwargs):
            seen.append(name)
            if len(seen) - 1 == number:
                strike(*args)
            return function(*args, **kwargs)

        return call

    real = [getattr(owner, name) for owner, name in CALLS]
    for (owner, name), function in zip(CALLS, real, strict=True):
        setattr(owner, name, struck(name, function))
    try:
        yield seen
    finally:
        for (owner, name), function in zip(CALLS, real, strict=True):
            setattr(owner, name, function)


def failing(code):
    """Raises the error of a call; as the system's own it names a path that was given, and no descriptor."""

    def strike(*arguments):
        path = arguments[0] if arguments and isinstance(arguments[0], str | os.PathLike) else None
        raise OSError(code, os.strerror(code), *([] if path is None else [os.fspath(path)]))

    return strike


def descriptors():
    """{open descriptor: what it is open on} of this process."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # that of the listing
            pass
    return found
