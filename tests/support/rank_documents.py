"""The blocks of docs/ranks.md, run by the ranks of a world: "rank_documents.documented"."""

import torch
import torch.distributed as dist

from engram_kernels import ShardedTable

from .rank_cases import HIDDEN, batches, config_of, plan_of, sharded


def documented(blocks, folder, name):
    """The blocks of docs/ranks.md, on a CPU; what the rows are before and after the step of the first."""
    config = config_of("wide", "float32")
    own = batches(dist.get_world_size(), "uneven")[dist.get_rank()]
    hidden = torch.randn(len(own), config.branches, HIDDEN, requires_grad=True)
    space = dict(config=config, layer=4, plan=plan_of(config), folder=folder, hidden=hidden, token_ids=own, group=None)
    space |= dict(max_tokens=40, tables=[sharded(config, layer, cache_bytes=1 << 20) for layer in config.layers])
    tables_made = []
    for block in blocks:
        for there, here in (('dist.init_process_group("nccl")', ""), ('"cuda"', '"cpu"'), ('"engram-1"', repr(name))):
            block = block.replace(there, here)
        exec(compile(block, "docs/ranks.md", "exec"), space)
        if space["table"] not in tables_made:
            tables_made.append(space["table"])
    shapes = [
        (it.placement, it.ranks.size, it.part.rows) if isinstance(it, ShardedTable) else (it.placement, None, it.rows)
        for it in tables_made
    ]
    for it in (space["rows"], *tables_made, *space["tables"]):
        it.close()
    return shapes, hidden.grad is not None
