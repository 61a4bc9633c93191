"""Rows of all Engram layers, looked up on a side stream as soon as token ids are known.

    caller    copy ids -- event ------------------------------------- wait layer 0 -- read -- ... wait layer 1 -- read
    side             `--- wait -- lookup layer 0 -- event -- lookup layer 1 -- event

Four waits are needed, and each is one event: a lookup waits until the ids that it reads are copied, the next ids until
the last lookup has read these, a reader for its layer's lookup, and the next lookup until all readers are done.
docs/prefetch.md has the argument, and recipes for CUDA graphs.
"""

from collections.abc import Hashable, Sequence

import torch

from engram_kernels.geometry.kinds import Dtype, Each, Instance, OneOf, Optional, Tensor, Whole, declares, short, takes
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.buffers import Buffers
from engram_kernels.launching.device import processors
from engram_kernels.launching.streams import streams_of
from engram_kernels.launching.tokens import ID_DTYPES, Tokens, check_token_values, check_tokens
from engram_kernels.ops.hash_rows import hash_lookup
from engram_kernels.ops.row_kernels.arguments import check_tables_of_plan
from engram_kernels.ops.row_kernels.caching import CACHE, RowCache, check_cache
from engram_kernels.ops.row_kernels.hashed import hash_rows_config
from engram_kernels.ops.row_kernels.order import ORDERS, check_order, choose_order
from engram_kernels.ops.row_kernels.output import OUT_DTYPES, check_row_out
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.view import view_tables

_LAUNCH_BYTES = {"device": 32 << 20}  # of other placements:
_LINK_BYTES = 512 << 10


def layers_apart(layer_bytes: int, placement: str) -> bool:
    """Whether each layer gets a launch of its own, so that the first never waits for the last.

    A launch costs the host about 10 us, in which 545 KB come over PCIe Gen5 and 40 MB from device memory: with fewer
    bytes a layer than that, further launches would take longer than the rows they let go ahead. For V4.1 on the host
    that is 83 tokens. Arithmetic, not measured.
    """
    return layer_bytes >= _LAUNCH_BYTES.get(placement, _LINK_BYTES)


class Prefetcher:
    """Looks rows up ahead of the layers that read them, for at most ``max_tokens`` tokens at a time.

        prefetcher.start(token_ids, cu_seqlens=...)        as soon as ids are known
        ...                                                embedding, the layers before
        hidden = engram(hidden, rows=prefetcher.rows(layer))

    plan, tables: as for :func:`hash_lookup`, one table per layer of the plan. Buffers of ``L * max_tokens * C`` rows
    are allocated here, once; :meth:`start` overwrites them, once those that read them are done.
    programs: size of the lookup's persistent grid; None is half the multiprocessors, which leaves the others to the
    model. order (the read order), out_dtype: as for :func:`hash_lookup`.
    max_sequences: most sequences of one start; None is max_tokens.
    layers: what :meth:`rows` calls the plan's layers, such as ``config.layers``; None is 0, 1, and so on.
    cache: as for :func:`hash_lookup`. With one the rows of all layers come at once.
    Lookups run on a stream of the plan's GPU; on a CPU start() does all the work.

    Keep it, like any buffer, for as long as a CUDA graph that holds its work is replayed. Not for two threads at once.
    """

    @takes(
        plan=Instance(HashPlan),
        tables=Each(Instance(EngramTable)),
        max_tokens=Whole(1),
        programs=Optional(Whole(1)),
        order=Optional(OneOf(*ORDERS)),
        out_dtype=Optional(Dtype(*OUT_DTYPES, torch.float64)),
        max_sequences=Optional(Whole(1)),
        layers=Optional(Each(Instance(Hashable), least=1)),
        cache=Optional(CACHE),
    )
    def __init__(
        self,
        plan: HashPlan,
        tables: Sequence[EngramTable],
        max_tokens: int,
        *,
        programs: int | None = None,
        order: str | None = None,
        out_dtype: torch.dtype | None = None,
        max_sequences: int | None = None,
        layers: Sequence[int] | None = None,
        cache: RowCache | None = None,
    ):
        where = "Prefetcher"
        tables = check_tables_of_plan(where, plan, tables)
        num_layers, num_columns = plan.primes.shape
        if max_tokens * num_columns >= 2**31:
            raise ValueError(f"{where}: max_tokens * C must be below 2^31, got {max_tokens} * {num_columns}")
        max_sequences = max_tokens if max_sequences is None else max_sequences
        check_order(where, order, num_layers * max_tokens * num_columns)
        check_cache(where, cache, plan, tables, num_layers * max_tokens * num_columns)
        check_row_out(where, tables[0], (), plan.device, None, out_dtype, "values")
        names = tuple(range(num_layers) if layers is None else layers)
        if len(set(names)) != num_layers or len(names) != num_layers:
            raise ValueError(f"{where}: layers must be {num_layers} different names, one per layer, got {list(names)}")
        self._plan, self._tables, self._layers, self._cache = plan, tables, names, cache
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        self._plans = [plan.select(layers=[layer]) for layer in range(num_layers)]
        self._layer_bytes = num_columns * tables[0].nbytes // tables[0].rows  # of one token
        programs = programs or max(1, processors(plan.device) // 2)
        self._options = dict(programs=programs, order=order, out_dtype=out_dtype)

        def buffer(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(count, dtype=dtype, device=plan.device)

        self._ids, self._dead = buffer(max_tokens, torch.int64), buffer(max_tokens, torch.bool)
        self._cu_seqlens = buffer(max_sequences + 1, torch.int32)
        self._history = buffer(max_sequences * (plan.max_ngram - 1), torch.int64)
        row_elements = num_columns * tables[0].width
        self._rows = buffer(num_layers * max_tokens * row_elements, out_dtype or tables[0].default_out_dtype)
        self._buffers = Buffers("the prefetcher", (self._ids, self._dead, self._cu_seqlens, self._history, self._rows))
        self._view: torch.Tensor | None = None  # [L, T, C, R] of the last start
        self._start_captured = False

        self._streams = streams = streams_of(plan.device)
        self._copied = streams.event()
        # A layer's rows are there: for waits within the capture that start() was in, and for all others. The latter
        # are external, so that in a capture they become nodes of the graph and outside remain what they are.
        self._captured_ready = [streams.event() for _ in names]
        self._ready = [streams.event(external=True) for _ in names]
        # Streams that were given rows, and the event of their end once that is known; in a capture and outside.
        self._readers: dict[bool, dict] = {False: {}, True: {}}
        self._reader_events: dict[tuple, object] = {}
        self._kept: set = set()
        self._keep(streams.side)
        # A launch in a capture must not be the first to copy these to the device.
        for chosen in (tables, *((table,) for table in tables)):
            view_tables(chosen, plan.device)
        # The memory may have been another's: the first start() waits for the stream that it was allocated on.
        for event in self._ready:
            streams.record(event, streams.current())

    @takes(num_tokens=Whole(0))
    def launches(self, num_tokens: int) -> tuple[bool, bool, str, int]:
        """What a start of so many tokens launches: through the cache, layers apart, read order, rows hashed at once."""
        cached = self._cache is not None and num_tokens >= self._cache.min_tokens
        apart = not cached and layers_apart(num_tokens * self._layer_bytes, self._tables[0].placement)
        tables = self._tables[:1] if apart else self._tables
        num_rows = len(tables) * num_tokens * self._plan.primes.shape[1]
        view = view_tables(tables, self._plan.device)
        hashed = hash_rows_config(view, num_rows, self._options["programs"])[1]
        return cached, apart, choose_order(self._options["order"], view, num_rows), hashed

    @declares(
        token_ids=Tensor(*ID_DTYPES),
        cu_seqlens=Optional(Tensor(torch.int32)),
        history=Optional(Tensor(*ID_DTYPES)),
        dead=Optional(Tensor(torch.bool)),
    )
    def start(
        self,
        token_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
    ) -> None:
        """Begin to look up the rows of ``token_ids`` in all layers; arguments as for :func:`hash_lookup`.

        The arguments are copied on the current stream, and may be overwritten by what follows on it.
        """
        where = "Prefetcher.start"
        self._buffers.check(where)
        sources = Tokens(token_ids, cu_seqlens, history, dead)
        check_tokens(where, sources, self._plan)
        sequences = max(0 if cu_seqlens is None else len(cu_seqlens) - 1, 0 if history is None else len(history))
        for name, count in (("tokens", token_ids.numel()), ("sequences", sequences)):
            if count > (most := getattr(self, f"max_{name}")):
                raise ValueError(f"{where}: token_ids must be at most max_{name} = {most} {name}, got {count}")
        check_token_values(where, sources, self._plan)
        buffers = (self._ids, self._cu_seqlens, self._history, self._dead)
        inputs = Tokens(
            *(
                None if source is None else buffer[: source.numel()].view(source.shape)
                for source, buffer in zip(sources, buffers, strict=True)
            )
        )

        def copy() -> None:
            for target, source in zip(inputs, sources, strict=True):
                if target is not None:
                    target.copy_(source)

        streams, side = self._streams, self._streams.side
        current = streams.current()
        captured = streams.capturing(current)
        first = captured and not streams.capturing(side)  # of this capture: no event tells what was before it
        if first:
            self._readers[True].clear()
        else:
            streams.wait(current, (self._captured_ready if captured else self._ready)[-1])
        if not captured:
            self._keep(current)
        streams.run(current, copy)
        streams.record(self._copied, current)
        streams.wait(side, self._copied)
        readers = self._readers[captured]
        readers.pop(current, None)  # they come before the copy
        self._end_reading(captured)
        for event in readers.values():
            streams.wait(side, event)
        readers.clear()
        self._look_up(inputs, captured)

    @declares(layer=Instance(Hashable))
    def rows(self, layer: int) -> torch.Tensor:
        """Rows ``[T, C, R]`` (``[B, S, C, R]``) of a layer, for work given to the current stream from now on.

        It is a view of a buffer: the next start() overwrites it, once the streams that asked for rows are done with
        what they were given before that start(), or before :meth:`release`.
        """
        Instance(Hashable).check("Prefetcher.rows", "layer", layer)
        if not any(type(layer) is type(each) and layer == each for each in self._layers):
            raise ValueError(f"Prefetcher.rows: layer must be one of {list(self._layers)}, got {short(layer)}")
        if self._view is None:
            raise ValueError(f"Prefetcher.rows: no start() came before rows({layer!r})")
        self._buffers.check("Prefetcher.rows")
        index = self._layers.index(layer)
        current, captured, inside = self._where()
        self._streams.wait(current, (self._captured_ready if inside else self._ready)[index])
        if not captured:
            self._keep(current)
        if inside or not captured:
            self._readers[captured][current] = None
        return self._view[index]

    def release(self) -> None:
        """Say that all readers of the last start's rows have been given to their streams.

        The next start() then waits for these alone, not for what their streams were given later. The current stream
        waits for lookups that nobody waited for: a capture can end, and a graph that starts others be replayed.
        """
        current, captured, inside = self._where()
        if self._view is not None:
            self._streams.wait(current, (self._captured_ready if inside else self._ready)[-1])
        if inside or not captured:
            self._end_reading(captured)

    def _where(self) -> tuple[Hashable, bool, bool]:
        """The current stream, whether its work is captured, and whether in the capture that the last start() was in.

        That capture takes in a stream that is not in it yet, by the event that the stream is made to wait for.
        """
        current = self._streams.current()
        inside = self._start_captured and self._streams.capturing(self._streams.side)
        return current, inside or self._streams.capturing(current), inside

    def _end_reading(self, captured: bool) -> None:
        """Record the end of the readers whose end is not known yet."""
        for stream, event in self._readers[captured].items():
            if event is None:
                event = self._reader_events.setdefault((captured, stream), self._streams.event())
                self._streams.record(event, stream)
                self._readers[captured][stream] = event

    def _look_up(self, inputs: Tokens, captured: bool) -> None:
        """Give the lookups to the side stream, each followed by the events of its layers."""
        token_ids, options = inputs.token_ids, self._options | inputs.options
        num_layers, num_columns = self._plan.primes.shape
        shape = (num_layers, *token_ids.shape, num_columns, self._tables[0].width)
        view = self._rows[: torch.Size(shape).numel()].view(shape)
        self._view, self._start_captured = view, captured
        parts = [(self._plan, slice(0, num_layers))]
        cached, apart, *_ = self.launches(token_ids.numel())
        if cached:
            options |= dict(cache=self._cache)
        elif apart:
            parts = [(plan, slice(layer, layer + 1)) for layer, plan in enumerate(self._plans)]
        streams, side = self._streams, self._streams.side
        for plan, part in parts:

            def look_up(plan=plan, part=part) -> None:
                with torch.no_grad():  # the rows are a buffer, of trainable tables too: docs/training.md
                    hash_lookup(token_ids, plan, self._tables[part], out=view[part], **options)

            streams.run(side, look_up)
            for layer in range(num_layers)[part]:
                if streams.external or not captured:
                    streams.record(self._ready[layer], side)
                if captured:  # last, so that who waits for it has joined all that is in the graph
                    streams.record(self._captured_ready[layer], side)

    def _keep(self, stream) -> None:
        if stream not in self._kept:
            self._kept.add(stream)
            self._streams.keep((self._ids, self._dead, self._cu_seqlens, self._history, self._rows), stream)
