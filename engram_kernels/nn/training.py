"""A training run in one folder: module, tables, optimizers of both, and a step number, all of one moment.

    training.json        which folder holds the run, written last and replaced at once
    run-{8 digits}/      dense.pt, table-{i}.safetensors, rows-{i}-{part}.safetensors

A save goes to a new folder, and training.json names it when every file is on the disk: a save that fails or is killed
leaves the run before it. Rows of a table over ranks are one file whatever the number of ranks; states of its rows are a
file a part, with the ranges of rows it holds, of which a rank of another world reads what it needs.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engram_kernels.checkpoints.files import Checkpoint
from engram_kernels.checkpoints.opening import naming, read_json
from engram_kernels.checkpoints.reading import fill_tensors, flat_bytes
from engram_kernels.checkpoints.validate import select_table
from engram_kernels.checkpoints.writing import mode_of, new_file, partial_path, remove_abandoned, sync_folder, write_all
from engram_kernels.geometry import kinds
from engram_kernels.geometry.kinds import Each, Instance, Keyed, Optional, Text, Whole, takes
from engram_kernels.launching.exchange import Ranks
from engram_kernels.ranks.sharded import ShardedTable
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.files import fill_table
from engram_kernels.training.row_optimizer import RowOptimizer
from engram_kernels.training.saving import open_states

from .engram import Engram

_MANIFEST, _DENSE = "training.json", "dense.pt"
_FOLDER = re.compile(r"run-[0-9a-f]{8}")
_SAVE, _LOAD = "save_training", "load_training"
Table = EngramTable | ShardedTable
_RUN = dict(
    folder=kinds.Path(),
    module=Instance(nn.Module),
    row_optimizers=Each(Instance(RowOptimizer)),
    optimizers=Each(Instance(torch.optim.Optimizer)),
    schedulers=Each(Instance(torch.optim.lr_scheduler.LRScheduler)),
    tables=Optional(Keyed(Text(), Instance(EngramTable, ShardedTable))),
)


@takes(**_RUN, step=Whole(0), extra=kinds.Anything())
def save_training(
    folder: str | os.PathLike,
    module: nn.Module,
    row_optimizers: Sequence[RowOptimizer],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler] = (),
    tables: Mapping[str, Table] | None = None,
    step: int = 0,
    extra: Any = None,
) -> Path:
    """Save a run, all of it or nothing; returns ``folder``, in which a run that is there is replaced at once.

    folder: all ranks of a job see it, for which saving is collective: rank 0 writes what all have alike, each rank its
    part of a :class:`ShardedTable` over the world and states.
    module: its state_dict, of DistributedDataParallel the wrapped one's; FSDP2's is not taken. tables: by name; None is
    those of the module's :class:`Engram` modules. row_optimizers: of these tables; states, options, seeds and counters.
    optimizers, schedulers: by their state_dict. step, extra: come back from :func:`load_training`; extra is what
    ``torch.load(weights_only=True)`` takes, such as numbers, texts and tensors.
    Call it between a step and the next backward pass. ValueError where tables and row optimizers do not belong
    together, for an ``extra`` of other things, and for FSDP2's modules; OSError where a file cannot be written.
    """
    folder, ranks = Path(folder), _World(_SAVE)
    found = _tables_of(module, tables, row_optimizers, ranks.size, _SAVE)
    others = dict(optimizers=optimizers, schedulers=schedulers)

    def prepare() -> str | None:
        _check_plain(module, _SAVE)
        if ranks.rank:
            return None
        try:
            torch.load(_saved(extra), weights_only=True)
        except Exception as error:
            raise ValueError(f"{_SAVE}: extra must be what torch.load(weights_only=True) takes ({error})") from None
        folder.mkdir(parents=True, exist_ok=True)
        old = _current(folder)
        _sweep(folder, old)
        remove_abandoned(folder / _MANIFEST)
        made = f"run-{secrets.token_hex(4)}"
        os.mkdir(folder / made)
        if old and (mode := mode_of(folder / old)):
            os.chmod(folder / made, mode)  # as private as what it replaces
        return made

    name = ranks.first(ranks.attempt("making the folder", prepare))
    with _swept(folder, ranks.rank):
        run = folder / name
        manifest: dict[str, Any] = dict(
            version=1, folder=name, step=step, ranks=ranks.size, tables={}, row_optimizers=[]
        )
        manifest |= {name: len(given) for name, given in others.items()}
        for number, (table_name, table) in enumerate(found.items()):
            file = f"table-{number}.safetensors"
            manifest["tables"][table_name] = dict(file=file) | _geometry(table)
            if isinstance(table, ShardedTable):
                table.save_safetensors(run / file)
            else:
                ranks.attempt("writing a table", partial(_on_rank_0, ranks.rank, table.save_safetensors, run / file))
        for number, optimizer in enumerate(row_optimizers):
            parts = ranks.size if any(table.shard for table in optimizer.tables) else 1
            save = partial(optimizer.save_safetensors, run / f"rows-{number}-{ranks.rank}.safetensors")
            ranks.attempt("writing states of rows", save if ranks.rank < parts else lambda: None)
            ranges = ranks.gather([table.shard.ranges if table.shard else None for table in optimizer.tables])[:parts]
            kind = type(optimizer).__name__
            manifest["row_optimizers"].append(dict(kind=kind, tables=_names(found, optimizer), ranges=ranges))

        def finish() -> None:
            dense = dict(module=_bare(module).state_dict(), extra=extra)
            dense |= {name: [one.state_dict() for one in given] for name, given in others.items()}
            with new_file(run / _DENSE, partial_path(run / _DENSE)) as fd, os.fdopen(os.dup(fd), "wb") as file:
                torch.save(dense, file)
            sync_folder(run)
            sync_folder(folder)
            with new_file(folder / _MANIFEST, partial_path(folder / _MANIFEST)) as fd:
                write_all(fd, json.dumps(manifest, indent=1).encode(), 0)
            _sweep(folder, name)

        ranks.attempt("finishing", partial(_on_rank_0, ranks.rank, finish))
    return folder


@takes(**_RUN)
def load_training(
    folder: str | os.PathLike,
    module: nn.Module,
    row_optimizers: Sequence[RowOptimizer],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler] = (),
    tables: Mapping[str, Table] | None = None,
) -> tuple[int, Any]:
    """Bring a run back into objects of the same kinds; returns (step, extra) as they were saved.

    folder: what :func:`save_training` wrote, by any number of ranks.
    module, row_optimizers, optimizers, schedulers, tables: objects like those that were saved, in the same order and
    under the same names, which rows and states are read into.
    What does not fit, by the folder's manifest, is a ValueError before anything is changed; an error after that leaves
    optimizers of rows closed.
    """
    folder, ranks = Path(folder), _World(_LOAD)
    found = _tables_of(module, tables, row_optimizers, ranks.size, _LOAD)
    others = dict(optimizers=optimizers, schedulers=schedulers)

    def check() -> dict:
        _check_plain(module, _LOAD)
        manifest = _manifest(folder, _LOAD)
        _check_fits(manifest, found, row_optimizers, others)
        return manifest

    manifest = ranks.attempt("reading the manifest", check)
    run = folder / manifest["folder"]

    def load() -> tuple[int, Any]:
        dense = torch.load(run / _DENSE, map_location="cpu", weights_only=True)
        _bare(module).load_state_dict(dense["module"])
        for name, given in others.items():
            for one, state in zip(given, dense[name], strict=True):
                one.load_state_dict(state)
        for name, table in found.items():
            _fill_rows(table, run / manifest["tables"][name]["file"])
        for number, optimizer in enumerate(row_optimizers):
            saved = manifest["row_optimizers"][number]["ranges"]
            files = [run / f"rows-{number}-{part}.safetensors" for part in range(len(saved))]
            _fill_states(optimizer, files, saved, ranks.rank)
        return manifest["step"], dense["extra"]

    return ranks.attempt("loading", load)


class _World:
    """All ranks of a job, which may be one process without torch.distributed."""

    def __init__(self, where: str):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._ranks, self._where = Ranks(None, where) if several else None, where
        self.rank, self.size = (self._ranks.rank, self._ranks.size) if self._ranks else (0, 1)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        return self._ranks.attempt(self._where, what, work) if self._ranks else work()

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.gather(value, self._where, "what ranks hold") if self._ranks else [value]

    def first(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value)[0]


def _on_rank_0(rank: int, work: Callable, *arguments) -> Any:
    return work(*arguments) if rank == 0 else None


def _saved(value: Any) -> BytesIO:
    buffer = BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _bare(module: nn.Module) -> nn.Module:
    """What DistributedDataParallel wraps."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _check_plain(module: nn.Module, where: str) -> None:
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"{where}: module must have whole parameters, got {name} of FSDP2; save it by "
                "torch.distributed.checkpoint, and tables and row optimizers here with a module that has none"
            )


def _tables_of(module, given, row_optimizers, world: int, where: str) -> dict[str, Table]:
    """The run's tables by name; ValueError where some cannot be saved by all ranks together."""
    found: dict[str, Table] = dict(given or {})
    if given is None:
        for name, each in _bare(module).named_modules():
            if isinstance(each, Engram) and not any(each.table is table for table in found.values()):
                found[name] = each.table
    for name, table in found.items():
        if isinstance(table, ShardedTable) and (table.ranks.size != world or table.replicas is not None):
            raise ValueError(f"{where}: tables must be over all {world} ranks, got {name} over {table.ranks.size}")
    for optimizer in row_optimizers:
        _names(found, optimizer, where)
        if world > 1 and optimizer._reduce is None and any(table.shard is None for table in optimizer.tables):
            raise ValueError(
                f"{where}: row_optimizers must be of tables that ranks have alike or together, got one with "
                "reduce=None; save tables that differ by rank with their own save_safetensors"
            )
    return found


def _names(found: Mapping[str, Table], optimizer: RowOptimizer, where: str = _SAVE) -> list[str]:
    """The names of an optimizer's tables."""
    names = {id(table.part if isinstance(table, ShardedTable) else table): name for name, table in found.items()}
    for table in optimizer.tables:
        if id(table) not in names:
            raise ValueError(
                f"{where}: tables must have all that row_optimizers move, got {sorted(found)} without {table!r}"
            )
    return [names[id(table)] for table in optimizer.tables]


def _geometry(table: Table) -> dict[str, Any]:
    return dict(rows=table.rows, width=table.width, format=table.format.name)


def _current(folder: Path) -> str | None:
    """The folder of the run that is there, None where there is none yet."""
    return _manifest(folder, _SAVE)["folder"] if os.path.lexists(folder / _MANIFEST) else None


def _manifest(folder: Path, where: str) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{where}: folder must hold a finished run, got {folder} without {_MANIFEST}")
    with naming(path):
        found = read_json(path, where)
    if not isinstance(found, dict) or found.get("version") != 1 or not _FOLDER.fullmatch(str(found.get("folder"))):
        raise ValueError(f"{where}: folder must hold a run of version 1, got {path} with other content")
    return found


def _sweep(folder: Path, keep: str | None) -> None:
    """Remove runs that are not, or no longer, the folder's; what cannot be removed is tried again by the next save."""
    for name in os.listdir(folder):
        if _FOLDER.fullmatch(name) and name != keep:
            with suppress(OSError):
                shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def _swept(folder: Path, rank: int) -> Iterator[None]:
    """Where a save fails, what it wrote goes: a disk that is full has room again."""
    try:
        yield
    except BaseException:
        if rank == 0:
            with suppress(OSError, ValueError):
                _sweep(folder, _current(folder))
        raise


def _check_fits(
    manifest: Mapping,
    found: Mapping[str, Table],
    row_optimizers: Sequence[RowOptimizer],
    others: Mapping[str, Sequence],
) -> None:
    saved = manifest["tables"]
    if saved.keys() != found.keys():
        raise ValueError(f"{_LOAD}: tables must be those that were saved, {sorted(saved)}, got {sorted(found)}")
    for name, table in found.items():
        expected = {key: value for key, value in saved[name].items() if key != "file"}
        if expected != _geometry(table):
            raise ValueError(f"{_LOAD}: tables must be as they were saved, {name} with {expected}, got {table!r}")
    theirs = [(one["kind"], one["tables"]) for one in manifest["row_optimizers"]]
    ours = [(type(optimizer).__name__, _names(found, optimizer, _LOAD)) for optimizer in row_optimizers]
    if theirs != ours:
        raise ValueError(f"{_LOAD}: row_optimizers must be those that were saved, {theirs}, got {ours}")
    for name, given in others.items():
        if len(given) != manifest[name]:
            raise ValueError(f"{_LOAD}: {name} must be {manifest[name]}, as many as were saved, got {len(given)}")


def _fill_rows(table: Table, path: Path) -> None:
    part = table.part if isinstance(table, ShardedTable) else table
    part.wait_for_steps()
    with Checkpoint(path, _LOAD) as checkpoint:
        stored = select_table(checkpoint, None, None, None)
        if None not in (stored.token_map, part.token_map) and stored.token_map != part.token_map:
            raise ValueError(f"{_LOAD}: tables must be of the token map that chose the saved rows, got another")
        part.rows_changed()  # before as well: no digest may vouch for rows that an interrupt leaves half loaded
        fill_table(part, checkpoint, stored, ranges=part.shard.ranges if part.shard else None)
    part.rows_changed()


def _fill_states(optimizer: RowOptimizer, files: Sequence[Path], saved: Sequence, rank: int) -> None:
    """States of an optimizer from the files of all parts, whose tables held the ranges ``saved[part][table]``."""
    numbers = range(len(optimizer.tables))
    shards = [table.shard for table in optimizer.tables]
    per_row = {f"{i}.{name}" for i in numbers for name, _, _, place in optimizer._rule.state if place is None}
    shapes = {f"{i}.{name}": tuple(state.shape) for i in numbers for name, state in optimizer.states(i).items()}
    with ExitStack() as opened:
        parts = [opened.enter_context(open_states(path, _LOAD)) for path in files]
        first, content = parts[0]
        # Numbers of rows are a part's; those of whole tables were compared, and each tensor's is below.
        own = [
            dict(table, rows=mine.rows) for table, mine in zip(content.facts["tables"], optimizer.tables, strict=True)
        ]
        skipped = sum(part.facts["skipped"] for _, part in parts) if rank == 0 or not any(shards) else 0
        layout = {
            name: (dtype, shapes[name]) if name in per_row else (dtype, shape)
            for name, (dtype, shape) in content.layout.items()
        }

        def fill(tensors: Mapping[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                table = int(name.split(".")[0])
                if name not in per_row:
                    fill_tensors([(flat_bytes(tensor), [first.tensor(name)])], first)
                    continue
                wanted = shards[table].ranges if shards[table] else [(0, len(tensor))]
                rows = shards[table].rows if shards[table] else len(tensor)
                for (checkpoint, _), held in zip(parts, saved, strict=True):
                    _fill_overlaps(tensor, wanted, checkpoint, name, held[table] or [(0, rows)] * (held[table] is None))

        facts = content.facts | dict(tables=own, skipped=skipped)
        optimizer._take_over(_LOAD, content._replace(facts=facts, layout=layout), fill)


def _fill_overlaps(tensor: torch.Tensor, wanted, checkpoint: Checkpoint, name: str, held) -> None:
    """Copy what ``checkpoint`` holds, rows ``held``, of what ``tensor`` is to hold, rows ``wanted``, range by range."""
    stored = checkpoint.tensor(name)
    # A rank without rows keeps one that is nobody's.
    if stored.shape[0] != max(1, sum(high - low for low, high in held)):
        raise checkpoint.error(f"{stored} in {stored.path} is not of the rows that {_MANIFEST} says")
    at = 0
    for begin, end in wanted:
        position = 0
        for low, high in held:
            first, last = max(begin, low), min(end, high)
            if first < last:
                rows = tensor[at + first - begin : at + last - begin]
                ranges = [(position + first - low, position + last - low)]
                fill_tensors([(flat_bytes(rows), [stored])], checkpoint, ranges=ranges)
            position += high - low
        at += end - begin
