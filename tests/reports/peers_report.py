"""Peers' kernels beside ours: the same jobs, counted alike, every result checked against the reference.

``python -m tests.reports.peers_report --peers DIR`` counts under the Triton at hand and writes its part of
``tests/data/peers_report.json``; with or without a folder it writes ``docs/peers_compiled.md`` from that and from what
``executed_report`` counted of ours. ``make peers-report`` counts under the oldest and the newest Triton.
CONTRIBUTING.md says how to fill the folder.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import triton

from bench.peers.adapters import Peers

from . import executed_report
from .executed_jobs import OF_PEERS, jobs
from .executed_report import HEAD, TARGET, count, counting_machine, newest_first, number, rows

JSON = Path(__file__).parents[1] / "data" / "peers_report.json"
MARKDOWN = Path(__file__).parents[2] / "docs" / "peers_compiled.md"
TITLES = dict(ours="ours", vllm="vLLM", sglang="SGLang", tilekernels="TileKernels")


def measure(folder: Path, families: Iterable[str] = OF_PEERS, say: Callable[[str], object] = print) -> dict:
    """Job -> release -> what its kernels execute under the Triton at hand."""
    peers = Peers(folder, say=say, asserts=False)
    versions = peers.describe()
    if not versions:
        raise SystemExit(f"{folder} holds no peer: see CONTRIBUTING.md")
    found = {}
    with counting_machine() as machine:
        for job in jobs(peers, families):
            for name, make in job.peers.items():
                call = make()
                release = f"{TITLES[name]} {versions[name]}"
                found.setdefault(job.name, {})[release] = count(machine, job, lambda call=call: call(0))
            if job.name in found:
                counts = {release: number(entry["instructions"]) for release, entry in found[job.name].items()}
                say(f"{job.name}, a {job.unit}: " + ", ".join(f"{release} {text}" for release, text in counts.items()))
    return found


def markdown(ours: dict, peers: dict) -> str:
    """The document, of what was counted by Triton version."""
    versions = newest_first(peers)
    releases = sorted({release for entries in peers[versions[0]].values() for release in entries})
    lines = [
        "# What the peers' kernels execute",
        "",
        f"The Triton kernels of {' and '.join(releases)} beside ours, written by `make peers-report` and",
        "`make compile-report`. The releases' own files are no part of this repository; their kernels are launched as",
        "their modules launch them, on the same inputs, and compared with the same reference. No GPU is involved.",
        "",
        HEAD.rstrip(),
    ]
    for version in versions:
        table = {}
        for job, entries in peers[version].items():
            table |= {f"{job}: {name}": entry for name, entry in _beside(ours[version][job], entries).items()}
        lines += ["", f"## Triton {version}", "", *rows(table), "", *_reading(ours[version], peers[version])]
    lines += ["", _REST.format(target=TARGET).rstrip()]
    return "\n".join(lines) + "\n"


def _beside(ours: dict, peers: dict) -> dict:
    return {"ours": ours} | {release.split()[0]: entry for release, entry in sorted(peers.items(), reverse=True)}


def _reading(ours: dict, peers: dict) -> list[str]:
    """For each job which peer executes the fewest instructions, and how ours compare."""
    lines = []
    for job, entries in peers.items():
        best = min(entries, key=lambda release: entries[release]["instructions"])
        mine, theirs = ours[job]["instructions"], entries[best]["instructions"]
        lines.append(
            f"- {job}: {number(mine)} a {ours[job]['unit']}, {mine / theirs:.2f} times the {number(theirs)} of "
            f"{best.split()[0]}."
        )
    return lines


_REST = """## What the tables do not say

- A gather from host memory waits for PCIe, not for instructions: the counts say what a kernel costs the multiprocessor
  beside other work, and which loads it asks of the memory system.
- SGLang's extend and decode also write the history of each request, which ours and vLLM leave to another launch; the
  launch that writes it behind an extend is counted with it.
- TileKernels is written in TileLang, which Triton does not compile, and the demo has no kernels.
- On scale byte 255 (NaN) the peers give infinity, and vLLM gives 0 for byte 0; the tables of these jobs hold neither.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=Path, help="folder with the releases' files; none: write the document alone")
    chosen = parser.parse_args(arguments)
    report = executed_report.load(JSON)
    if chosen.peers:
        report[triton.__version__] = measure(chosen.peers)
        executed_report.save(JSON, report)
        print(f"wrote {JSON} for Triton {triton.__version__}")
    MARKDOWN.write_text(markdown(executed_report.load(), report))
    print(f"wrote {MARKDOWN}")


if __name__ == "__main__":
    main()
