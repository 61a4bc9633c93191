"""Tables, flags and Markdown from a run's JSON alone. Plots are in plots.py."""

import sys
from pathlib import Path

from bench.cache.report import CACHE_COLUMNS, cache_rows, missed_target
from bench.serving.step_report import PAIR_COLUMNS, STEP_COLUMNS, pair_rows, step_rows
from engram_kernels.commands.traffic import link_seconds

NOTES = Path(__file__).parents[1] / "NOTES.md"
COLUMNS = (
    "case",
    "median us",
    "spread",
    "MB",
    "GB/s",
    "of roof",
    "of floor",
    "round trips",
    "graph us",
    "host us",
    "registers",
    "programs",
    "baselines: times as long",
)
#: A fraction above this, or a zero-copy roof below this share of the copy engine's, needs an explanation.
TOO_FAST, SLOW_ROOF = 1.02, 0.6
#: Why a baseline was left out of a run; not a failure.
NO_TIME = "no time left"
#: Up to so many tokens a lookup from the host waits rather than streams, and is counted in round trips.
WAITING_TOKENS = 128


def rate(record: dict) -> float:
    """Bytes per second of the traffic that the case's roof is about: the link's for host tables, else all of it."""
    nbytes = record["link_bytes"] if record["roof"] == "zero_copy" else record["nbytes"]
    return nbytes / record["median"]


def fraction(record: dict, roofs: dict | None) -> float | None:
    """Of the matching roof."""
    roof = (roofs or {}).get(record["roof"])
    return rate(record) / roof if roof else None


def over_floor(record: dict, roofs: dict | None) -> float | None:
    """Measured time over the traffic model's least time at the rates of this run's roofs.

    Unlike the fraction it counts what else a row costs on the link: sectors in part and a header for every request.
    """
    if not roofs or not record["nbytes"]:
        return None
    over_link = link_seconds(record.get("wire_bytes", 0.0), roofs["zero_copy"] / 1e9)
    floor = max(over_link, (record["nbytes"] - record["link_bytes"]) / roofs["device_copy"])
    return record["median"] / floor


def round_trips(record: dict, roofs: dict | None) -> float | None:
    """Time over an empty kernel in round trips to the host, for a lookup of few tokens."""
    if not roofs or not roofs.get("round_trip") or not record["link_bytes"] or record["tokens"] > WAITING_TOKENS:
        return None
    return (record["median"] - roofs["empty"]) / roofs["round_trip"]


def cells(record: dict, roofs: dict | None) -> list[str]:
    """One line of the table; a failed case has its reason and no numbers."""
    if record["status"] != "ok":
        return [record["name"], f"FAILED: {record.get('reason', 'unknown')}"] + [""] * (len(COLUMNS) - 2)
    kernels = record.get("kernels") or []
    share, trips, floor = fraction(record, roofs), round_trips(record, roofs), over_floor(record, roofs)
    return [
        record["name"],
        microseconds(record["median"]),
        f"{(record['high'] - record['low']) / record['median']:.0%}",
        f"{record['nbytes'] / 1e6:.3g}",
        f"{rate(record) / 1e9:.3g}",
        "" if share is None else f"{share:.3f}",
        "" if floor is None else f"{floor:.3g}x",
        "" if trips is None else f"{trips:.1f}",
        microseconds(record.get("graph")),
        microseconds(record.get("host")),
        _joined(kernel["registers"] for kernel in kernels),
        _joined(kernel["programs"] for kernel in kernels),
        "; ".join(baseline_text(name, entry, record) for name, entry in record["baselines"].items()),
    ]


def baseline_text(name: str, entry: dict, record: dict) -> str:
    for kind in ("failed", "skipped"):
        if kind in entry:
            return f"{name} {kind} ({entry[kind][:60]})"
    own, ours = entry.get("graph"), record.get("graph")
    in_graphs = f" ({own / ours:.3g}x in a graph)" if own and ours else ""
    return f"{name} {entry['median'] / record['median']:.3g}x{in_graphs}"


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.2f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def roof_lines(roofs: dict | None) -> list[tuple[str, str]]:
    """Each roof in words."""
    if not roofs:
        return [("roofs", "not measured")]
    lines = [(name, f"{roofs[name] / 1e9:.1f} GB/s") for name in ("device_copy", "zero_copy", "copy_engine")]
    best = max(roofs["sweep"], key=lambda entry: entry["rate"])
    shape = f"{best['programs']} programs, loads of {best['width']} B, tiles of {best['tile']:,} B"
    lines[1] = ("zero_copy", f"{lines[1][1]}, best at {shape}; by programs: {_by_programs(roofs['sweep'])}")
    lines.append(("empty", f"{roofs['empty'] * 1e6:.2f} us"))
    lines.append(("round_trip", f"{roofs['round_trip'] * 1e6:.2f} us, at random over {_size(roofs['host_bytes'])}"))
    return lines + footprint_lines(roofs.get("footprints", []))


def footprint_lines(footprints: list[dict]) -> list[tuple[str, str]]:
    """Linear rate and round trip by footprint, a line for each kind of page."""
    lines = []
    for pages in dict.fromkeys(entry["pages"] for entry in footprints):
        found = [entry for entry in footprints if entry["pages"] == pages]
        share = found[-1]["huge_share"]
        kind = f"{pages} pages" + ("" if share is None else f", {share:.0%} found huge")
        points = [
            f"{_size(entry['bytes'])}: {entry['linear'] / 1e9:.1f} GB/s, {entry['round_trip'] * 1e6:.2f} us"
            for entry in found
        ]
        lines.append(("footprints", f"{kind}: {'; '.join(points)}"))
    return lines


def flags(content: dict, notes: str | None = None) -> list[str]:
    """What cannot be right, or needs a reason; said to be explained where NOTES.md names its subject in backticks."""
    notes = NOTES.read_text() if notes is None and NOTES.exists() else notes or ""
    found, roofs = [], content["roofs"]
    if roofs and roofs["zero_copy"] < SLOW_ROOF * roofs["copy_engine"]:
        share = roofs["zero_copy"] / roofs["copy_engine"]
        found.append(("zero_copy", f"the zero-copy roof is {share:.2f} of the copy engine, below {SLOW_ROOF}"))
    for record in content["cases"]:
        share = fraction(record, roofs) if record["status"] == "ok" else None
        if share is not None and share > TOO_FAST:
            found.append((record["name"], f"{record['name']} is at {share:.3f} of its roof, above {TOO_FAST}"))
        if record["status"] != "ok":
            found.append((record["name"], f"{record['name']} failed: {record.get('reason')}"))
        missed = missed_target(record)
        if missed is not None:
            found.append((record["name"], f"{record['name']}: {missed}"))
        for name, entry in record.get("baselines", {}).items():
            if entry.get("failed") not in (None, NO_TIME):
                found.append((name, f"baseline {name} of {record['name']} failed: {entry['failed']}"))
    for record in (*content.get("steps", ()), *content.get("interference", ())):
        if record["status"] != "ok":
            found.append((record["name"], f"{record['name']} failed: {record.get('reason')}"))
        elif not record.get("covered", True):
            found.append((record["name"], f"{record['name']}: the lookup ended before the matmuls did"))
    return [text + (" (explained in NOTES.md)" if f"`{subject}`" in notes else "") for subject, text in found]


def environment_lines(environment: dict) -> list[tuple[str, str]]:
    return [(name, _words(value)) for name, value in environment.items() if value is not None]


def markdown(content: dict) -> str:
    """The whole report, as text to commit beside the JSON."""
    environment = content["environment"]
    lines = [f"# Benchmarks on {environment.get('gpu')}, {environment.get('date')}", ""]
    lines += [f"{len(content['cases'])} cases; {len(content['left_out'])} left out. Times are medians of cold calls."]
    lines += ["", "## Roofs, measured in this run", "", "| roof | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in roof_lines(content["roofs"])]
    for title, columns, rows in tables(content):
        lines += ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
    lines += ["", "## Flags", ""]
    lines += [f"- {flag}" for flag in flags(content)] or ["None."]
    lines += ["", "## Left out", ""]
    lines += [f"- {name}" for name in content["left_out"]] or ["Nothing."]
    lines += ["", "## Machine", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_escape(text)} |" for name, text in environment_lines(environment)]
    return "\n".join(lines) + "\n"


def tables(content: dict) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """(title, columns, rows) of all but the roofs; what was not measured has no table."""
    found = [
        ("Cases", COLUMNS, [cells(record, content["roofs"]) for record in content["cases"]]),
        ("A hot n-gram cache: predicted and measured gain", CACHE_COLUMNS, cache_rows(content["cases"])),
        ("What two Engram layers cost a decoder's step", STEP_COLUMNS, step_rows(content.get("steps", []))),
        ("A matmul beside a lookup", PAIR_COLUMNS, pair_rows(content.get("interference", []))),
    ]
    return [entry for entry in found if entry[2]]


def print_table(columns, rows, out=None) -> None:
    """A table by rich where it is installed, as aligned plain lines otherwise."""
    from engram_kernels.commands.console import has_rich

    out = out or sys.stdout
    rows = [[str(cell) for cell in row] for row in rows]
    if has_rich():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right", overflow="fold")
        for row in rows:
            style = "bold red" if any(cell.startswith("FAILED") for cell in row) else ""
            table.add_row(*[Text(cell, style=style) for cell in row])
        Console(file=out, width=None if out.isatty() else 240, markup=False, highlight=False).print(table)
        return
    widths = [max(len(line[index]) for line in [list(columns), *rows]) for index in range(len(columns))]
    for line in [list(columns), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=out)


def print_report(content: dict) -> None:
    """Roofs, cases, flags and what was left out, on the terminal."""
    print_table(("roof", "measured in the same run"), roof_lines(content["roofs"]))
    for title, columns, rows in tables(content):
        print(title)
        print_table(columns, rows)
    for flag in flags(content):
        print(f"FLAG: {flag}")
    if content["left_out"]:
        print(f"Left out, {len(content['left_out'])} cases: {', '.join(content['left_out'])}")


def _by_programs(sweep: list[dict]) -> str:
    best: dict[int, float] = {}
    for entry in sweep:
        best[entry["programs"]] = max(best.get(entry["programs"], 0), entry["rate"])
    return ", ".join(f"{programs}: {value / 1e9:.1f}" for programs, value in sorted(best.items()))


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.3g} MiB"


def _joined(values) -> str:
    return ", ".join("?" if value is None else f"{value:,}" for value in values)


def _words(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items() if entry is not None) or "unknown"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
