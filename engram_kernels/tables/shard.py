"""What a table knows of the larger one that it is a part of."""

from typing import NamedTuple

from engram_kernels.launching.exchange import Ranks


class Shard(NamedTuple):
    """A part's place in a table over ranks."""

    ranks: Ranks  #: that hold the table together
    rows: int  #: of the whole table
    copies: int  #: of this part, on other ranks too (replicas), or read from one memory (node)
    ranges: tuple[tuple[int, int], ...]  #: ``[begin, end)`` of its rows that the part holds, one after the other
