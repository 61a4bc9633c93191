"""The table of one Engram layer over the ranks of a torch.distributed group; each holds a shard of the rows.

    ranks/sharding.py     which rows are whose
    ranks/rows.py         what one rank knows of the table, and its shard
    ranks/lookup.py       distinct ids to the ranks that hold them, stored rows back
    ranks/kept.py         rows of other ranks that this one keeps
    ranks/gradient.py     gradients to the ranks that hold the rows, in the order of the global batch
    ranks/checkpoint.py   one checkpoint whatever the number of ranks
    ranks/nodes.py        groups of the ranks of a node, and across nodes
    ranks/overlay.py      edited rows over the shards

Constructors, lookups, backward passes and saving are collective: all ranks of the group take part, in the same order.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import torch
import torch.distributed as dist

from engram_kernels.checkpoints.files import Paths
from engram_kernels.geometry.choices import OutFormat, Placement, RowsAndScales
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import AnyOf, Number, Optional, Tensor, check_all, declares
from engram_kernels.geometry.kinds import Path as PathKind
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import check_content, format_of
from engram_kernels.launching.checks import check_tensor
from engram_kernels.launching.exchange import Groups
from engram_kernels.launching.tokens import ID_DTYPES, TOKEN_KINDS, Tokens, check_token_values, check_tokens
from engram_kernels.ops.hashing import ngram_hash
from engram_kernels.ops.row_kernels.output import OUT_KINDS, check_row_out
from engram_kernels.ops.rows import lookup
from engram_kernels.tables.editing.files import load_rows
from engram_kernels.tables.editing.stored import ROW_KINDS
from engram_kernels.tables.engram import LOAD_KINDS, SAVE_KINDS
from engram_kernels.tables.gradient import GRAD_DTYPES, check_recordable, record_rows, records_rows

from .checkpoint import load_sharded, save_sharded
from .gradient import ShardGradient, gather_row_gradients
from .lookup import ROWS_ASKED, FixedExchange, received_rows
from .nodes import NODE_KINDS, make_node_groups
from .overlay import ShardedOverlay
from .rows import TABLE_KINDS, ShardedRows, layer_index

_SCALE = Optional(AnyOf(Number(), Tensor()))
_WEIGHT_KINDS = TABLE_KINDS | dict(weight=Tensor(), scale=_SCALE, own_scale=_SCALE)


class ShardedTable(ShardedRows):
    """Rows of model layer ``layer`` over the ranks of ``group`` (None: the world); the module :class:`Engram` takes it.

    config, layer: the :class:`EngramConfig`, and the number of one of its layers.
    placement, scale and options: of this rank's shard ``part``, as for :meth:`EngramTable.empty`, without keep. format:
    None is the config's.
    split: "columns" gives each rank whole columns of every order, strided; "rows" a range of every column's rows, as
    does "columns" where the ranks do not divide the columns. ``sharding.split`` says which it is.
    fill: called with the shard and the ranges ``[(begin, end), ...]`` of the table's rows that it holds one after the
    other, to write them. Without it the rows are what ``empty`` leaves.
    capacity: distinct rows that a rank may ask of another in one lookup. Sizes are fixed then, and a lookup can be
    captured in a CUDA graph; see :meth:`check_capacity`. None exchanges exact sizes, for which the host waits.
    cache_bytes: memory for rows of other ranks that this rank asked for before, on the device of its lookups (each one
    that there are lookups from): only others are exchanged, for the same bits. For tables that are not trained. Rows
    that change are forgotten by their :attr:`EngramTable.version`. None keeps none.
    node: group of the ranks that share one shard, with placement "shared": its first rank makes it, the others attach
    (:meth:`node_groups`). replicas: group of the ranks that hold the same shard in other groups, whose row gradients
    are added as well; None is ``node``.
    reduce: "mean" divides the sum of all ranks' row gradients, replicas' included, by their number, as
    DistributedDataParallel does with those of dense parameters; "sum" does not.

    Arguments that differ between ranks, and an error on one of them, are a ValueError on all: of constructors, saving
    and :meth:`node_groups`, and of lookups without ``capacity``, whose peers learn it with the number of rows. Two
    things are checked before a rank takes part, so that its peers wait for it until the group's time-out: the groups
    themselves, and arguments of lookups with ``capacity`` and of :meth:`accumulate_row_grad`.
    """

    @classmethod
    @declares(**_WEIGHT_KINDS)
    def from_tensors(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor | float | None = None,
        *,
        config: EngramConfig,
        layer: int,
        group: "dist.ProcessGroup | None" = None,
        placement: Placement,
        own_scale: torch.Tensor | float | None = None,
        **options,
    ) -> "ShardedTable":
        """A table of which each rank is given the whole and keeps its shard.

        weight, scale, own_scale: rows ``[rows, R]`` and scales, as for :meth:`EngramTable.from_tensors`.
        config, layer, group, placement, options: what the constructor of this class takes. ValueError for another
        shape.
        """
        where = "ShardedTable.from_tensors"
        given = dict(weight=weight, scale=scale, own_scale=own_scale, config=config, layer=layer, placement=placement)

        def check():
            check_all(where, _WEIGHT_KINDS, given)
            shape = [config.rows_per_layer[layer_index(config, layer, where)], config.row_width]
            if weight.dim() != 2:
                raise ValueError(f"{where}: weight must have shape {shape}, got {list(weight.shape)}")
            found = format_of(weight, scale, where, own_scale)
            check_content(weight, "weight", where)
            shape[1] = found.format.row_items(shape[1])
            if list(weight.shape) != shape:
                raise ValueError(f"{where}: weight must have shape {shape}, got {list(weight.shape)}")
            return found

        groups = Groups(group, options.get("node"), options.get("replicas"), where)
        fmt, kept, own = groups.attempt(where, "checking its tensors", check)

        def fill(shard, ranges) -> None:
            for source, target in ((weight, shard.weight), (kept, shard.scale))[: 2 if fmt.group else 1]:
                position = 0
                for begin, end in ranges:
                    rows = target[position : position + end - begin]
                    rows.view(torch.uint8).copy_(source[begin:end].view(torch.uint8))
                    position += len(rows)

        value = 1.0 if own is None else own
        return cls(config, layer, group, placement=placement, format=fmt.name, scale=value, fill=fill, **options)

    @classmethod
    @declares(**TABLE_KINDS, **LOAD_KINDS)
    def from_safetensors(
        cls,
        paths: Paths,
        *,
        config: EngramConfig,
        layer: int,
        group: "dist.ProcessGroup | None" = None,
        placement: Placement,
        prefix: str | None = None,
        threads: int = 8,
        progress: Callable[[int, int], object] | None = None,
        **options,
    ) -> "ShardedTable":
        """A checkpoint's table, of which each rank reads its own rows alone. Needs the extra ``hf``.

        paths: a file, several, a folder or an index; the checkpoint is one of any number of ranks, or of none.
        prefix: what comes before ``weight`` in the names; None goes by the layer. threads: chunks read at once, with
        progress (bytes done, bytes in all). config, layer, group, placement, options: what the constructor takes.
        ValueError on all ranks where a file does not fit the config.
        """
        reading = dict(prefix=prefix, threads=threads, progress=progress)
        return load_sharded(cls, paths, config, layer, group, reading, placement=placement, **options)

    @declares(**SAVE_KINDS)
    def save_safetensors(
        self,
        path: str | Path,
        *,
        prefix: str = "",
        shard_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write one checkpoint of the whole table, as :meth:`EngramTable.save_safetensors` would; returns its path.

        All ranks of the group write their rows, to a folder that all of them see; the files take their place when
        every rank has said that its rows are on the disk. Where one fails or dies nothing changes there. Of several
        groups with the same rows one saves. prefix: of the tensors' names. shard_bytes: most bytes of a file.
        metadata: texts for the headers. ValueError where files there hold anything else.
        """
        return save_sharded(self, path, dict(prefix=prefix, shard_bytes=shard_bytes, metadata=metadata))

    @staticmethod
    @declares(**NODE_KINDS)
    def node_groups(
        group: "dist.ProcessGroup | None" = None, *, node: str | None = None, timeout: timedelta | None = None
    ) -> "tuple[dist.ProcessGroup, dist.ProcessGroup]":
        """(ranks of this node, ranks with this one's number on their nodes) of ``group``, as new groups; collective.

        node: this rank's name for its node; None is the host's name and boot id. timeout: of the new groups. ValueError
        where nodes have different numbers of ranks.
        A table over nodes, a shard per node: group=across, node=inside. A copy per node needs ``EngramTable.attach``
        alone; to train it, a group of this rank only, node=inside and the world as replicas.
        """
        return make_node_groups(group, node, timeout)

    @overload
    def lookup(
        self,
        row_ids: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        out_format: Literal["values"] = "values",
    ) -> torch.Tensor: ...

    @overload
    def lookup(
        self,
        row_ids: torch.Tensor,
        *,
        out: RowsAndScales | None = None,
        out_dtype: None = None,
        out_format: Literal["storage"],
    ) -> RowsAndScales: ...

    @declares(row_ids=Tensor(*ID_DTYPES), **OUT_KINDS)
    def lookup(
        self,
        row_ids: torch.Tensor,
        *,
        out: torch.Tensor | RowsAndScales | None = None,
        out_dtype: torch.dtype | None = None,
        out_format: OutFormat = "values",
    ) -> torch.Tensor | RowsAndScales:
        """Rows ``[..., C, R]`` for this rank's ids of the whole table, from whoever holds them; collective.

        row_ids: ``[..., C]``, int32 or int64; ranks may have different numbers of ids. ValueError for 2^31 or more.
        out, out_dtype, out_format: where to write, and as what, as for :func:`lookup`, whose bits the result has.
        Where the table is trainable autograd follows values, and the backward pass is collective too.
        """
        with self.refusing(row_ids):
            self._check_lookup("ShardedTable.lookup", row_ids, out, out_dtype, out_format)
        if records_rows((self,), out_format):
            with torch.no_grad():
                rows = self.lookup(row_ids, out_dtype=out_dtype)
            return record_rows(rows, (self,), lambda grad, ids: ((ids, grad),), row_ids)
        if self.capacity is None:
            received, ids = received_rows(self, row_ids)
        else:
            if row_ids.device not in self._fixed:
                self._fixed[row_ids.device] = FixedExchange(self, row_ids.device)
            received, ids = self._fixed[row_ids.device].rows(self, row_ids)
            if row_ids.device.type == "cpu":
                self.check_capacity()
        return lookup(received, ids, out=out, out_dtype=out_dtype, out_format=out_format)

    @overload
    def hash_lookup(
        self,
        token_ids: torch.Tensor,
        plan: HashPlan,
        *,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        out_format: Literal["values"] = "values",
    ) -> torch.Tensor: ...

    @overload
    def hash_lookup(
        self,
        token_ids: torch.Tensor,
        plan: HashPlan,
        *,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        out: RowsAndScales | None = None,
        out_dtype: None = None,
        out_format: Literal["storage"],
    ) -> RowsAndScales: ...

    @declares(**TOKEN_KINDS, **OUT_KINDS)
    def hash_lookup(
        self,
        token_ids: torch.Tensor,
        plan: HashPlan,
        *,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        out: torch.Tensor | RowsAndScales | None = None,
        out_dtype: torch.dtype | None = None,
        out_format: OutFormat = "values",
    ) -> torch.Tensor | RowsAndScales:
        """Rows ``[T, C, R]`` (``[B, S, C, R]``) of this rank's own tokens, for this layer; collective.

        token_ids, cu_seqlens, history, dead, slots: this rank's tokens, as for :func:`ngram_hash`.
        plan: of all the config's layers, or of this one alone; ValueError where it does not fit the table's rows.
        out, out_dtype, out_format: where to write, and as what, as for :func:`lookup`.
        """
        where = "ShardedTable.hash_lookup"
        tokens = Tokens(token_ids, cu_seqlens, history, dead, slots)
        with self.refusing(token_ids):
            check_tokens(where, tokens, plan)
            plan = self._own_plan(plan, where)
            check_token_values(where, tokens, plan)
            row_ids = ngram_hash(token_ids, plan, **tokens.options)[..., 0, :]
            self._check_lookup(where, row_ids, out, out_dtype, out_format)
        return self.lookup(row_ids, out=out, out_dtype=out_dtype, out_format=out_format)

    def look_up(self, tokens: Tokens, plan: HashPlan, out, **options) -> None:
        """What a :class:`Prefetcher` calls."""
        self.hash_lookup(tokens.token_ids, plan, **tokens.options, out=out, **options)

    def check_capacity(self) -> None:
        """Raise ValueError where lookups since the last call needed more than ``capacity``; waits for the device.

        Rows beyond it have been read as NaN. On a CPU each lookup checks by itself. All ranks find the same.
        """
        for exchange in self._fixed.values():
            most = int(exchange.most)
            exchange.most.zero_()
            if most > self.capacity:
                raise ValueError(
                    f"ShardedTable: capacity must be at least {most}, the distinct rows that a rank asked of another "
                    f"in one lookup, got {self.capacity}; rows beyond it were read as NaN"
                )

    @declares(**ROW_KINDS)
    def overlay(self, ids: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None = None) -> ShardedOverlay:
        """Lay ``rows [n, R]`` over rows ``ids [n]`` of the whole table, the same on all ranks; collective.

        scales: ``[n, R / G]`` of rows as stored, where elements share one. Each rank writes the rows of its shard.
        ValueError on all ranks where :meth:`EngramTable.overlay` would raise it on one.
        """
        return ShardedOverlay(self, ids, rows, scales, "ShardedTable.overlay").apply()

    @declares(path=PathKind())
    def load_overlay(self, path: str | Path) -> ShardedOverlay:
        """The overlay of file ``path`` of :meth:`RowOverlay.save_safetensors`, applied; all ranks read it; collective.

        ValueError on all ranks where it is for another table.
        """
        where = "ShardedTable.load_overlay"

        def read():
            check_all(where, dict(path=PathKind()), dict(path=path))
            return load_rows(self, path, where)[0]

        stored = self.groups.attempt(where, "reading the file", read)
        return ShardedOverlay(self, *stored, where).apply()

    @declares(row_ids=Tensor(*ID_DTYPES), grad=Tensor(*GRAD_DTYPES))
    def accumulate_row_grad(self, row_ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Add the gradient ``grad [..., R]`` of rows ``row_ids [...]`` where these live; collective.

        ValueError where the table is not trainable.
        """
        where = "ShardedTable.accumulate_row_grad"
        check_tensor(where, "row_ids", row_ids, dtypes=ID_DTYPES, contiguous=False)
        like = dict(shape=(*row_ids.shape, self.width), device=row_ids.device)
        check_tensor(where, "grad", grad, dtypes=GRAD_DTYPES, **like, contiguous=False)
        if not self.requires_row_grad:
            raise ValueError(f"{where}: the table is not trainable (requires_row_grad_)")
        ids, entries = gather_row_gradients(self, row_ids, grad)
        self.part.accumulate_row_grad(ids, entries)
        self.part.row_grad = ShardGradient.of(self.part.row_grad, self.ranks)

    def close(self) -> None:
        """Release this rank's shard; not collective."""
        self._fixed.clear()
        if self.cache is not None:
            self.cache.kept.clear()
        self.part.close()

    def __enter__(self) -> "ShardedTable":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @cached_property
    def _fixed(self) -> dict[torch.device, FixedExchange]:
        """Buffers of lookups with a capacity, by device."""
        return {}

    def _check_lookup(self, where: str, row_ids, out, out_dtype, out_format) -> None:
        """Raise unless a lookup's arguments are right on this rank."""
        check_tensor(where, "row_ids", row_ids, dtypes=ID_DTYPES, contiguous=False)
        if row_ids.dim() == 0 or row_ids.numel() >= 2**31:
            raise ValueError(f"{where}: row_ids must have shape [..., C], below 2^31 ids, got {list(row_ids.shape)}")
        self.part.check_readable_on(row_ids.device, where)
        if self.requires_row_grad:
            self._check_trainable(where)
        check_row_out(where, self.part, (*row_ids.shape, self.width), row_ids.device, out, out_dtype, out_format)
        if records_rows((self,), out_format):
            check_recordable(where, out)

    @contextlib.contextmanager
    def refusing(self, ids) -> Iterator[None]:
        """Where the block raises, the peers of a lookup of ``ids`` are told, which wait for numbers of rows."""
        try:
            yield
        except (TypeError, ValueError):
            if self.capacity is None:
                kind = ids.device.type if isinstance(ids, torch.Tensor) else self.placement
                device = "cpu" if kind == "cpu" or not torch.cuda.is_available() else "cuda"
                each = 1 if self.cache is None else 2
                self.ranks.refuse(torch.device(device), "ShardedTable.lookup", ROWS_ASKED, each)
            raise
