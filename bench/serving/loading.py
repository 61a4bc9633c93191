"""Tables into and out of files, each way against what the drive, the memory or the arithmetic gives in the same run.

    python -m bench loading [--folder DIR] [--gib 2] [--rounds 5] [--only GROUP ...]

Writes tables of V4.1's rows to DIR, which should be on the drive in question, and removes them. Roofs and ways take
turns, in another order each time, since a drive's rate changes by the minute; medians are compared with medians, and
the best with the best. Cold: what the page cache has of the files is given back before each measurement. Warm: it has
them all.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from engram_kernels import EngramTable
from engram_kernels.checkpoints.convert import convert_table
from engram_kernels.checkpoints.files import Checkpoint, weight_map
from engram_kernels.checkpoints.validate import select_table
from engram_kernels.checkpoints.verify import check_values

from . import disk_roofs
from .disk_roofs import MIB
from .files import FORMAT, ROW_BYTES, WIDTH

PROCESSES = 2  # of a node, that share a table
SHARDS = 8
#: Threads and bytes of a piece of the roofs: the best of these is the roof.
DEPTHS = ((8, 4 * MIB), (8, 16 * MIB), (16, 4 * MIB))
COLUMNS = "{:50} {:>6} {:>8} {:>6} {:>8} {:>9}"


class Way(NamedTuple):
    """Something that is measured; what ``call`` returns is closed or removed after the clock has stopped."""

    name: str
    call: Callable[[], object]
    roof: str = ""  #: what it is the roof of; the roof of a group is the lowest of these, each the best of its ways


class Closed(NamedTuple):
    """What another loader made, and how it is closed."""

    tensors: list[torch.Tensor]
    calls: list[Callable[[], object]]

    def close(self) -> None:
        self.tensors.clear()
        for call in self.calls:
            call()


class Files(NamedTuple):
    """The same table, in one file and in several."""

    folder: Path
    one: Path
    several: Path  #: their index
    rows: int

    @property
    def shards(self) -> list[Path]:
        return sorted(set(weight_map(self.several, "bench").values()))

    @property
    def nbytes(self) -> int:
        return self.rows * ROW_BYTES


class Node:
    """Processes of a node: one loads into a shared table, the others attach."""

    def __init__(self):
        context, self._members = multiprocessing.get_context("spawn"), []
        for number in range(PROCESSES):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_member, args=(number, theirs), daemon=True)
            process.start()
            self._members.append((pipe, process))
        for pipe, _ in self._members:
            pipe.recv()

    def load(self, path: Path, rows: int) -> "Node":
        """Return when the last process has the table."""
        return self._all(("load", str(path), rows))

    def close(self) -> None:
        """All of them let the table go."""
        self._all(("close", "", 0))

    def end(self) -> None:
        for pipe, process in self._members:
            pipe.close()
            process.join()

    def _all(self, message: tuple) -> "Node":
        for pipe, _ in self._members:
            pipe.send(message)
        for failed in [pipe.recv() for pipe, _ in self._members]:
            if failed:
                raise RuntimeError(failed)
        return self


def _member(number: int, pipe) -> None:
    table, name = None, f"bench-loading-{os.getppid()}"
    pipe.send("")
    while True:
        try:
            what, path, rows = pipe.recv()
        except EOFError:
            return
        try:
            if what == "close":
                if table is not None:
                    table.close()
                table = None
            elif number == 0:
                table = EngramTable.from_safetensors(path, placement="shared", name=name)
            else:
                table = EngramTable.attach(name, rows, WIDTH, FORMAT)
            pipe.send("")
        except Exception as error:
            pipe.send(f"process {number}: {error}")


def let_go(made: object) -> None:
    """Close what was loaded, remove what was written."""
    if isinstance(made, (EngramTable, Node, Closed)):
        made.close()
    elif isinstance(made, Path):
        shutil.rmtree(made)


def measure(title: str, ways: list[Way], nbytes: int, before: Callable[[], None], rounds: int) -> None:
    """Print each way's rate, median and best, its share of the roof, and by how much memory grew besides the table."""
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    grown = dict.fromkeys(rates, 0.0)
    for number in range(rounds):
        for way in random.Random(number).sample(ways, len(ways)):
            before()
            with disk_roofs.memory_peak() as peak:
                began = time.perf_counter()
                made = way.call()
                rates[way.name].append(nbytes / (time.perf_counter() - began) / 1e9)
                held = made.nbytes / MIB if isinstance(made, EngramTable) else 0.0
                grown[way.name] = max(grown[way.name], peak() - held)
            let_go(made)
            del made
    median, best = ({way: each(found) for way, found in rates.items()} for each in (statistics.median, max))
    print(COLUMNS.format(title, "GB/s", "of roof", "best", "of roof", "MiB more"))
    roofs = [roof_of(ways, found) for found in (median, best)]
    for way in ways:
        cells = [
            f"{value:.2f}"
            for found, roof in zip((median, best), roofs, strict=True)
            for value in (found[way.name], found[way.name] / roof)
        ]
        more = "" if way.roof else f"{grown[way.name]:,.0f}"
        print(COLUMNS.format(f"  {'roof: ' * bool(way.roof)}{way.name}", *cells, more), flush=True)


def roof_of(ways: list[Way], rates: dict[str, float]) -> float:
    """The lowest of what limits a group, each the best of its ways."""
    return min(max(rates[way.name] for way in ways if way.roof == kind) for kind in {way.roof for way in ways} - {""})


def loads(files: Files, node: Node) -> list[Way]:
    """Every way of a load."""

    def load(path: Path, placement: str) -> EngramTable:
        return EngramTable.from_safetensors(path, placement=placement)

    return [
        Way("one file, cpu", partial(load, files.one, "cpu")),
        Way("one file, host", partial(load, files.one, "host")),
        Way(f"{SHARDS} files, cpu", partial(load, files.several, "cpu")),
        Way(f"one file, shared by {PROCESSES} processes", partial(node.load, files.one, files.rows)),
        Way(f"{SHARDS} files, shared by {PROCESSES} processes", partial(node.load, files.several, files.rows)),
        *others(files),
    ]


def others(files: Files) -> list[Way]:
    """Public loaders that are there, of the one file."""

    def with_safetensors() -> object:
        from safetensors.torch import load_file

        return [tensor.clone() for tensor in load_file(files.one).values()]  # mapped until they are copied

    def with_fastsafetensors() -> object:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        loader.add_filenames({0: [str(files.one)]})
        buffers = loader.copy_files_to_device()
        tensors = [buffers.get_tensor(name) for name in loader.get_keys()]
        return Closed(tensors, [buffers.close, loader.close])

    def with_runai() -> object:
        from runai_model_streamer import SafetensorsStreamer

        streamer = SafetensorsStreamer().__enter__()
        streamer.stream_file(str(files.one))
        tensors = [tensor for _, tensor in streamer.get_tensors()]
        return Closed(tensors, [partial(streamer.__exit__, None, None, None)])

    calls = {
        "safetensors": with_safetensors,
        "fastsafetensors": with_fastsafetensors,
        "runai-model-streamer": with_runai,
    }
    there = [name for name in calls if importlib.util.find_spec(name.replace("-", "_"))]
    return [Way(f"{name} {importlib.metadata.version(name)}", calls[name]) for name in there]


def each_depth(what: str, roof: str, call: Callable[..., object], *arguments, **options) -> list[Way]:
    """``call`` with all numbers of threads and sizes of a piece."""
    return [
        Way(f"{what}, {threads} x {piece // MIB} MiB", partial(call, *arguments, threads, piece, **options), roof)
        for threads, piece in DEPTHS
    ]


def load_groups(files: Files, direct: bool, rounds: int) -> None:
    """Cold loads against the best of direct reads and the page cache; warm ones against copies into new memory."""
    node, everything = Node(), [files.one, *files.shards]
    try:
        copies = each_depth("page cache to new memory", "load", disk_roofs.cache_copies, files.one, new=True)
        reads = each_depth("direct reads", "load", disk_roofs.direct_reads, files.one) if direct else []
        ways, cold, warm = (
            loads(files, node),
            partial(disk_roofs.give_back, everything),
            partial(disk_roofs.warm_up, everything),
        )
        if direct:
            new = partial(disk_roofs.direct_reads, files.one, *DEPTHS[-1], new=True)
            reads.append(Way("direct reads into new memory, no roof of a drive", new))
        measure("load, cold", [*reads, copies[-1], *ways], files.nbytes, cold, rounds)
        buffers = Way(
            "page cache to a buffer: what no new memory takes",
            partial(disk_roofs.cache_copies, files.one, 2, MIB, new=False),
        )
        measure("load, warm", [*copies, buffers, *ways], files.nbytes, warm, rounds)
    finally:
        node.end()


def save_groups(files: Files, direct: bool, rounds: int) -> None:
    """Saves against sequential writes that have reached the disk."""
    with EngramTable.from_safetensors(files.one, placement="cpu") as table:
        arguments = files.folder, files.nbytes
        roofs = each_depth("cached writes", "save", disk_roofs.writes, *arguments, direct=False)
        roofs += each_depth("direct writes", "save", disk_roofs.writes, *arguments, direct=True) if direct else []

        def save(shard_bytes: int | None) -> Path:
            out = new_folder(files.folder)
            table.save_safetensors(out, shard_bytes=shard_bytes)
            return out

        def with_safetensors() -> Path:
            """The library's own, which returns before the bytes have reached the disk: they are waited for."""
            from safetensors.torch import save_file

            out = new_folder(files.folder)
            save_file({"weight": table.weight, "scale": torch.as_tensor(table.scale)}, out / "model.safetensors")
            disk_roofs.sync(out / "model.safetensors")
            return out

        ways = [
            Way("one file", partial(save, None)),
            Way(f"{SHARDS} files", partial(save, -(-files.nbytes // SHARDS))),
            Way("safetensors, until it is on the disk", with_safetensors),
        ]
        measure("save", roofs + ways, files.nbytes, lambda: None, rounds)


def convert_groups(files: Files, direct: bool, rounds: int) -> None:
    """Conversions against copies of as many bytes, and to another format against the arithmetic alone, too."""

    def convert(source: Path, format: str | None) -> Path:
        out = new_folder(files.folder)
        convert_table(source, out, "bench", format=format)
        return out

    cold, name = partial(disk_roofs.give_back, [files.one, *files.shards]), "direct" if direct else "cached"
    copies = partial(each_depth, f"{name} reads and writes", "drive", disk_roofs.copies, files.one, files.folder)
    ways = [
        Way("one file", partial(convert, files.one, None)),
        Way(f"{SHARDS} files", partial(convert, files.several, None)),
    ]
    measure("convert, same format, cold", copies(written=1.0, direct=direct) + ways, files.nbytes, cold, rounds)
    alone = Way("the arithmetic alone", partial(disk_roofs.conversions, files.one, "bfloat16"), "arithmetic")
    ways = [alone, Way("one file", partial(convert, files.one, "bfloat16"))]
    measure(
        "convert to bfloat16, cold",
        copies(written=2 * WIDTH / ROW_BYTES, direct=direct) + ways,
        files.nbytes,
        cold,
        rounds,
    )


def verify_groups(files: Files, direct: bool, rounds: int) -> None:
    """Checks of all rows against direct reads and against the checks alone: the slower of these is the roof."""

    def verify(path: Path) -> None:
        with Checkpoint(path, "bench") as checkpoint:
            check_values(checkpoint, select_table(checkpoint), None)

    everything = [files.one, *files.shards]
    alone = Way("the checks alone", partial(disk_roofs.checks, files.one), "checks")
    reads = each_depth("direct reads", "drive", disk_roofs.direct_reads, files.one) if direct else []
    ways = [alone, Way("one file", partial(verify, files.one)), Way(f"{SHARDS} files", partial(verify, files.several))]
    measure("verify, cold", reads + ways, files.nbytes, partial(disk_roofs.give_back, everything), rounds)
    copies = each_depth("page cache to buffers", "memory", disk_roofs.cache_copies, files.one, new=False)
    measure("verify, warm", copies + ways, files.nbytes, partial(disk_roofs.warm_up, everything), rounds)


GROUPS = {"load": load_groups, "save": save_groups, "convert": convert_groups, "verify": verify_groups}


def new_folder(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder, prefix="made-"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench loading", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where files are written; default: the system's for such files")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the table")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="what is measured")
    chosen = parser.parse_args(arguments)
    rows = int(chosen.gib * 2**30) // ROW_BYTES
    if rows < SHARDS:
        parser.error(f"--gib must be above 0, got {chosen.gib}")
    if chosen.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {chosen.rounds}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # chunks have threads of their own
    try:
        with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="engram-loading-") as folder:
            files = written(Path(folder), rows)
            direct = disk_roofs.has_direct(files.one)
            print(f"{rows:,} rows, {files.nbytes / 2**30:.2f} GiB, medians of {chosen.rounds}")
            if not direct:
                print("this file system has no direct I/O: the drive's own rate is not known")
            for name in chosen.only:
                GROUPS[name](files, direct, chosen.rounds)
    finally:
        torch.set_num_threads(threads)
    return 0


def written(folder: Path, rows: int) -> Files:
    """Random rows, in one file and in several."""
    with EngramTable.empty(rows, WIDTH, FORMAT, placement="cpu") as table:
        table.weight.view(torch.int64).random_().bitwise_and_(0x7777777777777777)  # no NaN
        table.scale.fill_(127)
        one = table.save_safetensors(folder / "one.safetensors")
        return Files(folder, one, table.save_safetensors(folder, shard_bytes=-(-table.nbytes // SHARDS)), rows)
