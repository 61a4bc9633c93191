"""A GPU's streams, events and graphs as clocks: what code for them alone does, and how long it would take."""

import contextlib
import types

import torch


class Simulation:
    """Replaces names of ``torch.cuda``. ``spend(seconds)`` is work on the current stream; ``now`` its time."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        self.main = self.current = Stream(self, "main")
        names = dict(
            Stream=lambda device, priority=0: Stream(self, "side"),
            Event=lambda enable_timing=False: Event(self, enable_timing),
            CUDAGraph=lambda: Graph(self),
            graph=self._capture,
            stream=self._on,
            current_stream=lambda device=None: self.current,
            synchronize=lambda device=None: self.log.append("synchronize"),
            get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=64),
        )
        for name, value in names.items():
            assert hasattr(torch.cuda, name), name
            monkeypatch.setattr(torch.cuda, name, value)

    def spend(self, seconds, what="work"):
        self.current.now += seconds
        self.log.append(f"{what} on {self.current.name}")

    @contextlib.contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def _capture(self, graph):
        self.log.append("capture")
        yield
        self.log.append("captured")


class Stream:
    def __init__(self, simulation, name):
        self._simulation, self.name, self.now = simulation, name, 0.0

    def wait_stream(self, other):
        self.now = max(self.now, other.now)
        self._simulation.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.now = max(self.now, event.at)
        self._simulation.log.append(f"{self.name} waits for an event")


class Event:
    def __init__(self, simulation, timing):
        self._simulation, self._timing, self.at = simulation, timing, None

    def record(self):
        self.at = self._simulation.current.now

    def elapsed_time(self, end):
        assert self._timing and end._timing, "both must have been made for timing"
        return (end.at - self.at) * 1e3

    def synchronize(self):
        assert self.at is not None


class Graph:
    def __init__(self, simulation):
        self._simulation = simulation

    def replay(self):
        self._simulation.spend(0.25, "replay")
