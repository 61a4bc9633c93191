"""Streams, events and captures on a CPU, as CUDA defines them, for work whose order a test then chooses.

Nothing runs when it is given to a stream: :meth:`FakeStreams.drain` runs it, always as far as possible on the first
stream of a list that does not have to wait. What events do not order, some list runs in the wrong order.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class FakeEvent:
    """``recorded`` counts records given to streams, ``done`` those that ran; ``capture`` is where it was recorded."""

    external: bool
    recorded: int = 0
    done: int = 0
    capture: object = None
    clock: dict = field(default_factory=dict)
    recorder: str | None = None


@dataclass(eq=False)
class Capture:
    """Work of a graph by stream; clocks say how much of each stream a stream comes after."""

    origin: str
    work: dict = field(default_factory=dict)
    clocks: dict = field(default_factory=dict)

    def join(self, stream, clock):
        self.work.setdefault(stream, [])
        mine = self.clocks.setdefault(stream, {})
        for other, count in clock.items():
            mine[other] = max(mine.get(other, 0), count)

    def add(self, stream, *step):
        self.work[stream].append(step)
        self.clocks[stream][stream] = len(self.work[stream])


class FakeStreams:
    """What a Prefetcher asks of CudaStreams. ``dropped``: waiting and recording stream whose waits are left out."""

    side, external = "side", True

    def __init__(self, current="main", dropped=None):
        self._current, self._dropped = current, dropped
        self._queues, self._captures = {}, {}
        self.kept = []

    def current(self):
        return self._current

    @contextmanager
    def stream(self, name):
        before, self._current = self._current, name
        yield
        self._current = before

    on = stream

    def capturing(self, stream):
        return stream in self._captures

    def event(self, external=False):
        return FakeEvent(external)

    def keep(self, tensors, stream):
        self.kept.append(stream)

    def run(self, stream, work):
        self._give(stream, "run", work)

    def record(self, event, stream):
        event.recorder = stream
        capture = self._captures.get(stream)
        if capture is None or event.external:
            if capture is None:
                event.recorded, event.capture = event.recorded + 1, None
            self._give(stream, "record", event)
            return
        event.capture, event.step = capture, self._give(stream, "mark")
        event.clock = dict(capture.clocks[stream])

    def wait(self, stream, event):
        capture = self._captures.get(stream)
        if (stream, event.recorder) == self._dropped:
            # What a capture needs to be one at all stays: the stream joins it, without the order.
            if event.capture is not None and not event.external and capture is None:
                self._captures[stream] = event.capture
                event.capture.join(stream, {})
            return
        if event.external or (capture is None and event.capture is None):
            self._give(stream, "wait", event, event.recorded)
            return
        if capture is not None and event.capture is not capture:
            raise RuntimeError("a capture waits for an event of outside")
        if capture is None:
            if event.capture not in self._captures.values():
                raise RuntimeError("a stream waits for an event that was recorded in a capture that has ended")
            self._captures[stream] = event.capture
        event.capture.join(stream, event.clock)
        self._give(stream, "after", event.step)

    def _give(self, stream, *step):
        if (capture := self._captures.get(stream)) is not None:
            capture.add(stream, *step)
            return stream, len(capture.work[stream])
        self._queues.setdefault(stream, []).append(step)
        return None

    @contextmanager
    def capture(self, stream):
        """A graph of what is given to ``stream`` within the context; yields a function that replays it."""
        capture = self._captures[stream] = Capture(stream)
        capture.join(stream, {})
        with self.stream(stream):
            yield lambda on: self._replay(capture, on)
        self._captures = {name: other for name, other in self._captures.items() if other is not capture}
        last = capture.clocks[stream]
        loose = [name for name, work in capture.work.items() if last.get(name, 0) < len(work)]
        if loose:
            raise RuntimeError(f"a capture ends before work of {loose} has joined it")

    def _replay(self, capture, stream):
        """Give a graph to ``stream``: its streams start after what is there, and ``stream`` goes on after them."""
        begun, marks = FakeEvent(False), {}
        awaited = [rest[0] for work in capture.work.values() for kind, *rest in work if kind == "wait"]
        before = {event: event.recorded for event in awaited}
        self.record(begun, stream)
        number = self._replays = getattr(self, "_replays", 0) + 1
        for name, work in capture.work.items():
            lane = (name, number)
            self.wait(lane, begun)
            for position, (kind, *rest) in enumerate(work, 1):
                mark = marks.setdefault((name, position), FakeEvent(False))
                if kind == "after":
                    waited = marks.setdefault(rest[0], FakeEvent(False))
                    waited.recorded = 1
                    self._give(lane, "wait", waited, 1)
                elif kind == "wait":  # an external one: for the last record that was given before the replay
                    self._give(lane, "wait", rest[0], before[rest[0]])
                elif kind == "record":
                    rest[0].recorded += 1
                    self._give(lane, "record", rest[0])
                elif kind == "run":
                    self._give(lane, "run", *rest)
                mark.recorded = 1
                self._give(lane, "record", mark)
            ended = FakeEvent(False)
            self.record(ended, lane)
            self.wait(stream, ended)

    def drain(self, first):
        """Run everything. ``first``: stream names, whose work runs as early as events let it, the foremost earliest."""

        def rank(stream):
            return first.index(stream if isinstance(stream, str) else stream[0])

        while any(self._queues.values()):
            for stream in sorted((name for name, queue in self._queues.items() if queue), key=rank):
                kind, *rest = self._queues[stream][0]
                if kind == "wait" and rest[0].done < rest[1]:
                    continue
                self._queues[stream].pop(0)
                if kind == "run":
                    rest[0]()
                elif kind == "record":
                    rest[0].done += 1
                break
            else:
                raise RuntimeError("every stream waits")
