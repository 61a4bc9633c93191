"""Whether a checkpoint's table is whole. A check returns what it saw, or raises CheckpointError with what is wrong."""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import RowFormat

from .files import Checkpoint, StoredTensor
from .parallel import CHUNK, Buffers, Progress, interleave, run_chunks, spans
from .validate import StoredTable

#: A longer run of zero rows, as a share of all, is taken for what was never written: hashing leaves no such hole.
_ZERO_RUN = 0.01


def check_config(checkpoint: Checkpoint, table: StoredTable, name: str, config: EngramConfig, layer: int | None) -> str:
    """Rows and width against those of the config called ``name``, for ``layer`` or the one that the prefix tells."""
    number = table.layer if layer is None else layer
    if number is None and len(config.layers) == 1:
        number = config.layers[0]
    if number not in config.layers:
        raise checkpoint.error(f"{name} has tables at layers {config.layers}, and this is of layer {number}")
    if problems := table.mismatches(config, number):
        raise checkpoint.error(f"layer {number} of {name}: {'; '.join(problems)}")
    note = "" if table.format.name == config.format else f"; its format there is {config.format}"
    return f"rows and width of layer {number} of {name}{note}"


def has_hash(checkpoint: Checkpoint, table: StoredTable, config: EngramConfig) -> bool:
    """Whether the checkpoint holds the constants of the hash, as Qwen's do."""
    stored = f"{_hash_prefix(table)}layer_multipliers" in checkpoint
    return stored and config.window == "eos" and table.layer in config.layers


def check_hash(checkpoint: Checkpoint, table: StoredTable, config: EngramConfig) -> str:
    """The constants of the hash against the config's: with others, every token would read the wrong rows."""
    plan, index = HashPlan.build(config), config.layers.index(table.layer)
    expected = {
        "layer_multipliers": plan.multipliers[index],
        "ngram_heads_vocab_sizes": plan.primes[index],
        "ngram_heads_offsets": plan.offsets[index],
    }
    for rest, value in expected.items():
        name = _hash_prefix(table) + rest
        if name in checkpoint:
            stored = checkpoint.tensor(name)
            if stored.dtype != "I64" or checkpoint.read(stored, torch.int64).flatten().tolist() != value.tolist():
                raise checkpoint.error(f"{stored} is not what the config gives")
    return "the checkpoint's multipliers, primes and offsets are those of the config"


def _hash_prefix(table: StoredTable) -> str:
    return re.sub(r"ngram_embedding\.$", "", table.prefix)


class _Chunk(NamedTuple):
    """Rows ``[begin, end)`` of a stored tensor, of rows or of scales; ``first`` is the first of them in the table."""

    tensor: StoredTensor
    scales: bool
    first: int
    begin: int
    end: int


def _chunks(tensors: Sequence[StoredTensor], scales: bool) -> Iterator[_Chunk]:
    """All rows of tensors that follow each other, CHUNK bytes at a time."""
    first = 0
    for tensor in tensors:
        step = max(1, CHUNK // (tensor.nbytes // tensor.shape[0]))
        for begin, end in spans(tensor.shape[0], step):
            yield _Chunk(tensor, scales, first + begin, begin, end)
        first += tensor.shape[0]


class Tally(NamedTuple):
    """What rows of a chunk hold; of zero rows also the runs at either end and the longest, for a run across chunks."""

    rows: int
    counts: tuple[int, int, int]  #: elements NaN, infinite; zero rows
    zero_head: int
    zero_tail: int
    longest: tuple[int, int]  #: (rows, first row)


def check_values(checkpoint: Checkpoint, table: StoredTable, progress: Progress | None) -> str:
    """One pass over all rows and scales: NaN, infinities, scale bytes of 255, and what was never written."""
    tallies: dict[int, Tally] = {}
    scale_counts, buffers, fmt = [], Buffers(), table.format
    computing = threading.Semaphore(os.cpu_count() or 1)  # more would take turns in Python at every step

    def count(chunk: _Chunk) -> int:
        size = chunk.tensor.nbytes // chunk.tensor.shape[0]
        content = buffers.take((chunk.end - chunk.begin) * size)
        checkpoint.read_into(chunk.tensor, chunk.begin * size, memoryview(content))
        rows = torch.from_numpy(content).view(-1, size)
        with computing:
            if chunk.scales:
                scale_counts.append(scale_bytes(rows, fmt))
            else:
                tallies[chunk.first] = tally(rows, chunk.first, fmt)
        return rows.nbytes

    # Rows and scales apart: the small reads of a chunk's scales would wait behind the large ones of others' rows.
    chunks = interleave([_chunks(table.weights, False), _chunks(table.scales, True)])
    run_chunks(chunks, count, progress=progress, total=table.nbytes)
    nan, infinite, zero = map(sum, zip(*(t.counts for t in tallies.values()), strict=True))
    nan_scales, least_scales = map(sum, zip((0, 0), *scale_counts, strict=True))
    notes = f"{table.rows:,} rows read, {zero:,} of them zero"
    notes += f", {least_scales:,} scale bytes are 0" if least_scales else ""
    faults = [f"{nan:,} elements are NaN"] if nan else []
    faults += [f"{infinite:,} elements are infinite"] if infinite else []
    nan_bytes = "127 or 255" if table.format.group_scale == "e4m3" else "255"
    faults += [f"{nan_scales:,} scale bytes are {nan_bytes}, which is NaN"] if nan_scales else []
    length, first = _longest_zero_run(tallies)
    if length > max(1, _ZERO_RUN * table.rows):
        share = f"{length / table.rows:.1%} of the table"
        faults.append(f"rows {first:,} to {first + length - 1:,} are zero, {share}, as in a file that was never filled")
    if faults:
        raise checkpoint.error(f"{'; '.join(faults)} ({notes})")
    return f"no NaN, no infinity; {notes}"


def tally(rows: torch.Tensor, first: int, format: RowFormat) -> Tally:
    """Of rows as bytes, ``[rows, bytes]``; ``first`` is row 0. Signs of fp8 rows are gone then."""
    zero, *runs = _zero_rows(rows, first)
    return Tally(len(rows), (*_not_finite(rows, format), zero), *runs)


def _not_finite(rows: torch.Tensor, format: RowFormat) -> tuple[int, int]:
    """(NaN, infinite elements) of rows as bytes."""
    if format.packed > 1:
        return 0, 0  # every e2m1 code is a number
    if not format.scaled:
        found = rows.view(format.dtype)
        if torch.isfinite(found).all():
            return 0, 0
        return int(torch.isnan(found).sum()), int(torch.isinf(found).sum())
    codes = rows.bitwise_and_(0x7F)  # in place: new memory for each chunk takes longer than all else
    if int(codes.max()) < 0x7F:  # which is NaN; no code is infinite
        return 0, 0
    return int((codes == 0x7F).sum()), 0


def scale_bytes(scales: torch.Tensor, format: RowFormat) -> tuple[int, int]:
    """(NaN, zero) scale bytes. A byte 0 of ue8m0 is 2^-127, which some readers take for 0."""
    if not scales.numel():
        return 0, 0
    if format.group_scale == "e4m3":
        scales = scales & 0x7F  # of either sign
    nan = 0x7F if format.group_scale == "e4m3" else 0xFF
    least, most = torch.aminmax(scales)
    if 0 < int(least) and int(most) < nan:
        return 0, 0
    return int((scales == nan).sum()), int((scales == 0).sum())


def _zero_rows(rows: torch.Tensor, first: int) -> tuple[int, int, int, tuple[int, int]]:
    """(zero rows, those at the beginning, those at the end, (longest run, its first row)); ``first`` is row 0."""
    words = rows.view(torch.int64)
    suspects = (words[:, 0] == 0).nonzero().flatten()  # few, as a rule: the others' words need no look
    zero = suspects[~words[suspects].any(1)]
    if not len(zero):
        return 0, 0, 0, (0, first)
    filled = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, zero, False).nonzero().flatten()
    # Filled rows, with one before the first and one behind the last: what lies between two is a run of zero rows.
    marks = torch.cat([filled.new_tensor([-1]), filled, filled.new_tensor([len(rows)])])
    gaps = marks.diff() - 1
    longest = int(gaps.argmax())
    return len(rows) - len(filled), int(gaps[0]), int(gaps[-1]), (int(gaps[longest]), first + int(marks[longest]) + 1)


def _longest_zero_run(tallies: dict[int, Tally]) -> tuple[int, int]:
    """(rows, first row) of the longest run of zero rows, those across chunks included."""
    best, run = (0, 0), 0
    for first in sorted(tallies):
        tally = tallies[first]
        best = max(best, tally.longest, (run + tally.zero_head, first - run), key=lambda found: found[0])
        run = run + tally.rows if tally.zero_head == tally.rows else tally.zero_tail
    return best
