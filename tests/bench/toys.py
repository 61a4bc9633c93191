"""Toys for the tests of benchmarks: a clock, timers that wait for nothing, a case of three numbers, a machine."""

import torch

from bench.running import timing
from bench.running.cases import Case, Prepared

CPU = torch.device("cpu")
LIMIT = 1 << 25  # bytes of a table
ROOFS = dict(device_copy=4e12, zero_copy=50e9, copy_engine=52e9, empty=3e-6, round_trip=1e-6, host_bytes=LIMIT)
ROOFS |= dict(sweep=[dict(programs=32, width=16, tile=8192, rate=5e10)])
MACHINE = dict(gpu="NVIDIA Test", date="2026-01-12 10:00 UTC", text="data/austen_ids.npz", l2_bytes=0)
MACHINE |= dict(host_table_bytes=LIMIT, device_table_bytes=LIMIT)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeTimer:
    """Calls everything once and says that it took a millisecond; ``clock`` moves on by ``seconds`` a measurement."""

    kind = "fake"

    def __init__(self, clock=None, seconds=0.0):
        self.calls, self._clock, self._seconds = 0, clock or Clock(), seconds

    def measure(self, calls):
        return self.once(calls[:1])

    def once(self, calls):
        self.calls += 1
        self._clock.now += self._seconds
        for call in calls:
            call()
        return timing.Measurement.of([1e-3] * len(calls))


def ample():
    return timing.Budget(1e9)


def toy(name="toy", prepare=None, **changes):
    """A case that adds one to three numbers."""

    def three(bench):
        check = lambda result, index: None if torch.equal(result, torch.ones(3)) else "not one"  # noqa: E731
        return Prepared([lambda: torch.zeros(3) + 1] * 2, check, nbytes=24, **changes)

    return Case(op=name, model="v41", variant="", tokens=1, priority=0, prepare=prepare or three)
