"""What one rank knows of a table over ranks: its groups, which rows are whose, and its own shard."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
import torch.distributed as dist

from engram_kernels.geometry.choices import FormatName, Mean, Placement, Split
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import (
    Flag,
    Function,
    Instance,
    Number,
    OneOf,
    Optional,
    Whole,
    check_all,
    declares,
    takes,
)
from engram_kernels.geometry.plan import HashPlan, layer_plan
from engram_kernels.geometry.row_format import FORMATS, RowFormat, row_format
from engram_kernels.launching.exchange import Groups
from engram_kernels.ops.row_kernels.arguments import TableOverRanks
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.gradient import RowGradient, row_gradient
from engram_kernels.tables.placement import PLACEMENTS
from engram_kernels.tables.trainable import Shard

from .kept import RankCache, check_cache
from .sharding import SPLITS, ShardMap, shard_rows

_COUNTS = ("lookups", "distinct", "hits", "received", "given")
Fill = Callable[[EngramTable, Sequence[tuple[int, int]]], object]
_WHERE = "ShardedTable"
#: How the gradients of ranks meet: the mean is what DistributedDataParallel makes of those of dense parameters.
REDUCES = ("mean", "sum")
#: What every constructor takes. Groups are checked as they are used, since without them no rank could tell another one.
GROUP = Optional(Instance("ProcessGroup"))
TABLE_KINDS = dict(config=Instance(EngramConfig), layer=Whole(0), group=GROUP, placement=OneOf(*PLACEMENTS))
_KINDS = TABLE_KINDS | dict(
    split=OneOf(*SPLITS),
    format=Optional(OneOf(*FORMATS)),
    scale=Number(),
    fill=Optional(Function()),
    capacity=Optional(Whole(1)),
    cache_bytes=Optional(Whole(1)),
    node=GROUP,
    replicas=GROUP,
    reduce=OneOf(*REDUCES),
)


class ShardedRows(TableOverRanks):
    """The rows of a :class:`ShardedTable`, made from its arguments.

    ranks, replicas: the groups, as this rank sees them. sharding: which rows are whose. part: this rank's shard. rows,
    width and format are those of the whole table.
    """

    #: The last plan that hash_lookup was given, and the plan of this layer alone.
    _plan: tuple[HashPlan, HashPlan] | None = None

    @declares(**_KINDS)
    def __init__(
        self,
        config: EngramConfig,
        layer: int,
        group: "dist.ProcessGroup | None" = None,
        *,
        placement: Placement,
        split: Split = "columns",
        format: FormatName | None = None,
        scale: float = 1.0,
        fill: Fill | None = None,
        capacity: int | None = None,
        cache_bytes: int | None = None,
        node: "dist.ProcessGroup | None" = None,
        replicas: "dist.ProcessGroup | None" = None,
        reduce: Mean = "mean",
        **options,
    ):
        groups = Groups(group, node, replicas, _WHERE)
        self.groups, self.ranks, self.replicas = groups, groups.ranks, groups.replicas

        given = dict(config=config, layer=layer, placement=placement, split=split, format=format, scale=scale)
        given |= dict(fill=fill, capacity=capacity, cache_bytes=cache_bytes, reduce=reduce)

        def check() -> int:
            check_all(_WHERE, _KINDS, given)
            if cache_bytes is not None:
                fmt = row_format(format or config.format, _WHERE)
                check_cache(_WHERE, cache_bytes, capacity, fmt.stored_bytes(config.row_width))
            if options.get("keep"):
                raise ValueError(
                    f"{_WHERE}: parts of a table over ranks cannot be kept (keep=True): no digest says which rows they "
                    "hold. Keep a whole copy per node (EngramTable.from_safetensors)"
                )
            return layer_index(config, layer, _WHERE)

        index = groups.attempt(_WHERE, "checking its arguments", check)
        facts = {f"config's {name}": value for name, value in dataclasses.asdict(config).items()}
        facts |= {"layer": layer, "format": format or config.format, "capacity": capacity, "split": split}
        facts |= {"cache_bytes": cache_bytes}
        facts |= {"table's scale": scale, "shared by a node": node is not None, "reduce": reduce}
        groups.attempt(_WHERE, "comparing arguments", lambda: self.ranks.check_equal(facts, _WHERE))
        if self.replicas is not None:
            facts |= {"number of ranks": self.ranks.size, "part": self.ranks.rank}
            self.replicas.check_equal(facts, _WHERE)
            sources = self.replicas.gather(self.ranks.members, _WHERE, "the exchange of groups")
            #: Rank of the world behind each (replica, rank of its group).
            self.source_ranks = [rank for members in sources for rank in members]
        self.config, self.layer, self.capacity, self.reduce = config, layer, capacity, reduce
        self.counts, self.cache = dict.fromkeys(_COUNTS, 0), None
        self.format: RowFormat = row_format(format or config.format, _WHERE)
        self.placement, self.rows, self.width = placement, config.rows_per_layer[index], config.row_width
        self.sharding = shard_rows(config.primes[index], self.rows, self.ranks.size, split)
        self._maps: dict[torch.device, ShardMap] = {}
        self.part = self._make_shard(groups, scale, fill, options)
        copies = 1 if self.replicas is None else self.replicas.size
        self.part.shard = Shard(self.ranks, self.rows, copies, self.sharding.ranges(self.ranks.rank))
        if cache_bytes is not None:
            versions = self.ranks.gather(self.part.version, _WHERE, "the versions of shards")
            others = self.rows - self.sharding.part_rows[self.ranks.rank]
            self.cache = RankCache(others, self.format.stored_bytes(self.width), cache_bytes, versions)
        contributors = self.ranks.size * copies
        self.part.gradient_of = partial(_scaled_gradient, factor=1 / contributors if reduce == "mean" else 1.0)

    def map(self, device: torch.device) -> ShardMap:
        """The sharding as tensors on ``device``."""
        if device not in self._maps:
            self._maps[device] = ShardMap(self.sharding, device)
        return self._maps[device]

    def metrics(self) -> dict[str, int]:
        """What lookups without ``capacity`` exchanged so far, for a scraper; those of the shard are ``part.metrics()``.

        lookups: calls. distinct: rows of other ranks that these asked for, each distinct one of a call once. hits: of
        these, found in the cache. received: of these, from other ranks. given: rows to other ranks. entries: rows that
        the cache has room for, and nbytes, its bytes; both are 0 before the first lookup.
        """
        kept = [] if self.cache is None else [*self.cache.kept.values()]
        return self.counts | dict(entries=sum(it.entries for it in kept), nbytes=sum(it.nbytes for it in kept))

    @property
    def closed(self) -> bool:
        return self.part.closed

    @property
    def own_scale(self) -> float | None:
        """The one scale of a whole table, of formats "e4m3" and "nvfp4"; else None."""
        return self.part.own_scale

    @property
    def default_out_dtype(self) -> torch.dtype:
        """The table's own dtype where that is dense, else bfloat16."""
        return self.part.default_out_dtype

    @property
    def requires_row_grad(self) -> bool:
        """Whether autograd follows values that are read from this table."""
        return self.part.requires_row_grad

    @property
    def anchor(self) -> torch.Tensor | None:
        """What stands for the rows in autograd; its gradient is the norm over all ranks' rows, the same on each."""
        return self.part.anchor

    @property
    def token_map(self) -> str | None:
        """Digest of the token map by which rows are chosen, which files keep; see :class:`EngramTable`."""
        return self.part.token_map

    @token_map.setter
    def token_map(self, digest: str | None) -> None:
        self.part.token_map = digest

    @takes(requires=Flag())
    def requires_row_grad_(self, requires: bool = True) -> Self:
        """Make the rows trainable, on every rank, or with ``requires=False`` no longer so; optimizers take ``part``.

        Returns the table. ValueError for formats that are not dense, with overlays, and with ``cache_bytes``.
        """
        if requires:
            self._check_trainable("ShardedTable.requires_row_grad_")
        self.part.requires_row_grad_(requires)
        return self

    def zero_row_grad(self) -> None:
        """Forget the gradient of this rank's rows."""
        self.part.zero_row_grad()

    def __repr__(self) -> str:
        rank = f"rank {self.ranks.rank} of {self.ranks.size}"
        return f"ShardedTable({self.rows:,} x {self.width} by {self.sharding.split}, {rank}: {self.part!r})"

    def _own_plan(self, plan: HashPlan, where: str) -> HashPlan:
        """The plan of this layer alone."""
        if self._plan is None or self._plan[0] is not plan:
            own = layer_plan(plan, self.config, self.layer, where)
            if own.rows_per_layer[0] > self.rows:
                raise ValueError(f"{where}: plan must fit {self.rows} rows, got {own.rows_per_layer[0]}")
            self._plan = (plan, own)
        return self._plan[1]

    def _check_trainable(self, where: str) -> None:
        if self.cache is not None:
            raise ValueError(f"{where}: rows that are trained are not kept; make the table without cache_bytes")

    def _make_shard(self, groups: Groups, scale: float, fill: Fill | None, options: dict) -> EngramTable:
        # A rank without rows keeps one that nobody asks for, so that every rank has a table.
        shape = (max(1, self.sharding.part_rows[self.ranks.rank]), self.width, self.format.name)
        made: list[EngramTable] = []

        def make() -> None:
            made.append(EngramTable.empty(*shape, placement=self.placement, scale=scale, **options))
            if fill is not None:
                fill(made[0], self.sharding.ranges(self.ranks.rank))
            if self.placement == "shared":
                made[0].publish()

        def share() -> None:
            if self.placement != "shared":
                raise ValueError(f"{_WHERE}: node is for placement 'shared', got {self.placement!r}")
            groups.node.attempt(_WHERE, "making the node's part", make if groups.node.rank == 0 else lambda: None)
            if not made:
                kept = dict(scale=scale if self.format.table_scale else None, scales=options.get("scales"))
                made.append(EngramTable.attach(options.get("name"), *shape, **kept, timeout=60.0))

        try:
            groups.attempt(_WHERE, "making its part", make if groups.node is None else share)
        except BaseException:
            for shard in made:
                shard.close()
            raise
        return made[0]


def _scaled_gradient(row_ids: torch.Tensor, grad: torch.Tensor, rows: int, factor: float) -> RowGradient:
    """Entries from all ranks and replicas, added and then multiplied."""
    found = row_gradient(row_ids, grad, rows)
    return found if factor == 1 else found.times(found.squares.new_tensor(factor))


def layer_index(config: EngramConfig, layer: int, where: str) -> int:
    """The number of ``layer`` among the config's; ValueError where there is none."""
    if layer not in config.layers:
        raise ValueError(f"{where}: layer must be one of the config's, {config.layers}, got {layer}")
    return config.layers.index(layer)
