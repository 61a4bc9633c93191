"""One start of a :class:`Prefetcher`: rows and projections that it makes ready, and the events that order their use.

Buffers that starts take in turn are one :class:`StartBuffers` each. What the side stream has done is a :class:`Mark`,
and who reads a buffer is known stream by stream. docs/prefetch.md has the argument.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple

import torch

from engram_kernels.geometry.choices import Read, RowsAndScales
from engram_kernels.geometry.kinds import Instance, declares, short
from engram_kernels.launching.buffers import Buffers
from engram_kernels.launching.launch import Kept
from engram_kernels.launching.ranges import ranged

from .inputs import TokenBuffers

#: Rows of a layer ``[T, C, R]`` (``[B, S, C, R]``), or as they are stored (rows, scales).
Rows = torch.Tensor | RowsAndScales
#: Writes ``out [T, W]`` (``[B, S, W]``) from rows on the current stream.
Projection = Callable[[Read, torch.Tensor], object]


class Mark:
    """A point in the side stream's work that others wait for: by one event in the capture it was set in, else another.

    The latter is external, so that in a capture it becomes a node of the graph and outside remains what it is.
    """

    def __init__(self, streams):
        self._streams = streams
        self._captured, self._external = streams.event(), streams.event(external=True)

    def set(self, stream: Hashable, captured: bool) -> None:
        """Record it on ``stream``, whose work is captured or not."""
        if self._streams.external or not captured:
            self._streams.record(self._external, stream)
        if captured:  # last, so that who waits for it has joined all that is in the graph
            self._streams.record(self._captured, stream)

    def wait(self, stream: Hashable, inside: bool) -> None:
        """Let ``stream`` wait for it; inside: whether within the capture that it was set in."""
        self._streams.wait(stream, self._captured if inside else self._external)


class Work(NamedTuple):
    """What starts of one form of tokens do: equal shapes, types and devices, in the same buffers."""

    copy: Callable[..., None]  #: from the parts of the tokens that start() was given
    rows: Rows  #: ``[L, T, C, R]``, or as they are stored
    kv: torch.Tensor | None  #: ``[L, T, W]``, where the side stream projects
    lookups: list[tuple[range, Callable[[], object]]]  #: of these layers
    tokens: int
    cached_tokens: int  #: of these, through the cache

    def rows_of(self, index: int) -> Rows:
        """Those of one layer, in views of their own."""
        if not isinstance(self.rows, tuple):
            return self.rows[index]
        rows, scales = self.rows
        return rows[index], None if scales is None else scales[index]


class StartBuffers:
    """Buffers of one start at a time, their marks, and the streams that read them.

    inputs: of its tokens. rows, scales, kv: flat, of all layers; scales is None where rows have none of their own, and
    kv where nothing is projected ahead.
    """

    def __init__(self, streams, num_layers: int, inputs: TokenBuffers, rows, scales, kv):
        self.inputs, self.rows, self.scales, self.kv, self._streams = inputs, rows, scales, kv, streams
        self.ready = [Mark(streams) for _ in range(num_layers)]
        self.projected = self.ready if kv is None else [Mark(streams) for _ in range(num_layers)]
        self.number = 0  # of the start that they hold
        self.in_flight = False
        self.capture: int | None = None  # that this start was in
        # Streams that were given something to read, and the event of their end once that is known; in a capture, and
        # outside.
        self.readers: dict[bool, dict] = {False: {}, True: {}}
        self._events: dict[tuple, object] = {}
        self.works = Kept()  # by form of tokens

    @property
    def memory(self) -> list[torch.Tensor]:
        """All of its tensors."""
        return [each for each in (self.inputs.memory, self.rows, self.scales, self.kv) if each is not None]

    @property
    def last(self) -> Mark:
        """The end of a start's work on the side stream."""
        return self.projected[-1]

    def begin_capture(self) -> None:
        """Forget readers of captures that have ended. Those of the one that begins may have read before its start."""
        readers = self.readers[True]
        for stream in list(readers):
            if self._streams.capturing(stream):
                readers[stream] = None  # an event of before may be another capture's
            else:
                del readers[stream]

    def end_reading(self, captured: bool) -> None:
        """Record the end of the readers whose end is not known yet."""
        for stream, event in self.readers[captured].items():
            if event is None:
                event = self._events.setdefault((captured, stream), self._streams.event())
                self._streams.record(event, stream)
                self.readers[captured][stream] = event

    def wait_for_readers(self, current: Hashable, captured: bool) -> None:
        """Let the side stream wait for all of them; those on ``current`` come before what it waits for already."""
        readers = self.readers[captured]
        readers.pop(current, None)
        self.end_reading(captured)
        for event in readers.values():
            self._streams.wait(self._streams.side, event)
        readers.clear()


class Side:
    """What all starts of a Prefetcher have in common: streams, memory, the names and projections of layers."""

    def __init__(
        self,
        streams,
        memory: Sequence[torch.Tensor],
        layers: tuple,
        projections: Sequence[Projection[Any]] | None,
        kv_width: int | None,
        kv_dtype: torch.dtype,
    ):
        self.streams, self.layers, self.projections = streams, layers, projections
        self.kv_width, self.kv_dtype = kv_width, kv_dtype
        self.buffers = Buffers("the prefetcher", memory)
        self.nbytes = sum(tensor.nbytes for tensor in memory)
        self._places = {(type(layer), layer): place for place, layer in enumerate(layers)}
        self.captures = 0  # that starts were in, until now
        self.releases = self.waits = 0  # so far
        self._memory, self._kept = tuple(memory), set()
        self.keep(streams.side)

    def keep(self, stream: Hashable) -> None:
        """The memory, once freed, is not reused before ``stream`` is done with it."""
        if stream not in self._kept:
            self._kept.add(stream)
            self.streams.keep(self._memory, stream)

    def index(self, where: str, layer: Hashable) -> int:
        """The layer's place in the plan."""
        try:
            place = self._places.get((type(layer), layer))
        except TypeError:
            place = None
        if place is None:
            Instance(Hashable).check(where, "layer", layer)
            raise ValueError(f"{where}: layer must be one of {list(self.layers)}, got {short(layer)}")
        return place

    def project(self, index: int, rows: Rows, out: torch.Tensor) -> None:
        """A layer's projection on the current stream; nothing where there are no tokens, which a matmul may refuse."""
        if out.numel():
            with torch.no_grad():  # a buffer, which autograd knows nothing of
                ranged("project", self.projections[index])(rows, out)


class Started(Generic[Read]):
    """What one start() makes ready: :meth:`rows` and :meth:`kv` of each layer, until a later start takes its buffers.

    It is what :meth:`Prefetcher.start` returns. Those of Prefetcher itself are of the last start.
    """

    def __init__(self, side: Side, taken: StartBuffers, work: Work):
        self._side, self._taken, self._number = side, taken, taken.number
        self._work = work

    @declares(layer=Instance(Hashable))
    def rows(self, layer: Hashable) -> Read:
        """Rows ``[T, C, R]`` (``[B, S, C, R]``) of ``layer``, as :meth:`Prefetcher.rows` has those of the last start.

        ValueError for an unknown layer, and once a later start has taken the buffers.
        """
        return self.read_rows("Started.rows", layer)

    @declares(layer=Instance(Hashable))
    def kv(self, layer: Hashable) -> torch.Tensor:
        """Projection ``[T, W]`` (``[B, S, W]``) of ``layer``, as :meth:`Prefetcher.kv` has that of the last start.

        ValueError without projections, for an unknown layer, and once a later start has taken the buffers.
        """
        return self.read_kv("Started.kv", layer)

    def release(self) -> None:
        """Say that all that read this start's buffers has been given to its streams: a later start may take them.

        That start then waits for these alone, not for what their streams were given later. The current stream waits
        for lookups and projections that nobody waited for: a capture can end, and a graph that starts others be
        replayed. Until the buffers are taken more may be read, and released again.
        """
        if self._taken.number != self._number:
            return
        current, captured, inside = self._where()
        self._taken.last.wait(current, inside)
        if inside or not captured:
            self._taken.end_reading(captured)
        self._taken.in_flight = False
        self._side.releases += 1

    def read_rows(self, where: str, layer: Hashable) -> Rows:
        """:meth:`rows` for a function that errors call ``where``."""
        index = self._index(where, layer)
        self._wait(self._taken.ready[index])
        return self._work.rows_of(index)

    def read_kv(self, where: str, layer: Hashable) -> torch.Tensor:
        """:meth:`kv` for a function that errors call ``where``."""
        index = self._index(where, layer)
        if self._side.projections is None:
            raise ValueError(f"{where}: expected a Prefetcher with projections, got one without")
        if self._work.kv is not None:
            self._wait(self._taken.projected[index])
            return self._work.kv[index]
        self._wait(self._taken.ready[index])
        streams, rows = self._side.streams, self._work.rows_of(index)
        like = rows[0] if isinstance(rows, tuple) else rows
        out = like.new_empty(*like.shape[:-2], self._side.kv_width, dtype=self._side.kv_dtype)
        streams.run(streams.current(), lambda: self._side.project(index, rows, out))
        return out

    def _index(self, where: str, layer: Hashable) -> int:
        index = self._side.index(where, layer)
        if self._taken.number != self._number:
            raise ValueError(f"{where}: expected buffers that hold this start, and a later one has taken them")
        self._side.buffers.check(where)
        return index

    def _wait(self, mark: Mark) -> None:
        """Let the current stream wait for ``mark``, and be one of the readers."""
        self._side.waits += 1
        current, captured, inside = self._where()
        mark.wait(current, inside)
        if not captured:
            self._side.keep(current)
        self._taken.readers[captured][current] = None

    def _where(self) -> tuple[Hashable, bool, bool]:
        """The current stream, whether its work is captured, and whether in the capture that this start was in.

        That capture takes in a stream that is not in it yet, by the event that the stream is made to wait for.
        """
        streams = self._side.streams
        current = streams.current()
        inside = self._taken.capture == self._side.captures and streams.capturing(streams.side)
        return current, inside or streams.capturing(current), inside
