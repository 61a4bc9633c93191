"""Loading of a rank's own rows from a checkpoint, whatever number of ranks has written it."""

from typing import TYPE_CHECKING

from engram_kernels.checkpoints.files import Checkpoint, Paths
from engram_kernels.checkpoints.parallel import check_threads
from engram_kernels.checkpoints.validate import StoredTable, select_table
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.tables.files import check_room, fill_table

from .exchange import Ranks, attempt_everywhere
from .sharding import SPLITS, shard_rows

if TYPE_CHECKING:
    from .sharded import ShardedTable

_WHERE = "ShardedTable.from_safetensors"
_WAY_OUT = "free memory, or use more ranks, or one part per node (node=)"


def load_sharded(
    kind: "type[ShardedTable]", paths: Paths, config: EngramConfig, layer: int, group, reading: dict, **options
) -> "ShardedTable":
    """:meth:`ShardedTable.from_safetensors`. reading: its prefix, threads and progress."""
    from .sharded import facts_of, replicas_of

    ranks, replicas = Ranks(group, _WHERE), replicas_of(options, _WHERE)
    prefix, threads = reading.pop("prefix"), reading["threads"]
    opened: list[Checkpoint] = []

    def look() -> StoredTable:
        check_threads(threads, _WHERE)
        facts_of(config, layer, None, None)
        opened.append(Checkpoint(paths, _WHERE))
        stored = select_table(opened[0], config, layer, prefix)
        check_room(
            "its part", _part_bytes(stored, config, layer, ranks, options), options["placement"], _WHERE, _WAY_OUT
        )
        return stored

    try:
        stored = attempt_everywhere(ranks, replicas, _WHERE, "reading the checkpoint's headers", look)
        compare = lambda: ranks.check_equal(_description(stored), _WHERE)  # noqa: E731
        attempt_everywhere(ranks, replicas, _WHERE, "comparing checkpoints", compare)

        def fill(part, ranges) -> None:
            fill_table(part, opened[0], stored, ranges=ranges, **reading)

        scale = 1.0 if stored.scale is None else stored.scale
        return kind(config, layer, group, format=stored.format.name, scale=scale, fill=fill, **options)
    finally:
        for checkpoint in opened:
            checkpoint.close()


def _part_bytes(stored: StoredTable, config: EngramConfig, layer: int, ranks: Ranks, options: dict) -> int:
    """Bytes of the part that this rank will ask memory for."""
    node = options.get("node")
    if node is not None and Ranks(node, _WHERE).rank:
        return 0
    index = config.layers.index(layer)
    sharding = shard_rows(
        config.primes[index], config.rows_per_layer[index], ranks.size, options.get("split", SPLITS[0])
    )
    return sharding.part_rows[ranks.rank] * (stored.nbytes // stored.rows)


def _description(stored: StoredTable) -> dict:
    """What headers tell of a checkpoint's table: ranks that read different ones find out before they read rows."""
    tensors = [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in (*stored.weights, *stored.scales)]
    return {"checkpoint's tensors": tensors, "checkpoint's scale": stored.scale}
