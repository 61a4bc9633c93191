"""Tables into safetensors files: whole or not at all, in one file or in several with an index.

Of several files the index comes last (how a file is written: checkpoints/writing.py). It is what makes them a
checkpoint, and their names are new every time, so that the files of the old index stay until the new one is there.
"""

import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from engram_kernels.geometry.row_format import RowFormat

from .files import INDEX_SUFFIX, PART, SUFFIX, TABLE_KEY, weight_map
from .names import FILE_SCALES, SCALE_NAMES, TABLE_SCALE_NAME, as_prefix, file_dtype, find_tables, part_of
from .opening import CheckpointError, naming
from .parallel import BLOCK, CHUNK, Buffers, interleave, spans
from .writing import (
    DirectFile,
    NewTensor,
    allocate,
    check_disk,
    checked_metadata,
    file_path,
    header_of,
    locked_file,
    mode_of,
    new_file,
    partial_path,
    read_existing,
    remove_abandoned,
    sync_folder,
    write_all,
)


@dataclass
class _Shard:
    """One file being written: rows ``[begin, end)`` of the table."""

    final: Path
    partial: Path
    begin: int
    end: int
    header: bytes
    offsets: dict[str, int]  #: where in the file its "weight", "scale" and "table" (the table's own scale) begin
    names: list[str]  #: of these tensors
    nbytes: int
    file: io.FileIO | None = None  #: while it is open here, and what large writes go through
    direct: DirectFile | None = None

    def opened(self, file: io.FileIO, buffers: Buffers) -> None:
        """Write to ``file`` from here on."""
        self.file, self.direct = file, DirectFile(file.fileno(), buffers)


class Piece(NamedTuple):
    """Bytes ``[begin, end)`` of a table's rows ("weight") or scales ("scale"), and the byte of a file they go to."""

    shard: _Shard
    key: str
    begin: int
    end: int
    offset: int


@dataclass
class RowsFiles:
    """Files being written and where rows go in them, which another process can open as well."""

    shards: list[_Shard]
    sizes: tuple[int, int]  #: bytes of a row, of its scales

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its scales."""
        return sum(self.sizes)

    def pieces(self, nbytes: int) -> Iterator[Piece]:
        """All bytes of rows and scales, at most ``nbytes`` in a piece, in whole blocks of their file, files in turn.

        What is no whole block goes through the page cache, and such a write waits until no other is under way.
        """
        return interleave(self._pieces_of(shard, nbytes) for shard in self.shards)

    def _pieces_of(self, shard: _Shard, nbytes: int) -> Iterator[Piece]:
        for key, size in zip(("weight", "scale"), self.sizes, strict=True):
            start, end = shard.offsets.get(key, 0), shard.offsets.get(key, 0) + (shard.end - shard.begin) * size
            first = shard.begin * size - start  # from a place in the file to one among the table's bytes
            for at in range(start - start % nbytes, end, nbytes):
                low, high = max(at, start), min(at + nbytes, end)
                yield Piece(shard, key, first + low, first + high, low)

    def open(self) -> None:
        """Open the files, in a process that did not make them; all or none."""
        buffers = Buffers()
        try:
            for shard in self.shards:
                shard.opened(open(shard.partial, "r+b", buffering=0), buffers)
        except BaseException:
            self.close()
            raise

    def write(self, begin: int, weight: torch.Tensor, scales: torch.Tensor | None) -> int:
        """Write rows from ``begin`` on, and their scales; returns the bytes written."""
        end = begin + len(weight)
        for shard in self.shards:
            first, last = max(begin, shard.begin), min(end, shard.end)
            if first >= last:
                continue
            for key, tensor, size in zip(("weight", "scale"), (weight, scales), self.sizes, strict=True):
                if size:
                    rows = tensor[first - begin : last - begin].view(torch.uint8).reshape(-1).cpu()
                    with naming(shard.partial):
                        shard.direct.write(rows.numpy(), shard.offsets[key] + (first - shard.begin) * size)
        return len(weight) * self.row_bytes

    def write_piece(self, piece: Piece, content: torch.Tensor) -> int:
        """Write the bytes of a piece, uint8 ``[bytes]``; returns their number."""
        with naming(piece.shard.partial):
            piece.shard.direct.write(content.cpu().numpy(), piece.offset)
        return len(content)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        for shard in self.shards:
            with naming(shard.partial):
                os.fsync(shard.file)

    def close(self) -> None:
        """Close what :meth:`open` opened."""
        for shard in self.shards:
            for file in filter(None, (shard.direct, shard.file)):
                file.close()
            shard.file = shard.direct = None


class TableWriter(RowsFiles):
    """A table's files, written in any order of rows and by any number of threads, then given their names by commit().

    metadata: texts for the files' headers, to which rows, parts and the digest ``token_map`` are added.
    As a context manager it removes what it wrote unless it was committed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        where: str,
        *,
        format: RowFormat,
        rows: int,
        width: int,
        prefix: str = "",
        scale: float | None = None,
        shard_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
        token_map: str | None = None,
    ):
        super().__init__([], (format.row_bytes(width), format.scale_bytes(width)))
        self._where = where
        self._format, self._prefix = format, as_prefix(prefix, where)
        self._width = width
        self._path = file_path(path, where, f"model{SUFFIX}")
        self._index = _index_of(self._path)
        self._metadata = checked_metadata(metadata, where)
        self._said = dict(prefix=self._prefix, rows=rows, token_map=token_map)
        if shard_bytes is not None and (not isinstance(shard_bytes, int) or shard_bytes < 1):
            raise ValueError(f"{where}: shard_bytes must be a positive int or None, got {shard_bytes!r}")
        self._old = _replaceable(self._path, where)
        stray = {name for name in os.listdir(self._path.parent) if _is_shard(name, self._path)}
        remove_abandoned(self._path, stray - self._indexed())
        self.shards = self._layout(rows, shard_bytes)
        check_disk(self._path.parent, sum(shard.nbytes for shard in self.shards), where)
        try:
            buffers = Buffers()
            mode = mode_of(self._index, self._path)  # files under new names are as private as what they replace
            for shard in self.shards:
                with naming(shard.partial):
                    shard.opened(locked_file(shard.partial, mode), buffers)
                    allocate(shard.file.fileno(), shard.nbytes)
                    write_all(shard.file.fileno(), shard.header, 0)
                    if "table" in shard.offsets:
                        value = torch.tensor([scale], dtype=torch.float32, device="cpu")
                        write_all(shard.file.fileno(), value.numpy().tobytes(), shard.offsets["table"])
        except BaseException:
            self.close()
            raise

    @property
    def rows_files(self) -> RowsFiles:
        """Where rows go, for this process or for others that see the same folder."""
        return RowsFiles([replace(shard, file=None, direct=None) for shard in self.shards], self.sizes)

    def commit(self) -> Path:
        """Give the files their names; returns the file, or the index of several."""
        self.sync()
        for shard in self.shards:
            os.rename(shard.partial, shard.final)
        sync_folder(self._path.parent)
        done = self._path if self.shards[0].final == self._path else self._write_index()
        # The index first: who reads it meanwhile finds that it has gone, rather than that its files have.
        for path in sorted(self._old - {shard.final for shard in self.shards} - {done}, key=self._index.__ne__):
            path.unlink(missing_ok=True)
        return done

    def close(self) -> None:
        """Let go of the files; what was not committed is removed, which of several files the index tells."""
        try:
            indexed = self._indexed()
        except (CheckpointError, OSError):  # damaged since: nobody can tell, and nothing of it is removed
            indexed = {shard.final.name for shard in self.shards}
        try:
            for shard in self.shards:
                if shard.file is not None:
                    shard.partial.unlink(missing_ok=True)
                    if shard.final != self._path and shard.final.name not in indexed:
                        shard.final.unlink(missing_ok=True)
        finally:
            super().close()

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _layout(self, rows: int, shard_bytes: int | None) -> list[_Shard]:
        count = 1 if shard_bytes is None else min(rows, -(-rows * self.row_bytes // shard_bytes))
        each = -(-rows // count)
        if each * self.sizes[0] >= CHUNK:  # whole blocks of rows, so that they are read straight to the table's memory
            each += -each % (BLOCK // math.gcd(BLOCK, self.sizes[0]))
        pieces = list(spans(rows, each))
        # Of a file or two that are missing, the rest tells.
        metadata = self._metadata | {TABLE_KEY: json.dumps(self._said | dict(parts=len(pieces)))}
        stem, token, shards = self._path.name.removesuffix(SUFFIX), secrets.token_hex(4), []
        for k, (begin, end) in enumerate(pieces):
            final, prefix = self._path, self._prefix
            if len(pieces) > 1:
                final = self._path.with_name(f"{stem}-{token}-{k + 1:05d}-of-{len(pieces):05d}{SUFFIX}")
                prefix += f"shard_{k}."
            tensors = self._tensors(prefix, end - begin)
            if self._format.table_scale and k == 0:
                name = TABLE_SCALE_NAME if self._format.group else "weight_scale"
                tensors["table"] = NewTensor(f"{self._prefix}{name}", "F32", (1,), 4)
            header, starts = header_of(list(tensors.values()), metadata)
            offsets, names = dict(zip(tensors, starts, strict=False)), [tensor.name for tensor in tensors.values()]
            partial = partial_path(self._path, f"{k + 1:05d}")
            shards.append(_Shard(final, partial, begin, end, header, offsets, names, starts[-1]))
        return shards

    def _tensors(self, prefix: str, rows: int) -> dict[str, NewTensor]:
        """The tensors of ``rows`` rows in one file."""
        row_bytes, scale_bytes = self.sizes
        fmt = self._format
        shape = rows, fmt.row_items(self._width)
        tensors = {"weight": NewTensor(f"{prefix}weight", file_dtype(fmt), shape, rows * row_bytes)}
        if scale_bytes:
            # By the names under which each format is published.
            name, dtype = "weight_scale" if fmt.table_scale else "scale", FILE_SCALES[fmt.group_scale]
            tensors["scale"] = NewTensor(f"{prefix}{name}", dtype, (rows, scale_bytes), rows * scale_bytes)
        return tensors

    def _write_index(self) -> Path:
        names = {name: shard.final.name for shard in self.shards for name in shard.names}
        total = sum(shard.nbytes - len(shard.header) for shard in self.shards)
        content = {"metadata": {"total_size": total, **self._metadata}, "weight_map": names}
        with new_file(self._index, partial_path(self._path)) as fd:
            write_all(fd, json.dumps(content, indent=2).encode(), 0)
        return self._index

    def _indexed(self) -> set[str]:
        """Names of the files that the index tells of, where there is one."""
        if not self._index.exists():
            return set()
        return {path.name for path in weight_map(self._index, self._where).values()}


def _index_of(path: Path) -> Path:
    return path.parent / f"{path.name.removesuffix(SUFFIX)}{INDEX_SUFFIX}"


def _replaceable(path: Path, where: str) -> set[Path]:
    """Files of the table that is there now, under the same name; ValueError where they are anything else."""
    old: set[Path] = set()
    for file in (path, _index_of(path)):
        found = read_existing(file, where, lambda checkpoint: (checkpoint.names, checkpoint.paths))
        if found is None:
            continue
        names, paths = found
        tables = find_tables(names)
        rests = [part_of(rest).rest for members in tables.values() for rest in members]
        if len(tables) != 1 or len(rests) != len(names) or not set(rests) <= {"weight", *SCALE_NAMES, TABLE_SCALE_NAME}:
            raise ValueError(
                f"{where}: {file} holds {len(names)} tensors that are not one table's own, and is not replaced; "
                "save to another folder or file"
            )
        old |= {file, *(shard for shard in paths if _is_shard(shard.name, path))}
    return old


def _is_shard(name: str, path: Path) -> bool:
    """Whether saving to ``path`` gives such names to files of its own."""
    match = PART.fullmatch(name)
    return match is not None and match["stem"] == path.name.removesuffix(SUFFIX)
