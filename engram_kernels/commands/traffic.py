"""What Engram layers move, from the geometry alone: bytes, requests and the least time they take.

    gather      T * C rows of row bytes + scale bytes, over the link; requests of at most 128 B
    project     (H + 1) * D * C * R weights once, T * C * R inputs, T * (H + 1) * D outputs
    gate        (3 H + 1) * D elements a token: hidden, key, out and one value
    conv        (4 H + 2) * D elements a token instead: its two passes read hidden and value twice

T tokens, C columns, R row width, H branches, D hidden size. A floor is bytes over rate: no launch, no arithmetic.

A table over W ranks, beside one copy per rank or node; bytes that one rank sends to others in one layer, and receives
as many on average:

    lookup      8 B a rank of counts, ids [a] to owners, rows [g] back: a = g = share * T * C * (W - 1) / W
    cached      the same of what a cache missed, with 16 B a rank of counts and versions
    fixed       (W - 1) * (K + 1) ids, (W - 1) * K rows, whatever is asked for
    gradients   8 B a rank of counts, ids and entries [e]: e = T * C * (W - 1) / W; every rank's when tables are copies

Where a layer's rows may lie, for one token that fetches ``share`` of its C rows (what a cache before them missed):

    replicate   share * C rows over the host's link, from the node's memory
    shard       the same, of one shard per node, and a lookup's exchange between the ranks of one number on N nodes
    disk        share * C * spans(row bytes, 4,096) reads of a page, of a file whose rows begin at a page's start

T tokens of a rank, K capacity; share: of a batch's rows, those that are fetched. The functions that are given numbers
of rows are exact, and tests compare them with what real processes exchange.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format
from engram_kernels.reference.cache.simulator import TAG_BYTES
from engram_kernels.tables.memory.direct import PAGE

#: Payload of PCIe Gen5 x16 in requests of 128 B, and what a copy reaches of an H200's memory; both in GB/s.
LINK, MEMORY = 54.5, 4300.0
REQUEST, SECTOR = 128, 32
#: Bytes of headers that come with each request's data.
HEADER = 20
#: One direction of what joins ranks, GB/s: datasheets of NVLink 4 (H100, H200) and of one NDR port a GPU; what a copy
#: engine reaches over PCIe Gen5 x16.
LINKS = {"NVLink": 450.0, "PCIe": 52.0, "InfiniBand": 50.0}
#: Shares of rows that are fetched, by order from 2 on: 16 M tokens of English technical text, V4 tokenizer. Those of
#: caches are what an LRU of that many n-grams an order misses, filled token by token: repeats in a batch are hits.
SHARES = {
    "no cache": (0.57, 0.75, 0.83),  # distinct in 8,192 tokens
    "cache of 262,144": (0.18, 0.54, 0.69),
    "cache of 1,048,576": (0.11, 0.39, 0.59),
}
#: N-grams of an order that the caches of SHARES keep.
ENTRIES = {"no cache": 0, "cache of 262,144": 262_144, "cache of 1,048,576": 1_048_576}
COUNT_BYTES = 8


@dataclass(frozen=True)
class LayerTraffic:
    """What one Engram layer moves for ``tokens`` tokens. Bytes, but for ``rows`` and ``requests``."""

    tokens: int
    rows: int
    row_bytes: int
    scale_bytes: int
    requests: float  #: reads over the link; rows that straddle a line of 128 B count on average
    wire_bytes: float  #: over the link: data in sectors of 32 B, and a header for each request
    out_bytes: int  #: gathered rows, written and read again by the projection
    weight_bytes: int  #: of the projection, fp8 where rows are; its block scales are left out
    projected_bytes: int  #: key and value
    gate_bytes: int  #: of the gate, or of the gate with the convolution where the config has one

    @property
    def gather_bytes(self) -> int:
        return self.row_bytes + self.scale_bytes


def layer_traffic(config: EngramConfig, tokens: int, itemsize: int = 2) -> LayerTraffic:
    """Traffic of one layer; ``itemsize`` is that of the hidden state, and of rows once they are gathered."""
    fmt = row_format(config.format, "layer_traffic")
    row, scale = fmt.row_bytes(config.row_width), fmt.scale_bytes(config.row_width)
    rows = tokens * config.columns
    per_row = spans(row, REQUEST) + (spans(scale, REQUEST) if scale else 0)
    wire = (spans(row, SECTOR) + (spans(scale, SECTOR) if scale else 0)) * SECTOR + per_row * HEADER
    branches, width = config.branches, config.columns * config.row_width
    elements = 4 * branches + 2 if config.conv_kernel else 3 * branches + 1
    return LayerTraffic(
        tokens=tokens,
        rows=rows,
        row_bytes=rows * row,
        scale_bytes=rows * scale,
        requests=rows * per_row,
        wire_bytes=rows * wire,
        out_bytes=rows * config.row_width * itemsize,
        weight_bytes=(branches + 1) * config.hidden_size * width * (1 if fmt.scaled else itemsize),
        projected_bytes=tokens * (branches + 1) * config.hidden_size * itemsize,
        gate_bytes=tokens * elements * config.hidden_size * itemsize,
    )


def spans(size: int, line: int) -> float:
    """Lines that ``size`` bytes touch on average, where records of that size follow each other from a line's start."""
    starts = range(0, line, math.gcd(size, line))
    return sum(-(-(start + size) // line) for start in starts) / len(starts)


def link_seconds(wire_bytes: float, link: float) -> float:
    """Least time of ``wire_bytes`` over a link whose rate, in GB/s, is that of the payload of requests of 128 B."""
    return wire_bytes * REQUEST / (REQUEST + HEADER) / (link * 1e9)


def floor_seconds(
    traffic: LayerTraffic, link: float = LINK, memory: float = MEMORY, hit_rate: float = 0.0
) -> dict[str, float]:
    """Least time of each step. link and memory in GB/s; ``hit_rate`` of the rows come from device memory."""
    device = memory * 1e9
    missed = (1 - hit_rate) * link_seconds(traffic.wire_bytes, link)
    return {
        "gather": max(missed, (hit_rate * traffic.gather_bytes + traffic.out_bytes) / device),
        "project": (traffic.weight_bytes + traffic.out_bytes + traffic.projected_bytes) / device,
        "gate": traffic.gate_bytes / device,
    }


def lookup_exchange(
    ranks: int, asked: float, given: float, row_bytes: int, id_bytes: int, cached: bool = False
) -> tuple[float, ...]:
    """Bytes to other ranks in a lookup's exchanges: counts, ids of ``asked`` rows, ``given`` rows with their scales.

    cached: asked and given are what caches of rows missed, and versions go with the counts.
    """
    return COUNT_BYTES * (ranks - 1) * (1 + cached), asked * id_bytes, given * row_bytes


def exchange_a_token(
    ranks: int, tokens: int, rows: float, row_bytes: int, id_bytes: int, cached: bool = False
) -> float:
    """Bytes that a rank sends to others for one of its ``tokens``, which fetches ``rows`` rows, its own among them."""
    others = tokens * rows * (ranks - 1) / ranks
    return sum(lookup_exchange(ranks, others, others, row_bytes, id_bytes, cached)) / tokens


def page_reads(rows: float, row_bytes: int) -> float:
    """Reads of a page from a file for ``rows`` rows; those that share a page, which are few, count each for itself."""
    return rows * spans(row_bytes, PAGE)


def row_cache_bytes(config: EngramConfig, entries: int, row_bytes: int) -> int:
    """Of a cache of the rows of ``entries`` n-grams of each order, one by one: ``row_bytes`` of each, and its tag."""
    return entries * config.columns * (row_bytes + TAG_BYTES)


def fixed_exchange(ranks: int, capacity: int, row_bytes: int, id_bytes: int) -> tuple[int, ...]:
    """The same with a capacity: ids and the most rows asked for, rows."""
    return (ranks - 1) * (capacity + 1) * id_bytes, (ranks - 1) * capacity * row_bytes


def gradient_exchange(ranks: int, entries: float, entry_bytes: int, id_bytes: int) -> tuple[float, ...]:
    """Bytes to other ranks in a backward pass: counts, ids and gradients of ``entries`` tokens and columns."""
    return COUNT_BYTES * (ranks - 1), entries * id_bytes, entries * entry_bytes


def replica_exchange(replicas: int, ranks: int, entries: float, entry_bytes: int, id_bytes: int) -> tuple[float, ...]:
    """Bytes to the other replicas of a part that has received ``entries``, its own rank's included."""
    others = replicas - 1
    return others * ranks * COUNT_BYTES, others * entries * id_bytes, others * entries * entry_bytes


def fetched_share(config: EngramConfig, by_order: Sequence[float]) -> float:
    """The mean over the config's orders; orders beyond those measured repeat no more than the last."""
    orders = range(config.max_ngram - 1)
    return sum(by_order[min(order, len(by_order) - 1)] for order in orders) / len(orders)


def most_ranks(host: float, exchange: float) -> float:
    """Ranks up to which exchanging a row, (W - 1) / W * ``exchange`` seconds, is no slower than ``host`` seconds."""
    return float("inf") if host >= exchange else exchange / (exchange - host)
