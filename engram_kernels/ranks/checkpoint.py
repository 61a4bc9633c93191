"""One checkpoint of a table over ranks, whatever their number: each rank reads and writes its own rows.

Writing, rank 0 lays the files out under temporary names (checkpoints/table_writer.py); every rank writes its rows into
them and brings them to the disk; when all have said so, rank 0 puts them in place by rename. Where a rank fails, dies
or hangs before that, rank 0 finds out in the same exchange and removes them.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from engram_kernels.checkpoints.files import Checkpoint, Paths
from engram_kernels.checkpoints.parallel import CHUNK, THREADS, run_chunks, spans
from engram_kernels.checkpoints.table_writer import RowsFiles, TableWriter
from engram_kernels.checkpoints.validate import StoredTable, select_table
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import check_all
from engram_kernels.launching.exchange import Groups
from engram_kernels.tables.engram import LOAD_KINDS, SAVE_KINDS
from engram_kernels.tables.files import check_room, fill_table

from .rows import TABLE_KINDS, ShardedRows, layer_index
from .sharding import SPLITS, shard_rows

_LOAD, _SAVE = "ShardedTable.from_safetensors", "ShardedTable.save_safetensors"
Table = TypeVar("Table", bound=ShardedRows)


def load_sharded(
    kind: type[Table], paths: Paths, config: EngramConfig, layer: int, group, reading: dict, **options
) -> Table:
    """:meth:`ShardedTable.from_safetensors`. reading: its prefix, threads and progress."""
    groups = Groups(group, options.get("node"), options.get("replicas"), _LOAD)
    given = dict(paths=paths, config=config, layer=layer, placement=options["placement"], **reading)
    prefix = reading.pop("prefix")
    with ExitStack() as opened:

        def read_headers() -> tuple[Checkpoint, StoredTable]:
            check_all(_LOAD, TABLE_KINDS | LOAD_KINDS, given)
            index = layer_index(config, layer, _LOAD)
            checkpoint = opened.enter_context(Checkpoint(paths, _LOAD))
            stored = select_table(checkpoint, config, layer, prefix)
            if groups.node is None or groups.node.rank == 0:  # which makes the shard
                split = options.get("split", SPLITS[0])
                sharding = shard_rows(config.primes[index], config.rows_per_layer[index], groups.ranks.size, split)
                nbytes = sharding.part_rows[groups.ranks.rank] * (stored.nbytes // stored.rows)
                way_out = "free memory, or use more ranks, or one part per node (node=)"
                check_room("its part", nbytes, options["placement"], _LOAD, way_out)
            return checkpoint, stored

        checkpoint, stored = groups.attempt(_LOAD, "reading the checkpoint's headers", read_headers)
        # What headers tell: ranks that read different checkpoints find out before they read rows.
        tensors = [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in (*stored.weights, *stored.scales)]
        facts = {"checkpoint's tensors": tensors, "checkpoint's scale": stored.scale}
        facts["checkpoint's token map"] = stored.token_map
        groups.attempt(_LOAD, "comparing checkpoints", lambda: groups.ranks.check_equal(facts, _LOAD))

        def fill(shard, ranges) -> None:
            fill_table(shard, checkpoint, stored, ranges=ranges, **reading)

        scale = 1.0 if stored.scale is None else stored.scale
        table = kind(config, layer, group, format=stored.format.name, scale=scale, fill=fill, **options)
        table.token_map = stored.token_map
        return table


def save_sharded(table: ShardedRows, path: str | os.PathLike, writing: dict) -> Path:
    """:meth:`ShardedTable.save_safetensors`. writing: its prefix, shard_bytes and metadata."""
    ranks = table.ranks
    shape = dict(
        format=table.format, rows=table.rows, width=table.width, scale=table.part.own_scale, token_map=table.token_map
    )
    with ExitStack() as held:

        def lay_out() -> TableWriter | None:
            check_all(_SAVE, SAVE_KINDS, dict(path=path, **writing))
            return None if ranks.rank else held.enter_context(TableWriter(path, _SAVE, **shape, **writing))

        writer = ranks.attempt(_SAVE, "laying out the files", lay_out)
        files = ranks.gather(writer and writer.rows_files, _SAVE, "the layout of the files")[0]
        ranks.attempt(_SAVE, "writing its rows", lambda: _write(table, files))
        done = ranks.attempt(_SAVE, "putting the files in place", lambda: writer and writer.commit())
        return ranks.gather(done, _SAVE, "the name of the file")[0]


def _write(table: ShardedRows, files: RowsFiles) -> None:
    """Write this rank's rows, which are on the disk when it returns."""
    weight, scale = table.part.weight, table.part.scale
    table.part.wait_for_steps()
    files.open()
    try:
        rows = max(1, CHUNK // sum(files.sizes))
        chunks, position = [], 0
        for begin, end in table.sharding.ranges(table.ranks.rank):
            chunks += [(begin + low, position + low, position + high) for low, high in spans(end - begin, rows)]
            position += end - begin

        def write(chunk: tuple[int, int, int]) -> int:
            begin, low, high = chunk
            return files.write(begin, weight[low:high], scale[low:high] if files.sizes[1] else None)

        run_chunks(chunks, write, threads=THREADS, total=position * sum(files.sizes))
        files.sync()
    finally:
        files.close()
