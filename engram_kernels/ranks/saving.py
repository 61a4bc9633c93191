"""One checkpoint of a table that ranks hold parts of.

Rank 0 lays the files out under names of their own (checkpoints/table_writer.py); every rank writes its rows into them
and brings them to the disk; when all have said so, rank 0 puts them in place by rename. Where a rank fails, dies or
hangs before that, rank 0 finds out in the same exchange and removes them. The files do not depend on the number of
ranks.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from engram_kernels.checkpoints.parallel import CHUNK, THREADS, run_chunks, spans
from engram_kernels.checkpoints.table_writer import RowsFiles, TableWriter

if TYPE_CHECKING:
    from .sharded import ShardedTable

_WHERE = "ShardedTable.save_safetensors"


def save_sharded(
    table: "ShardedTable",
    path: str | os.PathLike,
    *,
    prefix: str = "",
    shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """:meth:`ShardedTable.save_safetensors`."""
    ranks = table.ranks
    scale = float(table.part.scale) if table.format.scaling == "table" else None
    shape = dict(format=table.format, rows=table.rows, width=table.width, scale=scale)
    with ExitStack() as held:

        def lay_out() -> TableWriter | None:
            if ranks.rank:
                return None
            options = dict(prefix=prefix, shard_bytes=shard_bytes, metadata=metadata)
            return held.enter_context(TableWriter(path, _WHERE, **shape, **options))

        writer = ranks.attempt(_WHERE, "laying out the files", lay_out)
        files = ranks.gather(writer and writer.rows_files, _WHERE, "the layout of the files")[0]
        ranks.attempt(_WHERE, "writing its rows", lambda: _write(table, files))
        done = ranks.attempt(_WHERE, "putting the files in place", lambda: writer and writer.commit())
        return ranks.gather(done, _WHERE, "the name of the file")[0]


def _write(table: "ShardedTable", files: RowsFiles) -> None:
    """This rank's rows, on the disk when it returns."""
    weight, scale = table.part.weight, table.part.scale
    table.part.wait_for_steps()
    files.open()
    try:
        rows = max(1, CHUNK // sum(files.sizes))
        chunks, at = [], 0
        for begin, end in table.sharding.ranges(table.ranks.rank):
            chunks += [(begin + low, at + low, at + high) for low, high in spans(end - begin, rows)]
            at += end - begin

        def write(chunk: tuple[int, int, int]) -> int:
            begin, low, high = chunk
            return files.write(begin, weight[low:high], scale[low:high] if files.sizes[1] else None)

        run_chunks(chunks, write, threads=THREADS, total=at * sum(files.sizes))
        files.sync()
    finally:
        files.close()
