"""What a model's Engram layers move and hold: bytes, requests and the least time they take, from the geometry alone.

    gather    T * C rows of row bytes + scale bytes, over the link; requests of at most 128 B
    project   (H + 1) * D * C * R weights once, T * C * R inputs, T * (H + 1) * D outputs
    gate      (3 H + 1) * D elements a token: hidden, key, out and one value
    conv      (4 H + 2) * D elements a token instead: its two passes read hidden and value twice

T tokens, C columns, R row width, H branches, D hidden size. A floor is bytes over rate: no launch, no arithmetic.
"""

import math
from dataclasses import dataclass

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format

from .console import gib

PRESETS = ("deepseek_v41_flash", "engram_27b", "engram_40b", "deepseek_demo", "qwen38_flash_next")
TOKENS = (1, 8, 128, 2048, 8192)
#: Payload of PCIe Gen5 x16 in requests of 128 B, and what a copy reaches of an H200's memory; both in GB/s.
LINK, MEMORY = 54.5, 4300.0
REQUEST, SECTOR = 128, 32
#: Bytes of headers that come with each request's data.
HEADER = 20


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
        weight_bytes=(branches + 1) * config.hidden_size * width * (1 if fmt.dtype.itemsize == 1 else itemsize),
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
