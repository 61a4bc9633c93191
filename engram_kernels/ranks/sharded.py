"""The table of one Engram layer over the ranks of a torch.distributed group; each holds a part of the rows.

    ranks/sharding.py                which rows are whose
    ranks/lookup.py          distinct ids to their owners, stored rows back
    ranks/gradient.py   gradients to the owners, in the order of the global batch
    ranks/checkpoint.py      one checkpoint whatever the number of ranks
    ranks/nodes.py             groups of the ranks of a node, and across nodes

Constructors, lookups, backward passes and saving are collective: all ranks of the group take part, in the same order.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import RowFormat, format_of, row_format
from engram_kernels.launching.checks import check_tensor, check_token_values, check_tokens
from engram_kernels.ops.hashing import ngram_hash
from engram_kernels.ops.row_kernels.output import check_row_out
from engram_kernels.ops.rows import lookup
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.gradient import check_recordable, record_rows, records_rows

from .exchange import Ranks, attempt_everywhere
from .gradient import PartGradient, gather_row_gradients
from .lookup import FixedExchange, received_rows
from .sharding import Sharding, ShardMap, shard_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from engram_kernels.checkpoints.files import Paths

Fill = Callable[[EngramTable, Sequence[tuple[int, int]]], object]


class ShardedTable:
    """Rows of model layer ``layer`` over the ranks of ``group`` (None: the world); the module :class:`Engram` takes it.

    placement, scale and options: of this rank's part, an :class:`EngramTable` (``part``), as for its ``empty``; format:
    None is the config's.
    split: "columns" gives each rank whole columns of every order, strided; where the ranks do not divide them it is as
    "rows", a range of every column's rows. ``sharding`` says what became of it.
    fill: called with the part and the ranges ``[(begin, end), ...]`` of the table's rows that it holds one after the
    other, to write them. Without it the rows are what ``empty`` leaves.
    capacity: distinct rows that a rank may ask of another in one lookup. Sizes are fixed then, and a lookup can be
    captured in a CUDA graph; see :meth:`check_capacity`. None exchanges exact sizes, for which the host waits.
    node: group of the ranks that share one part, with placement "shared": its first rank makes it, the others attach
    (:meth:`node_groups`). replicas: group of the ranks that hold the same part for other groups, whose row gradients
    are added as well; None is ``node``.

    Arguments that differ between ranks, and an error on one of them, are errors on all.
    """

    def __init__(
        self,
        config: EngramConfig,
        layer: int,
        group: "ProcessGroup | None" = None,
        *,
        placement: str,
        split: str = "columns",
        format: str | None = None,
        scale: float = 1.0,
        fill: Fill | None = None,
        capacity: int | None = None,
        node: "ProcessGroup | None" = None,
        replicas: "ProcessGroup | None" = None,
        **options,
    ):
        where = "ShardedTable"
        self.ranks = Ranks(group, where)
        self._node = None if node is None else Ranks(node, where)
        self.replicas = replicas_of(dict(node=node, replicas=replicas), where)
        facts = self._everywhere(where, "checking its arguments", lambda: facts_of(config, layer, format, capacity))
        facts |= {"split": split, "table's scale": scale, "shared by a node": node is not None}
        self._everywhere(where, "comparing arguments", lambda: self.ranks.check_equal(facts, where))
        if self.replicas is not None:
            facts |= {"number of ranks": self.ranks.size, "part": self.ranks.rank}
            self.replicas.check_equal(facts, where)
            sources = self.replicas.gather(self.ranks.members, where, "the exchange of groups")
            #: Rank of the world behind each (replica, rank of its group).
            self.source_ranks = [rank for members in sources for rank in members]
        index = config.layers.index(layer)
        self.config, self.layer, self.capacity = config, layer, capacity
        self.format: RowFormat = row_format(format or config.format, where)
        self.placement, self.rows, self.width = placement, config.rows_per_layer[index], config.row_width
        make = lambda: shard_rows(config.primes[index], self.rows, self.ranks.size, split)  # noqa: E731
        self.sharding: Sharding = self._everywhere(where, "dividing the table", make)
        self._maps: dict[torch.device, ShardMap] = {}
        self._fixed: dict[torch.device, FixedExchange] = {}
        self._plan: tuple[HashPlan, HashPlan] | None = None
        self._make_part(scale, fill, options)

    @classmethod
    def from_tensors(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor | float | None = None,
        *,
        config: EngramConfig,
        layer: int,
        group: "ProcessGroup | None" = None,
        placement: str,
        **options,
    ) -> "ShardedTable":
        """Each rank gives the whole table ``weight [rows, width]`` and its scale, and keeps its part."""
        where = "ShardedTable.from_tensors"

        def check():
            facts_of(config, layer, None, None)
            fmt, kept = format_of(weight, scale, where)
            rows = config.rows_per_layer[config.layers.index(layer)]
            if tuple(weight.shape) != (rows, config.row_width):
                raise ValueError(
                    f"{where}: weight must have shape {[rows, config.row_width]}, got {list(weight.shape)}"
                )
            return fmt, kept

        ranks, replicas = Ranks(group, where), replicas_of(options, where)
        fmt, kept = attempt_everywhere(ranks, replicas, where, "checking its tensors", check)

        def fill(part: EngramTable, ranges) -> None:
            for source, target in ((weight, part.weight), (kept, part.scale))[: 2 if fmt.scaling == "group" else 1]:
                at = 0
                for begin, end in ranges:
                    target[at : at + end - begin].view(torch.uint8).copy_(source[begin:end].view(torch.uint8))
                    at += end - begin

        value = float(kept) if fmt.scaling == "table" else 1.0
        return cls(config, layer, group, placement=placement, format=fmt.name, scale=value, fill=fill, **options)

    @classmethod
    def from_safetensors(
        cls,
        paths: "Paths",
        *,
        config: EngramConfig,
        layer: int,
        group: "ProcessGroup | None" = None,
        placement: str,
        prefix: str | None = None,
        threads: int = 8,
        progress: Callable[[int, int], object] | None = None,
        **options,
    ) -> "ShardedTable":
        """A checkpoint's table, of which each rank reads its own rows alone. Needs the extra ``hf``.

        The checkpoint is one of any number of ranks, or of none. paths, prefix, threads and progress are those of
        :meth:`EngramTable.from_safetensors`; options those of :class:`ShardedTable`.
        """
        from .loading import load_sharded

        reading = dict(prefix=prefix, threads=threads, progress=progress)
        return load_sharded(cls, paths, config, layer, group, reading, placement=placement, **options)

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
        groups with the same rows one saves.
        """
        from .checkpoint import save_sharded

        return save_sharded(self, path, prefix=prefix, shard_bytes=shard_bytes, metadata=metadata)

    @staticmethod
    def node_groups(
        group: "ProcessGroup | None" = None, *, node: str | None = None, timeout: timedelta | None = None
    ) -> "tuple[ProcessGroup, ProcessGroup]":
        """(ranks of this node, ranks in the same place on all nodes) of ``group``, as new groups; collective.

        node: this rank's name for its node; None is the host's name and boot id. timeout: of the new groups.
        A table over nodes, a part per node: group=across, node=inside. A copy per node needs ``EngramTable.attach``
        alone; to train it, a group of this rank only, node=inside and the world as replicas.
        """
        from .nodes import make_node_groups

        return make_node_groups(Ranks(group, "ShardedTable.node_groups"), node, timeout)

    def lookup(
        self,
        row_ids: torch.Tensor,
        *,
        out: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None = None,
        out_dtype: torch.dtype | None = None,
        out_format: str = "values",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Rows ``[..., C, R]`` for this rank's ids of the whole table, from whoever holds them; collective.

        Arguments and result are those of :func:`lookup`, and so are the bits; ranks may have different numbers of ids.
        Where the table is trainable autograd follows values, and the backward pass is collective too.
        """
        where = "ShardedTable.lookup"
        check_tensor(where, "row_ids", row_ids, dtypes=(torch.int32, torch.int64), contiguous=False)
        if row_ids.dim() == 0 or row_ids.numel() >= 2**31:
            raise ValueError(f"{where}: row_ids must have shape [..., C], below 2^31 ids, got {list(row_ids.shape)}")
        self.part.check_readable_on(row_ids.device, where)
        shape = (*row_ids.shape, self.width)
        check_row_out(where, self.part, shape, row_ids.device, out, out_dtype, out_format)
        if records_rows((self,), out_format):
            check_recordable(where, out)
            with torch.no_grad():
                rows = self.lookup(row_ids, out_dtype=out_dtype)
            return record_rows(rows, (self,), lambda grad, ids: ((ids, grad),), row_ids)
        if self.capacity is None:
            received, places = received_rows(self, row_ids)
        else:
            if row_ids.device not in self._fixed:
                self._fixed[row_ids.device] = FixedExchange(self, row_ids.device)
            received, places = self._fixed[row_ids.device].rows(self, row_ids)
            if row_ids.device.type == "cpu":
                self.check_capacity()
        return lookup(received, places, out=out, out_dtype=out_dtype, out_format=out_format)

    def hash_lookup(
        self,
        token_ids: torch.Tensor,
        plan: HashPlan,
        *,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        out: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None = None,
        out_dtype: torch.dtype | None = None,
        out_format: str = "values",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Rows ``[T, C, R]`` (``[B, S, C, R]``) of this rank's own tokens, for this layer; collective.

        plan: of all the config's layers, or of this one alone. Other arguments are those of :func:`hash_lookup`.
        """
        where = "ShardedTable.hash_lookup"
        check_tokens(where, token_ids, plan, cu_seqlens, history, dead)
        plan = self._own_plan(plan, where)
        check_token_values(where, token_ids, plan, cu_seqlens, history, dead)
        row_ids = ngram_hash(token_ids, plan, cu_seqlens=cu_seqlens, history=history, dead=dead)[..., 0, :]
        return self.lookup(row_ids, out=out, out_dtype=out_dtype, out_format=out_format)

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

    def map(self, device: torch.device) -> ShardMap:
        """The sharding as tensors on ``device``."""
        if device not in self._maps:
            self._maps[device] = ShardMap(self.sharding, device)
        return self._maps[device]

    @property
    def default_out_dtype(self) -> torch.dtype:
        """The table's own dtype where that is dense, bfloat16 for fp8."""
        return self.part.default_out_dtype

    @property
    def requires_row_grad(self) -> bool:
        """Whether autograd follows values that are read from this table."""
        return self.part.requires_row_grad

    @property
    def anchor(self) -> torch.Tensor | None:
        """The part's place in autograd; its gradient is the norm over all ranks' rows, the same on each."""
        return self.part.anchor

    def requires_row_grad_(self, requires: bool = True) -> "ShardedTable":
        """Make the rows trainable, on every rank, or no longer so; optimizers take ``part``. Returns the table."""
        self.part.requires_row_grad_(requires)
        return self

    def accumulate_row_grad(self, row_ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Add the gradient ``grad [..., R]`` of rows ``row_ids [...]`` where these live; collective."""
        ids, entries = gather_row_gradients(self, row_ids, grad)
        self.part.accumulate_row_grad(ids, entries)
        gradient = PartGradient.of(self.part.row_grad, self.ranks)
        self.part.row_grad = gradient
        self.part.anchor.grad = gradient.norm().to(self.part.anchor)[None]

    def zero_row_grad(self) -> None:
        """Forget the gradient of this rank's rows."""
        self.part.zero_row_grad()

    @property
    def closed(self) -> bool:
        return self.part.closed

    def close(self) -> None:
        """Release this rank's part; not collective."""
        self._fixed.clear()
        self.part.close()

    def __enter__(self) -> "ShardedTable":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        place = f"rank {self.ranks.rank} of {self.ranks.size}"
        return f"ShardedTable({self.rows:,} x {self.width} by {self.sharding.split}, {place}: {self.part!r})"

    def _everywhere(self, where: str, what: str, work: Callable):
        """``work()``, which fails on all ranks of the group and of their replicas where it fails on one."""
        return attempt_everywhere(self.ranks, self.replicas, where, what, work)

    def _make_part(self, scale: float, fill: Fill | None, options: dict) -> None:
        where, node, ranges = "ShardedTable", self._node, self.sharding.ranges(self.ranks.rank)
        # A rank without rows keeps one that nobody asks for, so that a part is a table on every rank.
        shape = (max(1, self.sharding.part_rows[self.ranks.rank]), self.width, self.format.name)
        made: list[EngramTable] = []

        def make() -> None:
            made.append(EngramTable.empty(*shape, placement=self.placement, scale=scale, **options))
            if fill is not None:
                fill(made[0], ranges)
            if self.placement == "shared":
                made[0].publish()

        def share() -> None:
            if self.placement != "shared":
                raise ValueError(f"{where}: node is for placement 'shared', got {self.placement!r}")
            node.attempt(where, "making the node's part", make if node.rank == 0 else lambda: None)
            if not made:
                kept = {name: options[name] for name in ("scales",) if name in options}
                kept |= {"scale": scale} if self.format.scaling == "table" else {}
                made.append(EngramTable.attach(options.get("name"), *shape, timeout=60.0, **kept))

        try:
            self._everywhere(where, "making its part", make if node is None else share)
        except BaseException:
            for part in made:
                part.close()
            raise
        self.part = made[0]

    def _own_plan(self, plan: HashPlan, where: str) -> HashPlan:
        """The plan of this layer alone."""
        if self._plan is None or self._plan[0] is not plan:
            layers, columns = plan.primes.shape
            if layers not in (1, len(self.config.layers)) or columns != self.config.columns:
                raise ValueError(
                    f"{where}: plan must have 1 or {len(self.config.layers)} layers of {self.config.columns} columns, "
                    f"got {layers} of {columns}"
                )
            own = plan if layers == 1 else plan.select(layers=[self.config.layers.index(self.layer)])
            if own.rows_per_layer[0] > self.rows:
                raise ValueError(f"{where}: plan must fit {self.rows} rows, got {own.rows_per_layer[0]}")
            self._plan = (plan, own)
        return self._plan[1]


def replicas_of(options: Mapping[str, Any], where: str) -> Ranks | None:
    """The group that holds the same part, of a table's options."""
    group = options.get("replicas")
    group = options.get("node") if group is None else group
    return None if group is None else Ranks(group, where)


def facts_of(config, layer, format, capacity) -> dict:
    """What has to be the same on all ranks; raises where it is wrong."""
    where = "ShardedTable"
    if not isinstance(config, EngramConfig):
        raise TypeError(f"{where}: config must be an EngramConfig, got {type(config).__name__}")
    if layer not in config.layers:
        raise ValueError(f"{where}: layer must be one of the config's, {config.layers}, got {layer}")
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
        raise ValueError(f"{where}: capacity must be a positive int or None, got {capacity!r}")
    fields = {f"config's {name}": value for name, value in dataclasses.asdict(config).items()}
    return fields | {"layer": layer, "format": format or config.format, "capacity": capacity}
