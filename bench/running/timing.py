"""How time is measured: cold calls between events, graphs of many calls, and the host's own time.

GPU, cold: before each sample a buffer larger than the L2 cache is read; written, its dirty lines would leave the cache
within the timed call. Its time covers the host's time to
launch, so that the events around one call see no gap of the host's. What the events themselves and one launch cost is
measured in the same way, on an empty kernel (roofs.py).
GPU, graph: the calls of all input sets in one CUDA graph, replayed: the time of one without launches between.
Host: calls in a row without waiting for the GPU.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from triton.runtime.jit import JITFunction

Call = Callable[[], object]
GRAPH_CALLS = 32
_FLUSH_BYTES = 512 << 20  # at 4 TB/s about 130 us, more than the host takes for two launches


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call: median, 10th and 90th percentile of ``samples``."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Measurement":
        ordered = sorted(seconds)
        tenth = (len(ordered) - 1) // 10
        return cls(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))

    def as_dict(self) -> dict:
        return asdict(self)


class Budget:
    """Seconds that may still be spent. ``clock`` is replaced in tests."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def part(self, seconds: float) -> "Budget":
        """At most ``seconds`` of what is left."""
        return Budget(min(seconds, self.left()), self._clock)

    def but(self, seconds: float) -> "Budget":
        """All that is left, but for ``seconds``."""
        return Budget(self.left() - seconds, self._clock)


class SideStream:
    """A second stream beside the current one; on a CPU its work runs at once. Its kernels go first: they are small."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def start(self, *work: Call) -> list[torch.cuda.Event | None]:
        """Run ``work`` after what the current stream holds so far; an event for the end of each."""
        if self._stream is None:
            for each in work:
                each()
            return [None] * len(work)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        events: list[torch.cuda.Event | None] = []
        with torch.cuda.stream(self._stream):
            for each in work:
                each()
                event = torch.cuda.Event()
                event.record()
                events.append(event)
        return events

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream go on once ``event`` is reached."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class GpuTimer:
    """Times calls on one GPU. ``limit`` seconds bound one measurement, at the price of samples."""

    kind = "GPU"

    def __init__(self, device: torch.device, samples: int = 30, limit: float = 2.0):
        self.device, self._samples, self._limit = device, samples, limit
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._cold_bytes = torch.zeros(max(_FLUSH_BYTES, 2 * cache) // 4, dtype=torch.float32, device=device).normal_()
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def measure(self, calls: Sequence[Call]) -> Measurement:
        """Cold: one call between two events, its inputs out of the cache and others than the last call's."""
        for call in calls:
            call()
        once = self._cold([calls[0]])[0]
        samples = max(5, min(self._samples, int(self._limit / max(once, 1e-6))))
        return Measurement.of(self._cold([calls[index % len(calls)] for index in range(samples)]))

    def once(self, calls: Sequence[Call]) -> Measurement:
        """Cold as in measure, each of ``calls`` once and in their order, none of them ahead of its time."""
        return Measurement.of(self._cold(calls))

    def graph(self, calls: Sequence[Call]) -> float:
        """Seconds of one call within a graph of GRAPH_CALLS, over all input sets in turn."""

        def many() -> None:
            for index in range(GRAPH_CALLS):
                calls[index % len(calls)]()

        replay = self.record(many)
        replay()
        return statistics.median(self._timed(replay) for _ in range(20)) / GRAPH_CALLS

    def record(self, step: Call) -> Call:
        """``step``, run once and then captured in a CUDA graph, as a call that replays it."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        gc.collect()  # within the capture it would unregister tables, which the driver refuses there
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def rounds(self, calls: Sequence[Call], count: int, before: Callable[[int], object]) -> list[list[float]]:
        """Seconds of each call, ``count`` times in turn, so that drifting clocks meet all alike; cold as in measure.

        before: called ahead of every call, outside its time, with a number that never comes again.
        """
        seconds: list[list[float]] = [[] for _ in calls]
        for number in range(count * len(calls)):
            index = number % len(calls)
            seconds[index] += self._cold([calls[index]], partial(before, number))
        return seconds

    def beside(self, call: Call, other: Call, side: SideStream) -> tuple[float, float]:
        """Seconds that ``call`` takes beside ``other`` on the side stream, and ``other`` beside it, from one start."""
        start, end, other_end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self._flush()
        start.record()
        (done,) = side.start(lambda: (other(), other_end.record()))
        call()
        end.record()
        side.wait(done)
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3, start.elapsed_time(other_end) / 1e3

    def host(self, calls: Sequence[Call]) -> float:
        """Seconds of host time per call, without waiting for the GPU."""
        per_call = []
        for _ in range(5):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for index in range(20):
                calls[index % len(calls)]()
            per_call.append((time.perf_counter() - start) / 20)
        torch.cuda.synchronize(self.device)
        return statistics.median(per_call)

    def _flush(self) -> None:
        torch.sum(self._cold_bytes, 0, out=self._sum)

    def _cold(self, calls: Sequence[Call], before: Call = lambda: None) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
        for call, (start, end) in zip(calls, events, strict=True):
            before()
            self._flush()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def _timed(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class CpuTimer:
    """Wall time on the CPU, for the references. It has neither graphs nor a host beside the device."""

    kind, device = "CPU", torch.device("cpu")

    def __init__(self, samples: int = 20, limit: float = 0.5):
        self._samples, self._limit = samples, limit

    def measure(self, calls: Sequence[Call]) -> Measurement:
        calls[0]()
        seconds: list[float] = []
        while len(seconds) < 3 or (len(seconds) < self._samples and math.fsum(seconds) < self._limit):
            start = time.perf_counter()
            calls[len(seconds) % len(calls)]()
            seconds.append(time.perf_counter() - start)
        return Measurement.of(seconds)

    def once(self, calls: Sequence[Call]) -> Measurement:
        return Measurement.of([self.rounds([call], 1, lambda number: None)[0][0] for call in calls])

    def record(self, step: Call) -> Call:
        return step

    def rounds(self, calls: Sequence[Call], count: int, before: Callable[[int], object]) -> list[list[float]]:
        seconds: list[list[float]] = [[] for _ in calls]
        for number in range(count * len(calls)):
            before(number)
            start = time.perf_counter()
            calls[number % len(calls)]()
            seconds[number % len(calls)].append(time.perf_counter() - start)
        return seconds

    def beside(self, call: Call, other: Call, side: SideStream) -> tuple[float, float]:
        """One after the other: a CPU has no second stream."""
        (ours,), (others,) = self.rounds([call, other], 1, lambda number: None)
        return ours, others


@contextmanager
def watching_kernels():
    """Yields a list that fills with what each Triton launch within the context compiled to and how it was launched."""
    launched: list[dict] = []
    run = JITFunction.run

    def watch(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        launched.append(
            dict(
                kernel=self.fn.__name__,
                registers=getattr(kernel, "n_regs", None),
                spills=getattr(kernel, "n_spills", None),
                programs=math.prod(grid) if isinstance(grid, tuple) else None,
            )
        )
        return kernel

    JITFunction.run = watch
    try:
        yield launched
    finally:
        JITFunction.run = run
