"""Where ``engram-kernels table convert`` writes: a file, or a folder with a file for each layer's table.

A folder is made where there is none. A checkpoint of several tables becomes ``layer-<N>.safetensors``, any other one
``model.safetensors``. What holds another table stays: the rows of one layer never take the place of another's.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engram_kernels.checkpoints.files import INDEX_SUFFIX, SUFFIX, Checkpoint, Paths, weight_map
from engram_kernels.checkpoints.names import as_prefix, choose_table, find_tables, layer_of
from engram_kernels.checkpoints.validate import read_table
from engram_kernels.checkpoints.writing import new_file, partial_path, read_existing, write_all

#: The file or the index of a layer, and the files that an index tells of.
_LAYER = re.compile(rf"layer-\d+{re.escape(SUFFIX)}(\.index\.json)?")
_OF_LAYER = re.compile(rf"layer-\d+(-.*)?{re.escape(SUFFIX)}")


class Output(NamedTuple):
    """A table to be converted, by layer and prefix as the checkpoint's reader takes them, and the file it becomes."""

    layer: int | None
    prefix: str | None
    path: Path


def choose_outputs(
    paths: Paths, out: str, where: str, *, layer: int | None, prefix: str | None, out_prefix: str | None
) -> list[Output]:
    """The table that layer and prefix mean, or without them all tables; ValueError where one cannot be written."""
    path, outputs = Path(out), []
    is_file = path.suffix == SUFFIX
    with Checkpoint(paths, where) as checkpoint:
        layers = sorted({layer_of(name) for name in find_tables(checkpoint.names)} - {None})
        chosen = [(layer, prefix)]
        if len(layers) > 1 and layer is None and prefix is None:
            chosen = [(each, None) for each in layers]
            if is_file or out_prefix is not None:
                what = "--out must be a folder" if is_file else "--out-prefix would give all of them one name"
                raise ValueError(f"{where}: tables of layers {layers} are to be written, and {what}; or choose --layer")
        if len(layers) > 1 and not is_file:
            _check_index(path, where)
        for each in chosen:
            name, members = choose_table(checkpoint, *each)
            stored = read_table(checkpoint, name, members)
            stem = "model" if len(layers) < 2 or stored.layer is None else f"layer-{stored.layer}"
            file = path if is_file else path / f"{stem}{SUFFIX}"
            title = name if out_prefix is None else as_prefix(out_prefix, where)
            for there in (file, file.with_name(f"{file.name.removesuffix(SUFFIX)}{INDEX_SUFFIX}")):
                _check_replaced(there, where, (title, stored.rows), stored.paths)
            outputs.append(Output(*each, file))
    return outputs


@contextlib.contextmanager
def output_folder(out: str, where: str) -> Iterator[None]:
    """The folder that ``--out`` means, made where there is none, and taken away again where nothing came of it."""
    folder = Path(out).parent if Path(out).suffix == SUFFIX else Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{where}: --out must be a file that ends in {SUFFIX}, or a folder, got {out}")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        _index_layers(folder, where)
        for each in made:
            with contextlib.suppress(OSError):  # something is in it
                each.rmdir()


def _index_layers(folder: Path, where: str) -> None:
    """One index over the files of all layers, for readers of the folder: of several indices they take none."""
    files = sorted(path for path in folder.iterdir() if _LAYER.fullmatch(path.name))
    index = folder / f"model{INDEX_SUFFIX}"
    if not files or (not index.exists() and not any(path.name.endswith(INDEX_SUFFIX) for path in files)):
        return
    names: dict[str, str] = {}
    for path in files:
        with Checkpoint(path, where) as checkpoint:
            names |= {name: checkpoint.path(name).name for name in checkpoint.names}
    with new_file(index, partial_path(index)) as fd:
        write_all(fd, json.dumps({"metadata": {}, "weight_map": names}, indent=2).encode(), 0)


def _check_index(folder: Path, where: str) -> None:
    """Raise ValueError where the folder's index tells of other files than those of layers."""
    index = folder / f"model{INDEX_SUFFIX}"
    found = weight_map(index, where).values() if index.exists() else ()
    if others := [path for path in found if not _OF_LAYER.fullmatch(path.name)]:
        raise ValueError(f"{where}: {index} is of another checkpoint, with {others[0].name}; choose another --out")


def _check_replaced(file: Path, where: str, new: tuple[str, int], source: list[Path]) -> None:
    """Raise ValueError where ``file`` holds a table of another name, or of another number of rows, than ``new``."""

    def old_tables(checkpoint: Checkpoint) -> list[tuple[str, int]]:
        if not set(source).isdisjoint(checkpoint.paths):  # a table in its own place
            return []
        found = find_tables(checkpoint.names).items()
        return [(name, read_table(checkpoint, name, members).rows) for name, members in found]

    for old in read_existing(file, where, old_tables) or ():
        if old != new:
            title, other = (f"{name.rstrip('.') or 'a table'} of {rows:,} rows" for name, rows in (new, old))
            raise ValueError(f"{where}: {file} holds {other} and would hold {title}; choose another --out or remove it")
