"""``python -m engram_kernels size``: what a model's Engram layers move and hold, alone and over ranks, in words."""

import argparse
from collections.abc import Sequence

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format
from engram_kernels.ranks.sharding import Sharding, shard_rows

from .arguments import bandwidth, fraction, positive_int, rank_count
from .console import gib, print_sections
from .presets import PRESETS, layer_bytes, preset, row_bytes
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

TOKENS = (1, 8, 128, 2048, 8192)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What the command is told."""
    command.description = "The traffic model: what each step moves, and the least time that takes at given rates."
    add = command.add_argument
    add("--config", metavar="NAME", default=PRESETS[0], help="a preset of EngramConfig")
    add("--tokens", metavar="T", type=positive_int, action="append", help="may be given more than once")
    add("--link", metavar="GB/s", type=bandwidth, default=LINK, help="of the link to the host; default PCIe Gen5 x16")
    add("--memory", metavar="GB/s", type=bandwidth, default=MEMORY, help="of device memory; default an H200")
    add("--hit-rate", metavar="SHARE", type=fraction, default=0.0, help="rows that come from device memory; default 0")
    add("--ranks", metavar="N", type=rank_count, help="what a table over N ranks costs, beside copies")


def run(arguments: argparse.Namespace) -> int:
    """The exit code, 0."""
    preset(arguments.config)
    name, tokens, link, hit_rate = arguments.config, arguments.tokens, arguments.link, arguments.hit_rate
    sections = size_sections(name, tokens or TOKENS, link, arguments.memory, hit_rate)
    if arguments.ranks is not None:
        sections += rank_sections(name, arguments.ranks, max(tokens or (8192,)), link, hit_rate)
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
    scale = row_format(config.format, "size").scale_bytes(config.row_width)
    layers = zip(config.layers, config.rows_per_layer, layer_bytes(config), strict=True)
    memory_lines = [
        (f"table of layer {layer}", f"{rows:,} rows, {gib(nbytes)}" + _scales(rows * scale))
        for layer, rows, nbytes in layers
    ]
    head = [
        (name, f"Engram layers: {len(config.layers)}; traffic model: counted, not measured"),
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
    memory_lines.append(("all layers", gib(sum(layer_bytes(config)))))
    return [head, memory_lines, [*zip(labels, rows, strict=True), ("", note)]]


def rank_sections(
    name: str, ranks: int, tokens: int = 8192, link: float = LINK, hit_rate: float = 0.0
) -> list[list[tuple[str, str]]]:
    """What a step of ``tokens`` tokens a rank costs in words, with copies of the table on hosts and sharded."""
    config = getattr(EngramConfig, name)()
    row = row_bytes(config)
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
    entry = config.row_width * 2
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
