"""Rows of a file that is larger than memory: lookups against the drive's own rate of random reads, and other ways.

    python -m bench files [--folder DIR] [--gib 2]

Writes a table of V4.1's rows to DIR, which should be on the drive in question, and removes it. Everything is read cold:
what the page cache has of the file is given back before each measurement.
"""

import argparse
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engram_kernels import EngramTable, lookup
from engram_kernels.tables.memory.direct import LEAST, PAGE
from engram_kernels.tables.memory.reads import DEPTH, Ring, Threads

WIDTH, FORMAT = 256, "e4m3_ue8m0"
ROW_BYTES = WIDTH + WIDTH // 32
DEPTHS = (1, 4, 16, 32, 64, 128)
BATCHES = (64, 1024, 16_384)  # rows of a call
SECONDS = 2.0  # of each measurement
COLUMNS = "{:44} {:>12} {:>14} {:>14}"


def rate(call: Callable[[int], int]) -> float:
    """Reads a second of ``call(number) -> reads``, for SECONDS."""
    done, number, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        done += call(number)
        number += 1
    return done / (time.perf_counter() - began)


def give_back(path: Path) -> None:
    """Let the page cache forget the file."""
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drive_rates(path: Path, random: np.random.Generator) -> dict[str, float]:
    """Random reads of a page a second, past the page cache, by how many are under way."""
    buffer = np.frombuffer(mmap.mmap(-1, 2048 * PAGE), dtype=np.uint8)
    places, found = np.arange(2048) * PAGE, {}
    try:
        opened = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    except OSError as error:
        print(f"this file system has no direct I/O ({error.strerror}): the drive's own rate is not known")
        return found
    with opened as file:
        pages = os.fstat(file.fileno()).st_size // PAGE

        def some(reader: Ring | Threads, count: int, _: int) -> int:
            offsets = np.sort(random.integers(0, pages, count)) * PAGE
            if (reader.read(file.fileno(), offsets, buffer, places[:count], PAGE) != PAGE).any():
                raise OSError(f"{path}: a read of a page did not return one")
            return count

        for depth in DEPTHS:
            try:
                reader: Ring | Threads = Ring(depth)
            except OSError as error:
                print(f"io_uring is refused here ({error.strerror}): threads read")
                reader = Threads(depth)
            found[f"depth {depth}"] = rate(partial(some, reader, 16 * depth))
            reader.close()
    return found


def lookup_rates(path: Path, rows: int, random: np.random.Generator) -> list[tuple[str, float, float, float]]:
    """(way, rows a second, bytes of the file read for a row, MiB that memory grew by) of lookups of random rows."""
    found = []

    def measure(name: str, table: EngramTable, batch: int) -> None:
        give_back(path)
        before, read = resident(), bytes_read()
        asked = 0

        def call(_: int) -> int:
            nonlocal asked
            asked += batch
            lookup(table, torch.from_numpy(random.integers(0, rows, (batch, 1))), out_format="storage")
            return batch

        speed = rate(call)
        found.append((f"{name}, {batch:,} rows a call", speed, (bytes_read() - read) / asked, resident() - before))

    for batch in BATCHES:
        bound = LEAST + rows * (ROW_BYTES - WIDTH)
        with EngramTable.from_safetensors(path, placement="cpu", mapped=True, memory_bytes=bound) as table:
            measure("memory_bytes", table, batch)
        with EngramTable.from_safetensors(path, placement="cpu", mapped=True) as table:
            measure("mapped", table, batch)
    return found


def resident() -> float:
    """MiB of this process, mapped pages of files among them."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def bytes_read() -> int:
    """That this process had the drive read so far."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("read_bytes")).split()[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench files", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the file is written; default: the system's for such files")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the table")
    chosen = parser.parse_args(arguments)
    rows = int(chosen.gib * 2**30) // ROW_BYTES
    if rows < 1:
        parser.error(f"--gib must be above 0, got {chosen.gib}")
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="engram-files-") as folder:
        path = Path(folder) / "table.safetensors"
        began = time.perf_counter()
        with EngramTable.empty(rows, WIDTH, FORMAT, placement="cpu") as table:
            table.weight.view(torch.int64).random_()
            table.scale.fill_(127)
            began = time.perf_counter()
            table.save_safetensors(path)
            print(f"saved {rows:,} rows at {table.nbytes / (time.perf_counter() - began) / 1e9:.2f} GB/s")
        random = np.random.default_rng(0)
        print(COLUMNS.format("what", "a second", "bytes a row", "MiB more"))
        drive = drive_rates(path, random)
        for name, speed in drive.items():
            print(COLUMNS.format(f"the drive, {name}", f"{speed:,.0f}", f"{PAGE:,}", ""))
        for name, speed, nbytes, more in lookup_rates(path, rows, random):
            print(COLUMNS.format(name, f"{speed:,.0f}", f"{nbytes:,.0f}", f"{more:,.0f}"))
        print(
            f"depth {DEPTH} is what memory_bytes reads at; its cache holds {LEAST >> 20} MiB less what a gather takes"
        )
    return 0
