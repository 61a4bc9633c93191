"""Plots of a run's JSON, where matplotlib is installed: gather rates, latency of few tokens, gates against a copy."""

import importlib.util
from pathlib import Path

from .report import WAITING_TOKENS, fraction, rate

LOOKUPS, GATES = ("lookup", "hash_lookup"), ("gate_residual", "gate_conv_residual")


def write_plots(content: dict, base: Path) -> list[Path]:
    """PNG files beside ``base`` (``<base>-gather.png`` and so on); none where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, draw in (("gather", _gather), ("latency", _latency), ("gate", _gate)):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        try:
            if draw(axes, content):
                environment = content["environment"]
                axes.set_xlabel("tokens")
                axes.set_xscale("log", base=2)
                axes.legend(fontsize="small")
                axes.set_title(f"{axes.get_title()}\n{environment.get('gpu')}, {environment.get('date')}", fontsize=10)
                written.append(base.with_name(f"{base.name}-{name}.png"))
                figure.savefig(written[-1], dpi=120)
        finally:
            pyplot.close(figure)
    return written


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
