"""Worlds of real processes under torch.distributed with Gloo, which run functions of tests/support/rank_cases.py.

Those of another file there are called by "file.function".

Ranks are forked from one server process that has imported torch and the package once, and has never computed anything:
a world of eight starts in less than a second.
"""

import importlib
import multiprocessing
import os
import time
import traceback
from datetime import timedelta

from .patience import HANG


class World:
    """``size`` processes, each with a connection to this one; a rank's case that fails leaves its text."""

    def __init__(self, size, folder, timeout=HANG):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.rank_cases"])
        self.size, self.processes, self.connections = size, [], []
        store = str(folder / f"store-{size}-{time.monotonic_ns()}")
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank, size, store, timeout), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def start(self, case, *args, **kwargs):
        """Send ``case`` to all ranks; of arguments in :class:`Each` a rank gets its own."""
        for rank, connection in enumerate(self.connections):
            own = [value.of(rank) if isinstance(value, Each) else value for value in args]
            connection.send((case, own, kwargs))

    def answers(self, ranks=None):
        """[(whether it worked, result or error's text)] of all ranks, or of some."""
        ends, found = time.monotonic() + HANG, []
        for rank in range(self.size) if ranks is None else ranks:
            assert self.connections[rank].poll(max(0.0, ends - time.monotonic())), f"no answer from rank {rank}"
            try:
                found.append(self.connections[rank].recv())
            except EOFError:
                found.append((False, "the process is gone"))
        return found

    def run(self, case, *args, **kwargs):
        """Results of all ranks; AssertionError where one failed."""
        self.start(case, *args, **kwargs)
        answers = self.answers()
        failures = [f"rank {rank}: {text}" for rank, (worked, text) in enumerate(answers) if not worked]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def errors(self, case, *args, **kwargs):
        """The text of the last line of every rank's error; AssertionError where a rank had none."""
        self.start(case, *args, **kwargs)
        answers = self.answers()
        assert not any(worked for worked, _ in answers), answers
        return [text.strip().splitlines()[-1] for _, text in answers]

    def close(self):
        for process, connection in zip(self.processes, self.connections, strict=True):
            connection.close()
            process.kill()
        for process in self.processes:
            process.join(HANG)


class Each:
    """A value for each rank."""

    def __init__(self, values):
        self.of = list(values).__getitem__


def serve(connection, rank, size, store, timeout):
    """A rank: cases until the connection closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = dict(store=dist.FileStore(store, size), rank=rank, world_size=size)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **options)
    while True:
        try:
            case, args, kwargs = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            file, _, function = case.rpartition(".")
            cases = importlib.import_module(f"{__package__}.{file or 'rank_cases'}")
            answer = True, getattr(cases, function)(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
