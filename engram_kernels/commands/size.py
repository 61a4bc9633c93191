"""``engram-kernels size``: what a model's Engram layers move and hold, alone and over ranks, in words."""

import argparse
from collections.abc import Sequence

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format
from engram_kernels.ranks.sharding import shard_rows
from engram_kernels.tables.memory.report import total_host_memory

from .arguments import CommandError
from .console import gib, print_json, print_sections
from .plan import Job, plan_facts, plan_sections
from .presets import PRESETS, layer_bytes, read_config, row_bytes
from .traffic import (
    LINK,
    LINKS,
    MEMORY,
    SHARES,
    LayerTraffic,
    exchange_a_token,
    fetched_share,
    floor_seconds,
    gradient_exchange,
    layer_traffic,
    link_seconds,
    most_ranks,
    replica_exchange,
)

TOKENS = (1, 8, 128, 2048, 8192)
#: A model by name, or as presets.read_config returned it.
Model = str | tuple[str, EngramConfig]


def run(arguments: argparse.Namespace) -> int:
    """The exit code, 0."""
    _check_plan(arguments)
    model = read_config(arguments.config, arguments.format)
    tokens, hit_rate = arguments.tokens or TOKENS, arguments.hit_rate
    link, memory = arguments.link or LINK, arguments.memory or MEMORY
    ranks, rank_tokens = arguments.ranks, max(arguments.tokens or (8192,))
    if arguments.json:
        of_ranks = None if ranks is None else rank_facts(model, ranks, rank_tokens, link, hit_rate)
        plan = plan_facts(model[1], _job(arguments), hit_rate) if arguments.plan else None
        print_json(size_facts(model, tokens, link, memory, hit_rate) | {"ranks": of_ranks, "plan": plan})
        return 0
    sections = size_sections(model, tokens, link, memory, hit_rate)
    if ranks is not None:
        sections += rank_sections(model, ranks, rank_tokens, link, hit_rate)
    if arguments.plan:
        sections += plan_sections(model[1], _job(arguments), hit_rate)
    print_sections(sections)
    return 0


def _check_plan(arguments: argparse.Namespace) -> None:
    """Raise CommandError where something is said of a plan that nobody asked for."""
    for name in ("nodes", "node_ranks", "ram_gib", "cache_gib", "reads", "tokens_per_second"):
        if getattr(arguments, name) is not None and not arguments.plan:
            raise CommandError(f"--{name.replace('_', '-')}: expected --plan with it")


def _job(arguments: argparse.Namespace) -> Job:
    """What the arguments behind ``--plan`` say; the rest is this machine's, or what :class:`Job` has."""
    given = dict(nodes=arguments.nodes, ranks=arguments.node_ranks, link=arguments.link, reads=arguments.reads)
    given |= dict(tokens=max(arguments.tokens or (8192,)), wanted=arguments.tokens_per_second)
    given |= {
        name: None if size is None else int(size * 2**30)
        for name, size in (("ram", arguments.ram_gib), ("cache", arguments.cache_gib))
    }
    return Job(**dict(ram=total_host_memory()) | {name: each for name, each in given.items() if each is not None})


def size_facts(
    model: Model, tokens: Sequence[int], link: float = LINK, memory: float = MEMORY, hit_rate: float = 0.0
) -> dict:
    """The model's geometry and traffic, for programs: docs/commands.md has the keys."""
    name, config = read_config(model)
    scale = row_format(config.format, "size").scale_bytes(config.row_width)
    layers = zip(config.layers, config.rows_per_layer, layer_bytes(config), strict=True)
    return {
        "config": name,
        "format": config.format,
        "layers": [
            {"layer": layer, "rows": rows, "bytes": nbytes, "scale_bytes": rows * scale}
            for layer, rows, nbytes in layers
        ],
        "bytes": sum(layer_bytes(config)),
        "rates": {"link": link, "memory": memory, "hit_rate": hit_rate},
        "traffic": [_step_facts(layer_traffic(config, count), link, memory, hit_rate) for count in tokens],
    }


def _step_facts(traffic: LayerTraffic, link: float, memory: float, hit_rate: float) -> dict:
    """What one layer moves, and the least time of each step."""
    moved = 2 * traffic.out_bytes + traffic.weight_bytes + traffic.projected_bytes + traffic.gate_bytes
    return {
        "tokens": traffic.tokens,
        "link_bytes": (1 - hit_rate) * traffic.gather_bytes,
        "requests": (1 - hit_rate) * traffic.requests,
        "memory_bytes": moved + hit_rate * traffic.gather_bytes,
        "seconds": floor_seconds(traffic, link, memory, hit_rate),
    }


def size_sections(
    model: Model = PRESETS[0],
    tokens: Sequence[int] = TOKENS,
    link: float = LINK,
    memory: float = MEMORY,
    hit_rate: float = 0.0,
) -> list[list[tuple[str, str]]]:
    """The model's geometry and traffic in words, for :func:`console.print_sections`."""
    name, config = read_config(model)
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
        step = _step_facts(layer_traffic(config, count), link, memory, hit_rate)
        rows.append(
            f"{count:>7,} {step['link_bytes'] / 1e6:>9.3f} MB {step['requests']:>11,.0f} "
            f"{step['memory_bytes'] / 1e6:>9.1f} MB"
            + "".join(f"{seconds * 1e6:>11.2f} us" for seconds in step["seconds"].values())
        )
    labels = ["one layer"] + [""] * len(tokens)
    note = "floors of time are bytes over rate; at large T the projection is bound by arithmetic instead"
    memory_lines.append(("all layers", gib(sum(layer_bytes(config)))))
    return [head, memory_lines, [*zip(labels, rows, strict=True), ("", note)]]


def rank_facts(model: Model, ranks: int, tokens: int = 8192, link: float = LINK, hit_rate: float = 0.0) -> dict:
    """What a step of ``tokens`` tokens a rank costs, with copies of the table on hosts and sharded, for programs."""
    _, config = read_config(model)
    row = row_bytes(config)
    layers = zip(config.primes, config.rows_per_layer, strict=True)
    shardings = [shard_rows(primes, rows, ranks) for primes, rows in layers]
    id_bytes = max(sharding.id_dtype.itemsize for sharding in shardings)
    rows, others, most = tokens * config.columns, (ranks - 1) / ranks, [max(each.part_rows) for each in shardings]
    host = link_seconds(layer_traffic(config, 1).wire_bytes, link) / config.columns
    shares = {label: fetched_share(config, by_order) for label, by_order in SHARES.items()}
    if hit_rate:
        shares[f"hit rate {hit_rate:g}"] = 1 - hit_rate
    lookups = []
    for label, share in shares.items():
        moved = tokens * exchange_a_token(ranks, tokens, share * config.columns, row, id_bytes, label != "no cache")
        over_host = {"host_bytes": share * rows * row, "host_seconds": share * rows * host}
        lookups.append({"rows_fetched": label, "share": share, **over_host, **_exchange(moved)})
    entry = config.row_width * 2
    return {
        "ranks": ranks,
        "tokens": tokens,
        "split": shardings[0].split,
        "part": {"rows": max(most), "bytes": sum(most) * row, "of_bytes": sum(each.rows for each in shardings) * row},
        "links": LINKS,
        "lookups": lookups,
        "gradients": {
            "sharded": _exchange(sum(gradient_exchange(ranks, rows * others, entry, id_bytes))),
            "copies": _exchange(sum(replica_exchange(ranks, 1, rows, entry, id_bytes))),
        },
        "crossovers": _crossovers(ranks, host, row + id_bytes, shares["no cache"] * config.columns),
    }


def rank_sections(
    model: Model, ranks: int, tokens: int = 8192, link: float = LINK, hit_rate: float = 0.0
) -> list[list[tuple[str, str]]]:
    """The same in words, for :func:`console.print_sections`."""
    facts = rank_facts(model, ranks, tokens, link, hit_rate)
    titles = f"{'rows fetched':<23} {'share':>5} {'host link':>23} {'exchange':>11}"
    lookups = [titles + "".join(f"{link_name:>14}" for link_name in LINKS)]
    for lookup in facts["lookups"]:
        replicated = f"{lookup['host_bytes'] / 1e6:>9.2f} MB {_us(lookup['host_seconds'])}"
        lookups.append(f"{lookup['rows_fetched']:<23} {lookup['share']:>5.2f} {replicated} {_exchanged(lookup)}")
    gradients = [
        f"{'sharded: to the owner':<53} {_exchanged(facts['gradients']['sharded'])}",
        f"{'copies: to every rank':<53} {_exchanged(facts['gradients']['copies'])}",
    ]
    part = facts["part"]
    most = f"up to {part['rows']:,} rows a layer; all layers {gib(part['bytes'])} of {gib(part['of_bytes'])}"
    head = [
        (f"{ranks} ranks", f"{tokens:,} tokens a rank; traffic model: counted, not measured"),
        ("a rank's part", f"by {facts['split']}, {most}"),
        ("rates assumed", ", ".join(f"{name} {rate:g}" for name, rate in LINKS.items()) + f", host link {link:g} GB/s"),
    ]
    return [
        head,
        [*zip(["lookup, one layer"] + [""] * len(facts["lookups"]), lookups, strict=True)],
        [*zip(["bfloat16 gradients", ""], gradients, strict=True)],
        [
            ("crossovers", "parts in device memory, no cache, against one copy on the host"),
            *((name, _crossing(crossing)) for name, crossing in facts["crossovers"].items()),
        ],
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


def _crossovers(ranks: int, host: float, exchanged: int, token_rows: float) -> dict[str, dict]:
    """Where parts in device memory and one copy on the host are as fast. host: seconds a row over the host's link."""
    found = {}
    for name, rate in LINKS.items():
        exchange = exchanged / (rate * 1e9)
        own = (ranks - 1) / ranks * exchange
        saved = (host - own) * token_rows  # seconds a token
        found[name] = {
            "most_ranks": most_ranks(host, exchange),
            "cache_misses": own / host if own < host else None,
            "seconds_saved_a_token": saved if own < host else None,
        }
    return found


def _crossing(crossing: dict) -> str:
    most, misses = crossing["most_ranks"], crossing["cache_misses"]
    text = f"faster for {'any number of' if most == float('inf') else f'up to {int(most):,}'} ranks"
    if misses is not None:
        text += f"; ties with a cache that misses {misses:.0%} of these rows"
        text += f"; {1e-6 / crossing['seconds_saved_a_token']:,.0f} tokens earn 1 us of fixed cost"
    return text


def _exchange(nbytes: float) -> dict:
    """Bytes that a rank sends to others, and what that takes over each link."""
    seconds = {name: nbytes / (rate * 1e9) for name, rate in LINKS.items()}
    return {"exchange_bytes": nbytes, "exchange_seconds": seconds}


def _exchanged(facts: dict) -> str:
    times = "".join("   " + _us(seconds) for seconds in facts["exchange_seconds"].values())
    return f"{facts['exchange_bytes'] / 1e6:>8.2f} MB{times}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:>8.1f} us"
