"""Process groups that follow the nodes of a job: the ranks of one node, and one rank of each."""

import os
from datetime import timedelta
from pathlib import Path

from .exchange import Ranks

_WHERE = "ShardedTable.node_groups"


def make_node_groups(ranks: Ranks, node: str | None, timeout: timedelta | None):
    """(ranks of this rank's node, ranks in the same place on every node), as new process groups."""
    import torch.distributed as dist

    labels = ranks.gather(_this_node() if node is None else node, _WHERE, "the names of nodes")
    nodes: dict[str, list[int]] = {}
    for member, label in zip(ranks.members, labels, strict=True):
        nodes.setdefault(label, []).append(member)
    sizes = {label: len(members) for label, members in nodes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{_WHERE}: every node must have the same number of ranks, got {sizes}")
    inside = nodes[labels[ranks.rank]]
    place = inside.index(ranks.members[ranks.rank])
    across = [members[place] for members in nodes.values()]
    # Only members take part in making a group, so that it works within a part of the world too.
    return tuple(dist.new_group(it, timeout=timeout, use_local_synchronization=True) for it in (inside, across))


def _this_node() -> str:
    """A name that the processes of one running system share, containers with their own host names apart."""
    return f"{os.uname().nodename} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
