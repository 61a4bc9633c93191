"""Plots of a run's JSON, where matplotlib is installed.

Gather rates and latency of few tokens, gates against a copy, what a step costs, and the link over footprints.
"""

import importlib.util
from pathlib import Path

from .report import WAITING_TOKENS, fraction, rate

LOOKUPS = ("lookup", "hash_lookup")
GATES = ("gate_residual", "gate_conv_residual", "gate_residual_backward", "gate_conv_residual_backward")


def write_plots(content: dict, base: Path) -> list[Path]:
    """PNG files beside ``base`` (``<base>-gather.png`` and so on); none where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, draw in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        try:
            if draw(axes, content):
                environment = content["environment"]
                axes.set_xlabel(axes.get_xlabel() or "tokens")
                axes.set_xscale("log", base=2)
                axes.legend(fontsize="small")
                axes.set_title(f"{axes.get_title()}\n{environment.get('gpu')}, {environment.get('date')}", fontsize=10)
                written.append(base.with_name(f"{base.name}-{name}.png"))
                figure.savefig(written[-1], dpi=120)
        finally:
            pyplot.close(figure)
    return written


def label_end(line, text: str, shift: int = 0) -> None:
    """Writes ``text`` in the line's colour behind its last point, ``shift`` points higher: no legend covers a curve."""
    x, y = line.get_data()
    style = dict(textcoords="offset points", va="center", color=line.get_color(), fontsize=9, annotation_clip=False)
    line.axes.annotate(text, (x[-1], y[-1]), xytext=(8, shift), **style)


def plain_ticks(axis, values, text: str = "{:g}") -> None:
    """These ticks alone, as numbers that are read at once: 0.5 and not 2^-1."""
    axis.set_ticks(list(values), [text.format(value) for value in values])
    axis.set_ticks([], minor=True)


def _series(content: dict, ops, accept=lambda record: True) -> dict[str, list[dict]]:
    """Label -> records by rising T, of the cases that have a time."""
    series: dict[str, list[dict]] = {}
    for record in content["cases"]:
        if record["status"] == "ok" and record["op"] in ops and accept(record):
            label = " ".join(part for part in (record["op"], record["model"], record["variant"]) if part)
            series.setdefault(label, []).append(record)
    return {label: sorted(records, key=lambda record: record["tokens"]) for label, records in series.items()}


def _draw(axes, series: dict[str, list[dict]], value) -> bool:
    for label, records in series.items():
        axes.plot([record["tokens"] for record in records], [value(record) for record in records], "o-", label=label)
    return bool(series)


def _gather(axes, content: dict) -> bool:
    drawn = _draw(
        axes, _series(content, LOOKUPS, lambda record: record["link_bytes"]), lambda record: rate(record) / 1e9
    )
    for name, style in (("zero_copy", "--"), ("copy_engine", ":")):
        if content["roofs"]:
            axes.axhline(content["roofs"][name] / 1e9, color="black", linestyle=style, label=f"roof: {name}")
    axes.set_title("Rows gathered from host memory")
    axes.set_ylabel("GB/s over the link")
    return drawn


def _latency(axes, content: dict) -> bool:
    drawn = _draw(
        axes,
        _series(content, LOOKUPS, lambda record: record["link_bytes"] and record["tokens"] <= WAITING_TOKENS),
        lambda record: record["median"] * 1e6,
    )
    if content["roofs"]:
        axes.axhline(content["roofs"]["empty"] * 1e6, color="black", linestyle="--", label="empty kernel")
    axes.set_title("Lookups of few tokens, cold")
    axes.set_ylabel("us")
    return drawn


def _gate(axes, content: dict) -> bool:
    if not content["roofs"]:
        return False
    drawn = _draw(axes, _series(content, GATES), lambda record: fraction(record, content["roofs"]))
    axes.axhline(1, color="black", linestyle="--", label="roof: device_copy")
    axes.set_title("Gates against a copy within device memory")
    axes.set_ylabel("fraction of the copy's rate")
    return drawn


def _step(axes, content: dict) -> bool:
    steps = [record for record in content.get("steps", ()) if record["status"] == "ok"]
    for decoder in dict.fromkeys(record["decoder"] for record in steps):
        records = sorted((r for r in steps if r["decoder"] == decoder), key=lambda record: record["batch"])
        batches = [record["batch"] for record in records]
        for mode, style in (("ready", ":"), ("inline", "--"), ("side", "o-"), ("by_layer", "s-"), ("projected", "^-")):
            costs = [100 * record["cost"][mode] for record in records]
            axes.plot(batches, costs, style, label=f"{decoder}, {mode.replace('_', ' ')}")
        if records[0]["paper"] is not None:
            label = f"paper, {decoder}: {records[0]['paper']:.2%}"
            axes.axhline(100 * records[0]["paper"], color="black", linestyle="-.", linewidth=0.8, label=label)
    axes.set_title("What two Engram layers with tables on the host cost a decoder's step")
    axes.set_xlabel("sequences, one token each")
    axes.set_ylabel("% of throughput lost")
    return bool(steps)


def _footprint(axes, content: dict) -> bool:
    entries = (content["roofs"] or {}).get("footprints", [])
    for pages in dict.fromkeys(entry["pages"] for entry in entries):
        found = [entry for entry in entries if entry["pages"] == pages]
        rates = [entry["linear"] / 1e9 for entry in found]
        axes.plot([entry["bytes"] / 2**30 for entry in found], rates, "o-", label=f"{pages} pages")
    axes.set_title("Linear zero-copy reads of host memory over the footprint")
    axes.set_xlabel("GiB")
    axes.set_ylabel("GB/s over the link")
    return bool(entries)


PLOTS = {"gather": _gather, "latency": _latency, "gate": _gate, "step": _step, "footprint": _footprint}
