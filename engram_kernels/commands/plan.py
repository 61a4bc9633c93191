"""``engram-kernels size --plan``: whether to replicate a layer's table on every node, shard it, or read it from disk.

A way to hold a layer takes memory of a node, and seconds a token of the host's link, of a link between ranks, or of the
drive (traffic.py has the formulas). Of all that fit together the ways are chosen whose busiest resource, which serves
one layer after the other, is done first. Nothing here is measured, but what a caller gives.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from engram_kernels.cache.prediction import cache_bytes
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format
from engram_kernels.ranks.sharding import shard_rows
from engram_kernels.tables.memory.direct import LEAST

from .console import gib
from .presets import layer_bytes
from .traffic import (
    ENTRIES,
    LINK,
    LINKS,
    SHARES,
    exchange_a_token,
    fetched_share,
    layer_traffic,
    link_seconds,
    page_reads,
    row_cache_bytes,
)

CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Job:
    """What a plan is for. Rates in GB/s but for ``reads``, random reads of a page that a node's drive answers a second.

    ram: bytes of a node's memory for tables. ranks: of a node, each with a host link and a link to other nodes of its
    own. tokens: of a rank's step. cache: bytes of a rank for caches of all layers. wanted: tokens a second of a node.
    """

    ram: int
    nodes: int = 1
    ranks: int = 1
    tokens: int = 8192
    link: float = LINK
    reads: float | None = None
    cache: int = CACHE_BYTES
    wanted: float | None = None


@dataclass(frozen=True)
class Way:
    """A way to hold one layer. Bytes and reads are those of a token, seconds those of a node's token, by resource."""

    way: str  #: "replicate", "shard" or "disk"
    cache: str  #: a label of SHARES
    share: float  #: of the rows that are fetched
    ram: int  #: of a node
    cache_bytes: int  #: of a rank, beside its lookups; of disk it is in ``ram``, since that cache is in host memory
    host_bytes: float
    exchange_bytes: float
    reads: float
    seconds: dict[str, float]

    def slowest(self, link: str) -> float:
        """Seconds a token of what binds it, where ranks are joined by ``link``; infinite where that is not known."""
        return max(self.seconds[resource] for resource in ("host", link, "drive"))


def layer_ways(config: EngramConfig, index: int, job: Job, hit_rate: float = 0.0) -> list[Way]:
    """All ways to hold the layer with number ``index`` in the config."""
    fmt = row_format(config.format, "layer_ways")
    row, stored = fmt.row_bytes(config.row_width), fmt.stored_bytes(config.row_width)
    rows, nbytes = config.rows_per_layer[index], layer_bytes(config)[index]
    host = link_seconds(layer_traffic(config, 1).wire_bytes, job.link) / config.columns / job.ranks
    sharding = shard_rows(config.primes[index], rows, job.nodes)
    shares = {label: fetched_share(config, by_order) for label, by_order in SHARES.items()}
    distinct = shares["no cache"] * config.columns
    shares |= {f"hit rate {hit_rate:g}": 1 - hit_rate} if hit_rate else {}
    found = []
    for label, share in shares.items():
        entries, fetched = ENTRIES.get(label, 0), share * config.columns

        def add(way: str, over_host: float = 0, exchanged: float = 0, reads: float = 0, label=label, share=share, **of):
            seconds = {name: exchanged / (rate * 1e9) / job.ranks for name, rate in LINKS.items()}
            seconds |= dict(
                host=over_host * host, drive=reads * (1 / job.reads if job.reads else math.inf if reads else 0)
            )
            counted = dict(host_bytes=over_host * stored, exchange_bytes=exchanged, reads=reads)
            found.append(Way(way, label, share, **of, **counted, seconds=seconds))

        add("replicate", fetched, ram=nbytes, cache_bytes=cache_bytes(config, entries) // len(config.layers))
        if job.nodes > 1:
            moved = (job.nodes, job.tokens, fetched, stored, sharding.id_dtype.itemsize, label != "no cache")
            # A rank's own rows are not kept.
            over_host = (distinct + (job.nodes - 1) * fetched) / job.nodes
            part = dict(ram=max(sharding.part_rows) * stored, cache_bytes=row_cache_bytes(config, entries, stored))
            add("shard", over_host, exchange_a_token(*moved), **part)
        each = rows * (stored - row) + LEAST + row_cache_bytes(config, entries, row)  # of each rank's own file
        add("disk", reads=page_reads(fetched, row), ram=job.ranks * each, cache_bytes=0)
    return found


def choose(config: EngramConfig, job: Job, link: str, hit_rate: float = 0.0) -> list[tuple[Way | None, str]]:
    """The way of each layer and the reason, where ranks of nodes are joined by ``link``; None where nothing fits.

    Of ways that are as fast the ones are taken that do less in all: no exchange's fixed cost is in these figures.
    """
    every = [layer_ways(config, index, job, hit_rate) for index in range(len(config.layers))]
    every = [[way for way in ways if way.cache_bytes <= job.cache // len(every)] for ways in every]
    plans = [_Plan(0, (0.0, 0.0, 0.0), ())]
    for ways in every:
        longer = [plan.beside(way, link) for plan in plans for way in ways if plan.ram + way.ram <= job.ram]
        plans = _undominated(longer) or [plan._replace(ways=(*plan.ways, None)) for plan in plans]
    best = min(plans, key=lambda plan: (max(plan.seconds), sum(plan.seconds), plan.ram))
    return [
        (way, _reason(way, ways, job.ram - best.ram + (0 if way is None else way.ram), link))
        for way, ways in zip(best.ways, every, strict=True)
    ]


class _Plan(NamedTuple):
    """Ways of the first layers; memory and seconds of host, link and drive are sums."""

    ram: int
    seconds: tuple[float, ...]
    ways: tuple[Way | None, ...]

    def beside(self, way: Way, link: str) -> "_Plan":
        # A drive of unknown rate is slower than any other way: one read a second.
        more = (way.seconds["host"], way.seconds[link], min(way.seconds["drive"], way.reads))
        seconds = tuple(old + new for old, new in zip(self.seconds, more, strict=True))
        return _Plan(self.ram + way.ram, seconds, (*self.ways, way))


def _undominated(plans: list[_Plan]) -> list[_Plan]:
    """Those that no other one beats in memory and seconds alike; of many equal layers few are left."""
    kept: list[_Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.ram, plan.seconds)):
        if not any(all(a <= b for a, b in zip(other.seconds, plan.seconds, strict=True)) for other in kept):
            kept.append(plan)
    return kept


def _reason(way: Way | None, ways: list[Way], free: int, link: str) -> str:
    """Why a layer takes ``way`` of ``ways``, where the others leave it ``free`` bytes of memory."""
    if way is None:
        return f"the least is {gib(min(it.ram for it in ways))} of memory, and {gib(free)} are free"
    rate = _rate(way.slowest(link))
    known = "at a rate that --reads would tell" if rate is None else f"{rate:,.0f} tokens/s"
    faster = [it for it in ways if it.slowest(link) < way.slowest(link) and it.ram > free]
    if not faster:
        return f"{known}, the fastest of all"
    needed = min(faster, key=lambda it: it.ram)
    return f"{known}, the fastest that fits: {needed.way} would need {gib(needed.ram)} of {gib(free)}"


def plan_facts(config: EngramConfig, job: Job, hit_rate: float = 0.0) -> dict:
    """Ways and choices for programs: docs/commands.md has the keys."""
    layers = []
    for index, layer in enumerate(config.layers):
        options = [
            {
                "way": way.way,
                "cache": way.cache,
                "share": way.share,
                "ram_bytes": way.ram,
                "fits": way.ram <= job.ram,
                "cache_bytes": way.cache_bytes,
                "host_bytes": way.host_bytes,
                "exchange_bytes": way.exchange_bytes,
                "reads": way.reads,
                "tokens_per_second": {resource: _rate(seconds) for resource, seconds in way.seconds.items()},
            }
            for way in layer_ways(config, index, job, hit_rate)
        ]
        layers.append({"layer": layer, "options": options})
    given = {"ram_bytes": job.ram, "nodes": job.nodes, "ranks": job.ranks, "tokens": job.tokens, "reads": job.reads}
    given |= {"cache_bytes": job.cache, "wanted": job.wanted}
    choices = {link: _choice(config, job, link, choose(config, job, link, hit_rate)) for link in LINKS}
    return given | {"layers": layers, "choices": choices}


def _choice(config: EngramConfig, job: Job, link: str, chosen: list[tuple[Way | None, str]]) -> dict:
    """What all layers of a step together are bound by: each resource serves one after the other."""
    ways = [way for way, _ in chosen if way is not None]
    seconds = {resource: sum(way.seconds[resource] for way in ways) for resource in ("host", link, "drive")}
    bound = max(seconds, key=seconds.__getitem__)
    rate = _rate(seconds[bound]) if len(ways) == len(chosen) else None
    layers = [
        {"layer": layer, "way": way and way.way, "cache": way and way.cache, "reason": reason}
        for layer, (way, reason) in zip(config.layers, chosen, strict=True)
    ]
    meets = None if job.wanted is None or rate is None else rate >= job.wanted
    return {"tokens_per_second": rate, "bound_by": bound, "meets": meets, "layers": layers}


def plan_sections(config: EngramConfig, job: Job, hit_rate: float = 0.0) -> list[list[tuple[str, str]]]:
    """The same in words, for :func:`console.print_sections`."""
    facts = plan_facts(config, job, hit_rate)
    nodes = f"{job.nodes} {'node' if job.nodes == 1 else 'nodes'} of {job.ranks} ranks, {job.tokens:,} tokens a rank"
    drive = "reads of its drive not given (--reads)" if job.reads is None else f"{job.reads:,.0f} reads/s of its drive"
    memory = f"{gib(job.ram)} of memory a node, {gib(job.cache)} of caches a rank, {drive}"
    sections = [[("plan", f"{nodes}; {memory}; counted, not measured")]]
    titles = f"{'':<29} {'memory':>13} {'cache':>9} {'over host':>9} {'exchanged':>9} {'reads':>5}"
    titles += "".join(f"{name:>11}" for name in ("host", *LINKS, "drive"))
    for layer in facts["layers"]:
        lines = [titles] + [_line(option) for option in layer["options"]]
        labels = [f"layer {layer['layer']}, a token"] + [""] * len(layer["options"])
        note = "! does not fit; cache: of a rank; host, links, drive: thousands of tokens/s of a node, each by itself"
        sections.append([*zip(labels, lines, strict=True), ("", note)])
    for link, choice in facts["choices"].items():
        rate = choice["tokens_per_second"]
        total = "no rate known" if rate is None else f"{rate:,.0f} tokens/s of a node, bound by {choice['bound_by']}"
        if choice["meets"] is not None:
            total += f"; {'enough' if choice['meets'] else 'too few'} for {job.wanted:,.0f}"
        lines = [(link, total)]
        for each in choice["layers"]:
            way = "nothing fits" if each["way"] is None else f"{each['way']}, {each['cache']}"
            lines.append((f"layer {each['layer']}", f"{way}: {each['reason']}"))
        sections.append(lines)
    return sections


def _line(option: dict) -> str:
    memory = gib(option["ram_bytes"]) + ("  " if option["fits"] else " !")
    line = f"{option['way'] + ', ' + option['cache']:<29} {memory:>13} {gib(option['cache_bytes']):>9} "
    line += f"{option['host_bytes']:>7,.0f} B {option['exchange_bytes']:>7,.0f} B {option['reads']:>5.1f}"
    rates = (option["tokens_per_second"][name] for name in ("host", *LINKS, "drive"))
    return line + "".join(f"{'' if rate is None else f'{rate / 1e3:,.0f}':>11}" for rate in rates)


def _rate(seconds: float) -> float | None:
    """Tokens a second; None where there is no such bound, or it is not known."""
    return None if seconds in (0, math.inf) else 1 / seconds
