"""Tables over the ranks of a torch.distributed group.

A shard is what one rank holds of a table: some of its rows, in the table's order, as an EngramTable of its own
(``ShardedTable.part``). Replicas are ranks that hold the same shard. A row's position is its number within its shard.
"""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
