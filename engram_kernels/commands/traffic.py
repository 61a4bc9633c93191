"""What a table over ranks moves and holds beside one copy per rank or node, from the geometry alone.

    lookup      8 B a rank of counts, ids [a] to owners, rows [g] back: a = g = share * T * C * (W - 1) / W
    fixed       (W - 1) * (K + 1) ids, (W - 1) * K rows, whatever is asked for
    gradients   8 B a rank of counts, ids and entries [e]: e = T * C * (W - 1) / W; every rank's when tables are copies

Bytes that one rank sends to others in one layer; it receives as many on average. T tokens of a rank, C columns, W
ranks, K capacity; share: of a batch's rows, those that are fetched. The functions that are given numbers of rows are
exact, and tests compare them with what real processes exchange.
"""

from collections.abc import Sequence

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format
from engram_kernels.ranks.sharding import Sharding, shard_rows

from .console import gib
from .size import LINK, layer_traffic, link_seconds

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
COUNT_BYTES = 8


def lookup_exchange(ranks: int, asked: float, given: float, row_bytes: int, id_bytes: int) -> tuple[float, ...]:
    """Bytes to other ranks in a lookup's exchanges: counts, ids of ``asked`` rows, ``given`` rows with their scales."""
    return COUNT_BYTES * (ranks - 1), asked * id_bytes, given * row_bytes


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


def rank_sections(
    name: str, ranks: int, tokens: int = 8192, link: float = LINK, hit_rate: float = 0.0
) -> list[list[tuple[str, str]]]:
    """What a step of ``tokens`` tokens a rank costs in words, with copies of the table on hosts and sharded."""
    config = getattr(EngramConfig, name)()
    fmt, width = row_format(config.format, "size"), config.row_width
    row = fmt.row_bytes(width) + fmt.scale_bytes(width)
    layers = zip(config.primes, config.rows_per_layer, strict=True)
    shardings = [shard_rows(primes, rows, ranks) for primes, rows in layers]
    id_bytes = max(sharding.id_dtype.itemsize for sharding in shardings)
    rows, others = tokens * config.columns, (ranks - 1) / ranks
    host = link_seconds(layer_traffic(config, 1).wire_bytes, link) / config.columns
    titles = f"{'rows fetched':<23} {'share':>5} {'host link':>23} {'exchange':>11}"
    lookups = [titles + "".join(f"{link_name:>14}" for link_name in LINKS)]
    shares = {label: fetched_share(config, by_order) for label, by_order in SHARES.items()}
    if hit_rate:
        shares[f"hit rate {hit_rate:g}"] = 1 - hit_rate
    for label, share in shares.items():
        moved = sum(lookup_exchange(ranks, share * rows * others, share * rows * others, row, id_bytes))
        replicated = f"{share * rows * row / 1e6:>9.2f} MB {_us(share * rows * host)}"
        lookups.append(f"{label:<23} {share:>5.2f} {replicated} {moved / 1e6:>8.2f} MB" + _over_links(moved))
    entry = width * 2
    sharded = sum(gradient_exchange(ranks, rows * others, entry, id_bytes))
    copies = sum(replica_exchange(ranks, 1, rows, entry, id_bytes))
    gradients = [
        f"{'sharded: to the owner':<53} {sharded / 1e6:>8.2f} MB" + _over_links(sharded),
        f"{'copies: to every rank':<53} {copies / 1e6:>8.2f} MB" + _over_links(copies),
    ]
    head = [
        (f"{ranks} ranks", f"{tokens:,} tokens a rank; traffic model: counted, not measured"),
        ("a rank's part", _part(shardings, row)),
        ("rates assumed", ", ".join(f"{name} {rate:g}" for name, rate in LINKS.items()) + f", host link {link:g} GB/s"),
    ]
    return [
        head,
        [*zip(["lookup, one layer"] + [""] * len(shares), lookups, strict=True)],
        [*zip(["bfloat16 gradients", ""], gradients, strict=True)],
        _crossovers(ranks, host, row + id_bytes, shares["no cache"] * config.columns),
    ]


def _crossovers(ranks: int, host: float, exchanged: int, token_rows: float) -> list[tuple[str, str]]:
    """Where parts in device memory and one copy on the host are as fast. host: seconds a row over the host's link."""
    lines = []
    for name, rate in LINKS.items():
        exchange = exchanged / (rate * 1e9)
        most, own = most_ranks(host, exchange), (ranks - 1) / ranks * exchange
        text = f"faster for {'any number of' if most == float('inf') else f'up to {int(most):,}'} ranks"
        if own < host:
            saved = (host - own) * token_rows  # seconds a token
            text += f"; ties with a cache that misses {own / host:.0%} of these rows"
            text += f"; {1e-6 / saved:,.0f} tokens earn 1 us of fixed cost"
        lines.append((name, text))
    return [("crossovers", "parts in device memory, no cache, against one copy on the host"), *lines]


def _part(shardings: Sequence[Sharding], row: int) -> str:
    most = [max(sharding.part_rows) for sharding in shardings]
    total = sum(sharding.rows for sharding in shardings)
    size = f"all layers {gib(sum(most) * row)} of {gib(total * row)}"
    return f"by {shardings[0].split}, up to {max(most):,} rows a layer; {size}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:>8.1f} us"


def _over_links(nbytes: float) -> str:
    return "".join("   " + _us(nbytes / (rate * 1e9)) for rate in LINKS.values())
