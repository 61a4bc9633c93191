"""What ranks of a world do with overlays: called by name in every process of it (ranks.py), results are plain data."""

import torch
import torch.distributed as dist

from engram_kernels import ShardedTable, lookup, ngram_hash
from engram_kernels.testing import tables

from .rank_cases import WIDTH, batches, config_of, in_one_piece, plan_of, same, sharded, whole


def edits(config, count=9, shift=0):
    """(ids, rows as stored, scales or None) of the layer's table."""
    weight, scale = tables.random_parts(count, WIDTH, config.format, seed=5)
    ids = torch.randperm(config.rows_per_layer[1] - shift, generator=torch.Generator().manual_seed(7))[:count] + shift
    return ids, weight, scale if isinstance(scale, torch.Tensor) else None


def overlaid(kind, format, split, path, capacity=None, cache_bytes=None):
    """Whether lookups before, under and after overlays have the bits of one process, and what a rank saves."""
    config = config_of(kind, format)
    alone = in_one_piece(config)
    own = batches(dist.get_world_size(), "uneven")[dist.get_rank()]
    row_ids = torch.cat([ngram_hash(own, plan_of(config))[:, 1].flatten(), torch.arange(alone.rows)])[:, None]
    count = min(9, alone.rows)
    given, found = edits(config, count), []
    with sharded(config, split=split, capacity=capacity, cache_bytes=cache_bytes) as table:

        def check():
            found.append(same(table.lookup(row_ids), lookup(alone, row_ids)))
            return table.lookup(row_ids)

        plain = check()
        overlay, mine = table.overlay(*given), alone.overlay(*given)
        found.append(not same(check(), plain))
        if dist.get_rank() == 0:
            mine.save_safetensors(path)
        overlay.remove()
        mine.remove()
        found.append(same(check(), plain))
        with table.load_overlay(path) as loaded, mine.apply():
            check()
            found.append(loaded.applied)
        found.append(not loaded.applied and same(check(), plain))
    return found


def refused(what):
    """Errors that all ranks raise, and a table that none has written to."""
    config = config_of("wide", "float32")
    ids, rows, _ = edits(config)
    with sharded(config) as table:
        before = table.part.weight.clone()
        try:
            if what == "other ids":
                ids = ids + dist.get_rank()
            elif what == "not distinct":
                ids[1] = ids[0]
            elif what == "not a tensor":
                ids = [1, 2]
            elif what == "too few rows":
                rows = rows[:-1]
            elif what == "trainable on one rank" and dist.get_rank() == 1:
                table.requires_row_grad_()
            elif what == "under another":
                table.overlay(ids[3:4], rows[:1])
                before = table.part.weight.clone()
            table.overlay(ids, rows)
        finally:
            assert torch.equal(table.part.weight, before)


def on_a_node(name):
    """A shard that all ranks of a node read: one writes, and all read edited rows alone or none."""
    config = config_of("wide", "float32")
    alone = in_one_piece(config)
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    options = dict(group=own, node=dist.group.WORLD, placement="shared", name=name)
    ids, row_ids = edits(config), torch.arange(alone.rows)[:, None]
    with ShardedTable.from_tensors(*whole(config, 4), config=config, layer=4, **options) as table:
        version, found = table.part.version, []
        for _ in range(20):
            found.append(same(table.lookup(row_ids), lookup(alone, row_ids)))
            with table.overlay(*ids), alone.overlay(*ids):
                found.append(same(table.lookup(row_ids), lookup(alone, row_ids)))
        dist.barrier()
        return all(found), table.part.attached, table.part.version > version
