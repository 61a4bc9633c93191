"""``python -m engram_kernels size``: what a model's Engram layers move and hold, alone and over ranks, in words."""

import argparse
import sys
from collections.abc import Sequence

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format
from engram_kernels.ranks.sharding import Sharding, shard_rows

from .console import gib, print_sections
from .traffic import (
    LINK,
    LINKS,
    MEMORY,
    SHARES,
    LayerTraffic,
    fetched_share,
    floor_seconds,
    gradient_exchange,
    layer_traffic,
    link_seconds,
    lookup_exchange,
    most_ranks,
    replica_exchange,
)

PRESETS = ("deepseek_v41_flash", "engram_27b", "engram_40b", "deepseek_demo", "qwen38_flash_next")
TOKENS = (1, 8, 128, 2048, 8192)


def run_size(arguments: argparse.Namespace) -> int:
    """The exit code: 0, or 2 for a preset that does not exist."""
    if arguments.config not in PRESETS:
        known = ", ".join(PRESETS)
        print(f"engram_kernels size: --config must be one of {known}, got {arguments.config!r}", file=sys.stderr)
        return 2
    options = {name: getattr(arguments, name) for name in ("tokens", "link", "memory", "hit_rate")}
    options = {name: value for name, value in options.items() if value is not None}
    sections = size_sections(arguments.config, **options)
    if arguments.ranks is not None:
        options.pop("memory", None)
        options["tokens"] = max(options.get("tokens", (8192,)))
        sections += rank_sections(arguments.config, arguments.ranks, **options)
    print_sections(sections)
    return 0


def size_sections(
    name: str = PRESETS[0],
    tokens: tuple[int, ...] = TOKENS,
    link: float = LINK,
    memory: float = MEMORY,
    hit_rate: float = 0.0,
) -> list[list[tuple[str, str]]]:
    """The model's geometry and traffic in words, for :func:`console.print_sections`."""
    config = getattr(EngramConfig, name)()
    fmt = row_format(config.format, "size")
    row, scale = fmt.row_bytes(config.row_width), fmt.scale_bytes(config.row_width)
    layers = zip(config.layers, config.rows_per_layer, strict=True)
    memory_lines = [
        (f"table of layer {layer}", f"{rows:,} rows, {gib(rows * (row + scale))}" + _scales(rows * scale))
        for layer, rows in layers
    ]
    total = sum(config.rows_per_layer) * (row + scale)
    head = [
        (
            name,
            f"Engram layers: {len(config.layers)}; traffic model: counted, not measured",
        ),
        ("a token, a layer", _per_token(config, layer_traffic(config, 1))),
        ("rates assumed", f"link {link:g} GB/s at requests of 128 B, memory {memory:g} GB/s, hit rate {hit_rate:g}"),
    ]
    gated = "gate + conv" if config.conv_kernel else "gate"
    titles = ("T", "link", "requests", "memory", "gather", "project", gated)
    rows = [f"{titles[0]:>7} {titles[1]:>12} {titles[2]:>11} {titles[3]:>12}" + "".join(f"{t:>14}" for t in titles[4:])]
    for count in tokens:
        traffic = layer_traffic(config, count)
        moved = 2 * traffic.out_bytes + traffic.weight_bytes + traffic.projected_bytes + traffic.gate_bytes
        times = floor_seconds(traffic, link, memory, hit_rate).values()
        over_link = (1 - hit_rate) * traffic.gather_bytes
        rows.append(
            f"{count:>7,} {over_link / 1e6:>9.3f} MB {(1 - hit_rate) * traffic.requests:>11,.0f} "
            f"{(moved + hit_rate * traffic.gather_bytes) / 1e6:>9.1f} MB"
            + "".join(f"{seconds * 1e6:>11.2f} us" for seconds in times)
        )
    labels = ["one layer"] + [""] * len(tokens)
    note = "floors of time are bytes over rate; at large T the projection is bound by arithmetic instead"
    return [head, [*memory_lines, ("all layers", gib(total))], [*zip(labels, rows, strict=True), ("", note)]]


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


def _scales(nbytes: int) -> str:
    return f", {gib(nbytes)} of them scales" if nbytes else ""


def _per_token(config: EngramConfig, traffic: LayerTraffic) -> str:
    row, scale = traffic.row_bytes // traffic.rows, traffic.scale_bytes // traffic.rows
    scales = f" + {scale} of scales" if scale else ""
    form = "gate and convolution" if config.conv_kernel else "gate"
    return (
        f"{config.columns} rows x ({row} B{scales}) = {traffic.gather_bytes:,} B in {traffic.requests:g} requests; "
        f"{form} {traffic.gate_bytes:,} B; projection {traffic.weight_bytes / 1e6:.1f} MB of weights at any T"
    )


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
