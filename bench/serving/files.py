"""Rows of a file that is larger than memory: lookups against the drive's own rate of random reads, and other ways.

    python -m bench files [--folder DIR] [--gib 4] [--limit-gib 1] [--only PART ...] [--rows 10000000]

Writes a table of V4.1's rows to DIR, which should be on the drive in question, and removes it. Each measurement has a
process of its own. Cold: the page cache has nothing of the file. Parts:

    drive    random reads of a page past the page cache, by how many are under way, and in calls of so many
    cold     lookups of random rows, by rows of a call
    warm     the same of a file that the page cache has
    limit    the same in a control group whose memory is a part of the table: what is used, and how long calls take
    text     the first 65,536 tokens of real text, 64 at a time, by bytes of the cache of rows
    growth   a table of few rows a call for --rows rows: memory at the end against memory after a tenth
"""

import argparse
import dataclasses
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engram_kernels import EngramConfig, EngramTable, HashPlan, hash_lookup, lookup
from engram_kernels.checkpoints.files import Checkpoint
from engram_kernels.checkpoints.table_writer import TableWriter
from engram_kernels.geometry.row_format import row_format
from engram_kernels.tables.memory.direct import LEAST, PAGE
from engram_kernels.tables.memory.reads import Ring, Threads
from engram_kernels.testing.golden import v41_token_map

from ..running.text import load_token_ids
from .confined import Group, group

WIDTH, FORMAT = 256, "e4m3_ue8m0"
ROW_BYTES = WIDTH + WIDTH // 32
PARTS = ("drive", "cold", "warm", "limit", "text")
DEPTHS = (1, 4, 16, 32, 64, 128)
BATCHES = (64, 1024, 16_384)  # rows of a call
CACHES = (64 << 20, 256 << 20, 1 << 30)  # bytes of memory, besides the scales
TOKENS, TEXT = 64, 1 << 16  # of a call, of the text
SECONDS = 3.0  # of each measurement
GIB, MIB = 1 << 30, 1 << 20
COLUMNS = "{:46} {:>10} {:>12} {:>9} {:>9} {:>9} {:>9}"
TITLES = ("", "rows/s", "bytes a row", "ms a call", "99 %", "longest", "MiB more")


def plan_of(rows: int) -> HashPlan:
    """One layer of V4.1's with tables of some ``rows`` rows together."""
    config = EngramConfig.deepseek_v41_flash()
    sizes = (max(1, rows // config.columns),) * (config.max_ngram - 1)
    return HashPlan.build(dataclasses.replace(config, layers=config.layers[:1], table_sizes=sizes), v41_token_map())


def write_table(path: Path, rows: int) -> None:
    """A table of random rows, without memory for all of it."""
    random = np.random.default_rng(0)
    shape = dict(format=row_format(FORMAT, "bench"), rows=rows, width=WIDTH)
    writing = dict(scale=None, token_map=None, prefix="", shard_bytes=None, metadata=None)
    with TableWriter(path, "bench", **shape, **writing) as writer:
        for begin in range(0, rows, 1 << 18):
            count = min(1 << 18, rows - begin)
            weight = torch.from_numpy(random.integers(0, 120, (count, WIDTH), dtype=np.uint8))
            scale = torch.full((count, WIDTH // 32), 127, dtype=torch.uint8)
            writer.write(begin, weight.view(torch.float8_e4m3fn), scale)
        writer.commit()


def give_back(path: Path) -> None:
    """Let the page cache forget the file."""
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drive_rates(path: Path) -> Iterator[tuple[str, float]]:
    """(what, random reads of a page a second) past the page cache: by depth, and of calls that wait for all reads."""
    buffer, random = np.frombuffer(mmap.mmap(-1, 2048 * PAGE), dtype=np.uint8), np.random.default_rng(0)
    places = np.arange(2048) * PAGE
    try:
        opened = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    except OSError as error:
        print(f"this file system has no direct I/O ({error.strerror}): the drive's own rate is not known")
        return
    with opened as file:
        pages = os.fstat(file.fileno()).st_size // PAGE

        def some(reader: Ring | Threads, count: int) -> int:
            offsets = np.sort(random.integers(0, pages, count)) * PAGE
            if (reader.read(file.fileno(), offsets, buffer, places[:count], PAGE) != PAGE).any():
                raise OSError(f"{path}: a read of a page did not return one")
            return count

        for name, depth, count in (
            *((f"the drive, {depth} under way", depth, 16 * depth) for depth in DEPTHS),
            *((f"the drive, {count:,} at once", DEPTHS[-1], min(count, 2048)) for count in BATCHES),
        ):
            try:
                reader: Ring | Threads = Ring(depth)
            except OSError as error:
                print(f"io_uring is refused here ({error.strerror}): threads read")
                reader = Threads(depth)
            yield name, timed(partial(some, reader, count), SECONDS)["rate"]
            reader.close()


def timed(call: Callable[[], int], seconds: float, rows: int = 0) -> dict[str, float]:
    """Rows a second of ``call() -> rows`` for so long, or for so many rows, and milliseconds of a call: median, 99 of
    100, the longest.
    """
    done, took, began = 0, [], time.perf_counter()
    while done < rows if rows else time.perf_counter() - began < seconds:
        now = time.perf_counter()
        done += call()
        took.append(1e3 * (time.perf_counter() - now))
    rate = done / (time.perf_counter() - began)
    return dict(rate=rate, median=np.median(took), late=np.percentile(took, 99), longest=max(took))


def opened(path: Path, way: str, nbytes: int) -> Callable[[torch.Tensor], object]:
    """Stored rows of ids ``[n, 1]`` by one of the ways; ``nbytes`` of memory besides scales, for "memory_bytes"."""
    with Checkpoint(path, "bench") as checkpoint:
        tensors = [checkpoint.tensor(name) for name in ("weight", "scale")]
    if way in ("torch.from_file", "numpy.memmap"):
        size = path.stat().st_size
        if way == "numpy.memmap":
            whole = np.memmap(path, dtype=np.uint8, mode="r")
            parts = [whole[each.offset :][: each.nbytes].reshape(each.shape) for each in tensors]
            return lambda ids: [part[ids.numpy()] for part in parts]
        every = torch.from_file(str(path), size=size, dtype=torch.uint8)
        views = [every[each.offset :][: each.nbytes].view(each.shape) for each in tensors]
        return lambda ids: [view[ids] for view in views]
    bound = nbytes + tensors[1].nbytes if way == "memory_bytes" else None
    table = EngramTable.from_safetensors(path, placement="cpu", mapped=True, memory_bytes=bound)
    return partial(lookup, table, out_format="storage")


def measure(
    path: str, way: str, rows: int, batch: int, seconds: float, nbytes: int = LEAST, cold: bool = True, group="", most=0
) -> dict[str, float]:
    """Lookups of random rows, in this process: :func:`timed`, and bytes read for a row, MiB that memory grew by.

    group: a control group's folder to enter first, of which then all memory counts. most: rows, instead of seconds.
    """
    inside = find_group(group)
    rows_of, random, asked = opened(Path(path), way, nbytes), np.random.default_rng(os.getpid()), 0
    if cold:
        give_back(Path(path))
    before, read = resident(), bytes_read()

    def call() -> int:
        nonlocal asked
        asked += batch
        rows_of(torch.from_numpy(random.integers(0, rows, (batch, 1))))
        return batch

    if most:
        timed(call, 0, most // 10)
        before = resident()
        timed(call, 0, most - most // 10)
        return dict(more=resident() - before)
    found = timed(call, seconds) | dict(nbytes=(bytes_read() - read) / asked, more=resident() - before)
    peak = inside.most() if inside else None
    return found if peak is None else found | dict(peak=peak / MIB)


def measure_text(path: str, rows: int, nbytes: int, tokens: int) -> dict[str, float]:
    """Tokens of a text, call after call from its begin: as :func:`measure`, and the share of rows found in memory."""
    plan, ids = plan_of(rows), load_token_ids()
    give_back(Path(path))
    bound = nbytes + plan.rows_per_layer[0] * (ROW_BYTES - WIDTH)
    table = EngramTable.from_safetensors(path, placement="cpu", mapped=True, memory_bytes=bound)
    read, at = bytes_read(), 0

    def call() -> int:
        nonlocal at
        history = torch.from_numpy(ids[at : at + 3].astype(np.int64))[None]
        token_ids = torch.from_numpy(ids[at + 3 : at + 3 + TOKENS])
        hash_lookup(token_ids, plan, [table], history=history, out_format="storage")
        at = (at + TOKENS) % (len(ids) - TOKENS - 3)
        return TOKENS * plan.primes.shape[1]

    found = timed(call, 0, tokens * plan.primes.shape[1])
    counts = table.metrics()
    shares = dict(hits=counts["file_hits"] / counts["file_distinct"], pages=counts["file_pages"] / counts["file_rows"])
    return found | shares | dict(nbytes=(bytes_read() - read) / counts["file_rows"])


def find_group(folder: str) -> Group | None:
    """The control group at ``folder``, with this process in it."""
    if not folder:
        return None
    found = Group(Path(folder))
    found.enter()
    return found


def resident() -> float:
    """MiB of this process, mapped pages of files among them."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE / MIB


def bytes_read() -> int:
    """That this process had the drive read so far."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("read_bytes")).split()[1])


def apart(function: Callable[..., dict], **arguments) -> dict[str, float]:
    """What a function of this module finds in a process of its own."""
    call = [sys.executable, "-m", "bench.serving.files", function.__name__, json.dumps(arguments)]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tell(name: str, found: dict[str, float]) -> None:
    def cell(key: str, form: str) -> str:
        return format(found[key], form) if key in found else ""

    times = [cell(key, ",.2f") for key in ("median", "late", "longest")]
    print(COLUMNS.format(name, cell("rate", ",.0f"), cell("nbytes", ",.0f"), *times, cell("more", ",.0f")), flush=True)


def run(path: Path, rows: int, parts: list[str], limit: int, growth: int) -> None:
    """Measure and print the parts."""
    ways = ("memory_bytes", "mapped", "torch.from_file", "numpy.memmap")
    common = dict(path=str(path), rows=rows, seconds=SECONDS)
    print(COLUMNS.format(*TITLES))
    if "drive" in parts:
        for name, rate in drive_rates(path):
            tell(name, dict(rate=rate, nbytes=PAGE))
    for batch in BATCHES if "cold" in parts else ():
        for way in ways:
            tell(f"cold, {way}, {batch:,} rows a call", apart(measure, way=way, batch=batch, **common))
    if "warm" in parts:
        with open(path, "rb", buffering=0) as file:
            while file.read(64 * MIB):
                pass
        for batch in BATCHES:
            for way in ways[1:]:
                found = apart(measure, way=way, batch=batch, cold=False, **common)
                tell(f"warm, {way}, {batch:,} rows a call", found)
    if "limit" in parts:
        try:
            for way in ways[:3]:
                with group(limit) as inside:
                    options = common | dict(seconds=5 * SECONDS, nbytes=limit // 4, group=str(inside.folder))
                    found = apart(measure, way=way, batch=BATCHES[1], **options)
                    tell(f"limit of {limit / GIB:g} GiB, {way}, {BATCHES[1]:,} rows a call", found)
                    if "peak" in found:
                        print(f"    process and page cache together: {found['peak']:,.0f} MiB at most")
        except OSError as error:
            print(f"no control group with a limit can be made here: {error}")
    for nbytes in CACHES if "text" in parts else ():
        found = apart(measure_text, path=str(path), rows=rows, nbytes=nbytes, tokens=TEXT)
        tell(f"text, {nbytes // MIB:,} MiB: {found['hits']:.0%} of distinct rows in memory", found)
    if growth:
        found = apart(measure, way="memory_bytes", batch=BATCHES[1], most=growth, **common)
        print(f"memory after {growth:,} rows is {found['more']:+.1f} MiB more than after {growth // 10:,}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench files", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the file is written; default: the system's for such files")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the table")
    parser.add_argument("--limit-gib", type=float, default=1.0, help="memory of the control group of part limit")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--rows", type=int, default=0, help="rows of the part growth, which is left out without it")
    chosen = parser.parse_args(arguments)
    if not chosen.gib > 0:
        parser.error(f"--gib must be above 0, got {chosen.gib}")
    asked = int(chosen.gib * GIB) // ROW_BYTES
    rows = plan_of(asked).rows_per_layer[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="engram-files-") as folder:
        path = Path(folder) / "table.safetensors"
        write_table(path, rows)
        print(f"{rows:,} rows of {ROW_BYTES} bytes, {rows * ROW_BYTES / GIB:.2f} GiB")
        run(path, asked, list(chosen.only), int(chosen.limit_gib * GIB), chosen.rows)
    return 0


if __name__ == "__main__":
    chosen = measure if sys.argv[1] == "measure" else measure_text
    print(json.dumps(chosen(**json.loads(sys.argv[2]))))
