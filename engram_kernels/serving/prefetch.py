"""Rows of all Engram layers, looked up on a side stream as soon as token ids are known, and projected there.

    caller    copy ids -- event ------------------------------------- wait layer 0 -- read -- ... wait layer 1 -- read
    side             `--- wait -- lookup layer 0 -- event -- lookup layer 1 -- event

Four waits are needed, and each is one event: a lookup waits until the ids that it reads are copied, the next ids until
the last lookup has read these, a reader for its layer's lookup, and the next lookup until all readers are done. Where
the side stream projects too, each lookup is followed by a projection with an event of its own, and "lookup" is both.
With several starts in flight each has buffers and events of its own. docs/prefetch.md has the argument, and recipes
for CUDA graphs.
"""

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Generic, Literal, overload

import torch

from engram_kernels.geometry.choices import OutFormat, Read, ReadOrder, RowsAndScales
from engram_kernels.geometry.kinds import Dtype, Each, Flag, Function, Instance, OneOf, Optional, Whole, declares, takes
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.device import on_device_of, processors
from engram_kernels.launching.streams import streams_of
from engram_kernels.launching.tokens import TOKEN_KINDS, Tokens, check_token_values
from engram_kernels.ops.call import form_of
from engram_kernels.ops.gate_kernels.arguments import FLOAT_DTYPES
from engram_kernels.ops.hash_rows import HASH_LOOKUP, HashLookupCall
from engram_kernels.ops.row_kernels.arguments import TableOverRanks, parts_of_plan
from engram_kernels.ops.row_kernels.caching import CACHE, RowCache, check_cache
from engram_kernels.ops.row_kernels.hashed import hash_rows_config
from engram_kernels.ops.row_kernels.order import ORDERS, check_order, choose_order
from engram_kernels.ops.row_kernels.output import OUT_DTYPES, check_row_out
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.view import view_tables

from .inputs import TokenBuffers, copying
from .policy import AHEAD_TOKENS, default_programs, layers_apart, projects_ahead
from .started import Projection, Side, StartBuffers, Started, Work


class Prefetcher(Generic[Read]):
    """Looks rows up ahead of the layers that read them, for at most ``max_tokens`` tokens at a time.

        prefetcher.start(token_ids, cu_seqlens=...)        as soon as ids are known
        ...                                                embedding, the layers before
        hidden = engram(hidden, rows=prefetcher.rows(layer))

    plan, tables: as for :func:`hash_lookup`, one table per layer of the plan; or a :class:`ShardedTable` for each,
    without programs, order and cache, where starts are collective. Buffers of ``L * max_tokens * C`` rows
    are allocated here, once (``nbytes`` are all of them); :meth:`start` overwrites them, once those that read them are
    done.
    programs: size of the lookup's persistent grid; None is half the multiprocessors, which leaves the others to the
    model (at least 120 over NVLink-C2C). order (the read order), out_dtype, out_format: as for :func:`hash_lookup`;
    with "storage" rows are (rows, scales), where the scale of format e4m3 is a tensor ``[]`` on the plan's device.
    max_sequences: most sequences of one start; None is max_tokens.
    layers: what :meth:`rows` calls the plan's layers, such as ``config.layers``; None is 0, 1, and so on.
    cache: as for :func:`hash_lookup`. With one the rows of all layers come at once.
    projections: for :meth:`kv`, a callable for each layer of the plan: ``projection(rows, out)`` writes ``out [T, W]``
    (``[B, S, W]``) from what :meth:`rows` returns, on the current stream, such as :meth:`Engram.project` or an engine's
    own of whatever precision. kv_width: W. kv_dtype: of out; None is that of rows as values.
    ahead: True projects on the side stream, False where kv() is called; None goes by :func:`projects_ahead`, up to 128
    tokens. Buffers of ``L * T * W`` elements for the most tokens that are projected ahead are allocated here too.
    depth: most starts in flight, each with buffers of its own. With more than 1 a start is in flight until its
    :meth:`Started.release`; with 1 it ends the one before.
    Lookups run on a stream of the plan's GPU; on a CPU start() does all the work. All of it is inference, under
    torch.no_grad().

    Keep it, like any buffer, for as long as a CUDA graph that holds its work is replayed. Not for two threads at once.
    ValueError where tables, layers, cache or projections do not fit the plan, and for 2^31 row ids a layer or more.
    """

    @overload
    def __init__(
        self: "Prefetcher[torch.Tensor]",
        plan: HashPlan,
        tables: Sequence[EngramTable] | Sequence[TableOverRanks],
        max_tokens: int,
        *,
        programs: int | None = None,
        order: ReadOrder | None = None,
        out_dtype: torch.dtype | None = None,
        max_sequences: int | None = None,
        layers: Sequence[Hashable] | None = None,
        cache: RowCache | None = None,
        projections: Sequence[Projection[torch.Tensor]] | None = None,
        kv_width: int | None = None,
        kv_dtype: torch.dtype | None = None,
        ahead: bool | None = None,
        depth: int = 1,
        out_format: Literal["values"] = "values",
    ) -> None: ...

    @overload
    def __init__(
        self: "Prefetcher[RowsAndScales]",
        plan: HashPlan,
        tables: Sequence[EngramTable] | Sequence[TableOverRanks],
        max_tokens: int,
        *,
        programs: int | None = None,
        order: ReadOrder | None = None,
        out_dtype: None = None,
        max_sequences: int | None = None,
        layers: Sequence[Hashable] | None = None,
        cache: RowCache | None = None,
        projections: Sequence[Projection[RowsAndScales]] | None = None,
        kv_width: int | None = None,
        kv_dtype: torch.dtype | None = None,
        ahead: bool | None = None,
        depth: int = 1,
        out_format: Literal["storage"],
    ) -> None: ...

    @takes(
        plan=Instance(HashPlan),
        tables=Each(Instance(EngramTable, "ShardedTable")),
        max_tokens=Whole(1),
        programs=Optional(Whole(1)),
        order=Optional(OneOf(*ORDERS)),
        out_dtype=Optional(Dtype(*OUT_DTYPES, torch.float64)),
        max_sequences=Optional(Whole(1)),
        layers=Optional(Each(Instance(Hashable), least=1)),
        cache=Optional(CACHE),
        projections=Optional(Each(Function())),
        kv_width=Optional(Whole(1)),
        kv_dtype=Optional(Dtype(*FLOAT_DTYPES)),
        ahead=Optional(Flag()),
        depth=Whole(1),
        out_format=OneOf("values", "storage"),
    )
    def __init__(
        self,
        plan: HashPlan,
        tables: Sequence[EngramTable] | Sequence[TableOverRanks],
        max_tokens: int,
        *,
        programs: int | None = None,
        order: ReadOrder | None = None,
        out_dtype: torch.dtype | None = None,
        max_sequences: int | None = None,
        layers: Sequence[Hashable] | None = None,
        cache: RowCache | None = None,
        projections: Sequence[Projection[Read]] | None = None,
        kv_width: int | None = None,
        kv_dtype: torch.dtype | None = None,
        ahead: bool | None = None,
        depth: int = 1,
        out_format: OutFormat = "values",
    ):
        where = "Prefetcher"
        over_ranks = [table for table in tables if isinstance(table, TableOverRanks)]
        if over_ranks and (len(over_ranks) != len(tables) or (programs, order, cache) != (None, None, None)):
            raise ValueError(f"{where}: a ShardedTable takes no programs, order or cache, nor other tables beside it")
        self._over_ranks, self._refusing = over_ranks, over_ranks[0].refusing if over_ranks else nullcontext
        tables = parts_of_plan(where, plan, tables, over_ranks)
        num_layers, num_columns = plan.primes.shape
        if max_tokens * num_columns >= 2**31:
            raise ValueError(f"{where}: max_tokens * C must be below 2^31, got {max_tokens} * {num_columns}")
        max_sequences = max_tokens if max_sequences is None else max_sequences
        check_order(where, order, num_layers * max_tokens * num_columns)
        check_cache(where, cache, plan, tables, num_layers * max_tokens * num_columns)
        check_row_out(where, tables[0], (), plan.device, None, out_dtype, out_format)
        names = tuple(range(num_layers) if layers is None else layers)
        if len(set(names)) != num_layers or len(names) != num_layers:
            raise ValueError(f"{where}: layers must be {num_layers} different names, one per layer, got {list(names)}")
        if projections is None and (kv_width, kv_dtype, ahead) != (None, None, None):
            raise ValueError(f"{where}: kv_width, kv_dtype and ahead are of projections, and there are none")
        if projections is not None and (len(projections) != num_layers or kv_width is None):
            got = f"{len(projections)} and kv_width {kv_width}"
            raise ValueError(f"{where}: projections must be {num_layers}, one per layer, with kv_width, got {got}")
        self._plan, self._tables, self._cache = plan, tables, cache
        self.max_tokens, self.max_sequences, self.depth = max_tokens, max_sequences, depth
        self._plans = [plan.select(layers=[layer]) for layer in range(num_layers)]
        self._layer_bytes = num_columns * tables[0].nbytes // tables[0].rows  # of one token
        programs = programs or default_programs(processors(plan.device), view_tables(tables, plan.device).memory)
        self._options = dict(programs=programs, order=order, out_dtype=out_dtype, out_format=out_format)
        self._storage, row_format = out_format == "storage", tables[0].format
        values_dtype = out_dtype or tables[0].default_out_dtype
        scaled = self._storage and row_format.name == "e4m3"
        self._table_scales = torch.stack([table.scale for table in tables]).to(plan.device) if scaled else None
        self._ahead, self._kv_width = ahead, kv_width
        kv_tokens = 0 if projections is None or ahead is False else max_tokens
        kv_tokens = kv_tokens if ahead else min(kv_tokens, AHEAD_TOKENS)

        def buffer(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(count, dtype=dtype, device=plan.device)

        def buffers() -> StartBuffers:
            inputs = TokenBuffers(max_tokens, max_sequences, plan.max_ngram, plan.device)
            count, width = num_layers * max_tokens * num_columns, tables[0].width
            values = (width, values_dtype)
            items, dtype = (row_format.row_items(width), row_format.dtype) if self._storage else values
            grouped = self._storage and row_format.group
            rows = buffer(count * items, dtype)
            scales = buffer(count * row_format.scale_bytes(width), torch.uint8) if grouped else None
            kv = buffer(num_layers * kv_tokens * kv_width, kv_dtype or values_dtype) if kv_tokens else None
            return StartBuffers(streams, num_layers, inputs, rows, scales, kv)

        self._streams = streams = streams_of(plan.device)
        self._copied = streams.event()
        self._taken = [buffers() for _ in range(depth)]
        memory = [part for each in self._taken for part in each.memory]
        self._side = Side(streams, memory, names, projections, kv_width, kv_dtype or values_dtype)
        self._starts = self._tokens = self._cached_tokens = 0
        self._last: Started[Read] | None = None
        # A launch in a capture must not be the first to copy these to the device.
        for chosen in (tables, *((table,) for table in tables)):
            view_tables(chosen, plan.device)
        # The memory may have been another's: the first start() waits for the stream that it was allocated on.
        for each in self._taken:
            each.last.set(streams.current(), captured=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, on the plan's device."""
        return self._side.nbytes

    def metrics(self) -> dict[str, int]:
        """What it did so far, as the host has counted it; without replays of graphs, and without waiting for a GPU.

        starts, tokens: of :meth:`start`; cached_tokens: of these, through the cache. waits: of streams for rows or kv,
        one a call. releases: of starts. in_flight: starts that a later one would have to wait for. nbytes: of buffers.
        """
        side, in_flight = self._side, sum(each.in_flight for each in self._taken)
        tokens = dict(tokens=self._tokens, cached_tokens=self._cached_tokens)
        ends = dict(waits=side.waits, releases=side.releases, in_flight=in_flight)
        return dict(starts=self._starts) | tokens | ends | dict(nbytes=self.nbytes)

    @takes(num_tokens=Whole(0))
    def launches(self, num_tokens: int) -> tuple[bool, bool, str, int]:
        """What a start of ``num_tokens`` tokens launches: through the cache, layers apart, order, rows a hash."""
        cached = self._cache is not None and num_tokens >= self._cache.min_tokens
        memory = view_tables(self._tables, self._plan.device).memory
        apart = not cached and (bool(self._over_ranks) or layers_apart(num_tokens * self._layer_bytes, memory))
        tables = self._tables[:1] if apart else self._tables
        num_rows = len(tables) * num_tokens * self._plan.primes.shape[1]
        view = view_tables(tables, self._plan.device)
        hashed = hash_rows_config(view, num_rows, self._options["programs"])[1]
        return cached, apart, choose_order(self._options["order"], view, num_rows), hashed

    @declares(**{name: kind for name, kind in TOKEN_KINDS.items() if name != "plan"})
    def start(
        self,
        token_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> Started[Read]:
        """Begin to look up the rows of ``token_ids`` in all layers.

        token_ids: ``[T]`` with cu_seqlens, or ``[B, S]``; history, dead and slots belong to them, as for
        :func:`ngram_hash`. The arguments are copied on the current stream, by one launch, and may be overwritten by
        what follows on it. The :class:`Started` that is returned is needed only where another start comes before it is
        read. ValueError for more tokens or sequences than there are buffers for, or more starts in flight than
        ``depth``.
        """
        where = "Prefetcher.start"
        with self._refusing(token_ids):
            self._side.buffers.check(where)
            taken = self._taken[self._starts % self.depth]
            if self.depth > 1 and taken.in_flight:
                most = f"at most depth = {self.depth} starts in flight"
                raise ValueError(f"{where}: expected {most}, got one more; release() the oldest")
            sources = Tokens(token_ids, cu_seqlens, history, dead, slots)
            form = form_of(*sources)
            if form is None or form not in taken.works:
                taken.inputs.check(where, sources, self._plan)
            self._plan.check_memory(where)
            check_token_values(where, sources, self._plan)
        work = taken.works.get(form, lambda: self._work(taken, sources))
        streams, side = self._streams, self._streams.side
        current = streams.current()
        captured = streams.capturing(current)
        if captured and not streams.capturing(side):  # the first start of this capture
            self._side.captures += 1
            for each in self._taken:
                each.begin_capture()
        inside = captured and taken.capture == self._side.captures
        # What was before a capture is its replays' order to keep, but for a start in flight, which may be read in it.
        if inside or not captured or (self.depth > 1 and streams.external):
            taken.last.wait(current, inside)
        if not captured:
            self._side.keep(current)
        streams.run(current, lambda: self._copy(work, sources))
        streams.record(self._copied, current)
        with streams.on(side):
            streams.wait(side, self._copied)
            taken.wait_for_readers(current, captured)
            taken.number, taken.in_flight = self._starts + 1, False
            taken.capture = self._side.captures if captured else None
            self._look_up(taken, work, captured)
        self._starts, self._tokens = taken.number, self._tokens + work.tokens
        self._cached_tokens += work.cached_tokens
        self._last, taken.in_flight = Started(self._side, taken, work), True
        return self._last

    @declares(layer=Instance(Hashable))
    def rows(self, layer: Hashable) -> Read:
        """Rows ``[T, C, R]`` (``[B, S, C, R]``) of a layer, for work given to the current stream from now on.

        With out_format "storage" a pair of rows and scales. They are of the last start(), and views of buffers: the
        next start() that takes these overwrites them, once the streams that asked for rows are done with what they
        were given before that start(), or before :meth:`release`. ValueError before the first start(), and for an
        unknown layer.
        """
        return self._started("Prefetcher.rows", layer).read_rows("Prefetcher.rows", layer)

    @declares(layer=Instance(Hashable))
    def kv(self, layer: Hashable) -> torch.Tensor:
        """What the layer's projection made of :meth:`rows`, ``[T, W]`` (``[B, S, W]``), ordered as those are.

        It is a view of a buffer, as they are, where the side stream projects, and otherwise a new tensor, projected
        here on the current stream, at each call. ValueError without projections, and where :meth:`rows` raises it.
        """
        return self._started("Prefetcher.kv", layer).read_kv("Prefetcher.kv", layer)

    def release(self) -> None:
        """Say that all readers of the last start have been given to their streams: :meth:`Started.release`.

        The next start() then waits for these alone, not for what their streams were given later. The current stream
        waits for lookups that nobody waited for: a capture can end, and a graph that starts others be replayed.
        """
        if self._last is not None:
            self._last.release()

    @property
    def projects(self) -> bool:
        """Whether there are projections, so that :meth:`kv` can be asked for."""
        return self._side.projections is not None

    def _started(self, where: str, layer: Hashable) -> Started[Read]:
        """The last start, for one of the layers."""
        if self._last is None:
            self._side.index(where, layer)
            raise ValueError(f"{where}: no start() came before {where.partition('.')[2]}({layer!r})")
        return self._last

    def _work(self, taken: StartBuffers, sources: Tokens) -> Work:
        """What starts of such tokens do with these buffers."""
        token_ids = sources.token_ids
        num_layers, num_columns = self._plan.primes.shape
        fmt, width = self._tables[0].format, self._tables[0].width
        many = num_layers, *token_ids.shape, num_columns
        shape = torch.Size((*many, fmt.row_items(width) if self._storage else width))
        rows, scales, kv = taken.rows[: shape.numel()].view(shape), None, None
        if taken.scales is not None:
            shape = torch.Size((*many, fmt.scale_bytes(width)))
            scales = taken.scales[: shape.numel()].view(shape)
        if taken.kv is not None and (self._ahead or projects_ahead(token_ids.numel())):
            shape = torch.Size((num_layers, *token_ids.shape, self._kv_width))
            kv = taken.kv[: shape.numel()].view(shape)
        parts = [(self._plan, slice(0, num_layers))]
        cached, apart, *_ = self.launches(token_ids.numel())
        if apart:
            parts = [(plan, slice(layer, layer + 1)) for layer, plan in enumerate(self._plans)]
        inputs = taken.inputs.views(sources)
        options = self._options | dict(cache=self._cache if cached else None)
        lookups = []
        for plan, part in parts:
            here = part.start if self._over_ranks else part  # the rows of one layer, or of some
            out = (rows[here], None if scales is None else scales[here]) if self._storage else rows[here]
            call = HashLookupCall(inputs, plan, self._tables[part], **options)
            lookup = partial(HASH_LOOKUP, call, out, HASH_LOOKUP.signature(call, out))
            if self._over_ranks:
                formats = dict(out_dtype=call.out_dtype, out_format=call.out_format)
                lookup = partial(self._over_ranks[here].look_up, inputs, plan, out, **formats)
            lookups.append((range(num_layers)[part], lookup))
        beside = self._table_scales if scales is None else scales
        tokens = token_ids.numel()
        work = copying(sources, inputs), (rows, beside) if self._storage else rows, kv, lookups
        return Work(*work, tokens, tokens if cached else 0)

    def _copy(self, work: Work, sources: Tokens) -> None:
        with on_device_of(sources.token_ids):
            work.copy(*sources)

    def _look_up(self, taken: StartBuffers, work: Work, captured: bool) -> None:
        """Give lookups and projections to the side stream, each followed by the marks of its layers."""
        streams, side = self._streams, self._streams.side
        for layers, lookup in work.lookups:

            def look_up(lookup=lookup) -> None:
                with torch.no_grad():  # the rows are a buffer, of trainable tables too: docs/training.md
                    lookup()

            streams.run(side, look_up)
            for layer in layers:
                taken.ready[layer].set(side, captured)
            for layer in layers if taken.kv is not None else ():
                if work.kv is not None:
                    streams.run(
                        side, lambda layer=layer: self._side.project(layer, work.rows_of(layer), work.kv[layer])
                    )
                # Without a projection too: a graph's replay may have set it last, and a start waits for the last one.
                taken.projected[layer].set(side, captured)
