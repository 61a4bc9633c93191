"""Process groups that follow the nodes of a job: the ranks of one node, and one rank of each."""

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from engram_kernels.geometry.kinds import Instance, Optional, Text, check_all
from engram_kernels.launching.exchange import Ranks

from .rows import GROUP

_WHERE = "ShardedTable.node_groups"
NODE_KINDS = dict(group=GROUP, node=Optional(Text()), timeout=Optional(Instance(timedelta)))


def make_node_groups(group: "dist.ProcessGroup | None", node: str | None, timeout: timedelta | None):
    """:meth:`ShardedTable.node_groups`."""
    ranks = Ranks(group, _WHERE)
    given = dict(node=node, timeout=timeout)
    ranks.attempt(_WHERE, "checking its arguments", lambda: check_all(_WHERE, NODE_KINDS, given))
    if node is None:  # containers of one running system share its boot id, and have host names of their own
        node = f"{os.uname().nodename} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    labels = ranks.gather(node, _WHERE, "the names of nodes")
    nodes: dict[str, list[int]] = {}
    for member, label in zip(ranks.members, labels, strict=True):
        nodes.setdefault(label, []).append(member)
    sizes = {label: len(members) for label, members in nodes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{_WHERE}: every node must have the same number of ranks, got {sizes}")
    inside = nodes[labels[ranks.rank]]
    index = inside.index(ranks.members[ranks.rank])
    across = [members[index] for members in nodes.values()]
    # Only members take part in making a group, so that it works within a subset of the world too.
    return tuple(dist.new_group(it, timeout=timeout, use_local_synchronization=True) for it in (inside, across))
