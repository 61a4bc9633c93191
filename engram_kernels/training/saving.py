"""States of row optimizers into safetensors files and back, in chunks: a file is there whole or not at all.

    {i}.{name}      the state of table number i: sums [rows], or first and second [rows, R] and steps int32 [rows]
    __metadata__    "row_optimizer": JSON of what a state_dict has besides tensors

How a file is written: checkpoints/writing.py.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engram_kernels.checkpoints.files import OPTIMIZER_KEY, SUFFIX, Checkpoint
from engram_kernels.checkpoints.parallel import CHUNK, THREADS, Progress, run_chunks, spans
from engram_kernels.checkpoints.reading import fill_tensors, flat_bytes
from engram_kernels.checkpoints.writing import (
    DirectFile,
    NewTensor,
    allocate,
    check_disk,
    checked_metadata,
    file_path,
    header_of,
    new_file,
    partial_path,
    read_existing,
    remove_abandoned,
    write_all,
)

KEY = OPTIMIZER_KEY
_DEFAULT = f"optimizer{SUFFIX}"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32", torch.int64: "I64"}


class Content(NamedTuple):
    """What is saved of an optimizer, as it says or as a file's header does."""

    facts: Any  #: version, optimizer, tables, steps, skipped and seed, in plain numbers
    groups: Any  #: parameter groups: hyper-parameters of each, and "params", the numbers of its tables
    layout: Mapping[str, tuple[str, tuple[int, ...]]]  #: (dtype as safetensors calls it, shape) of tensors by name

    def check(self, where: str, own: "Content") -> list[dict]:
        """The groups' hyper-parameters; ValueError unless this is of an optimizer like the one of which ``own`` is."""
        ours, facts = own.facts, self.facts
        if not isinstance(facts, dict) or not ours.keys() <= facts.keys():
            raise ValueError(
                f"{where}: expected what {ours['optimizer']} saved, with {', '.join(ours)}, got {facts!r}"[:400]
            )
        for name in ("version", "optimizer"):
            if facts[name] != ours[name]:
                raise ValueError(f"{where}: expected a state of {name} {ours[name]}, got {facts[name]}")
        expected, got = (_described(found["tables"], where) for found in (ours, facts))
        if expected != got:
            raise ValueError(f"{where}: expected states of tables {', '.join(expected)}, got {', '.join(got)}")
        for table, saved in zip(ours["tables"], facts["tables"], strict=True):
            maps = table["token_map"], saved.get("token_map")
            if None not in maps and maps[0] != maps[1]:
                raise ValueError(
                    f"{where}: expected states of rows chosen by token map {maps[0][:12]}, got {str(maps[1])[:12]}: is "
                    "the tokenizer of another revision?"
                )
        for name in ("steps", "skipped", "seed"):
            value = facts[name]
            if name == "seed" and value is None:
                continue
            if type(value) is not int or (name != "seed" and value < 0):
                raise ValueError(f"{where}: {name} must be a whole number, got {value!r}")
        groups = self._checked_groups(where, own.groups)
        if self.layout.keys() != own.layout.keys():
            missing, foreign = (sorted(a.layout.keys() - b.layout.keys()) for a, b in ((own, self), (self, own)))
            raise ValueError(f"{where}: expected {', '.join(own.layout)}; missing are {missing}, and foreign {foreign}")
        for name, (dtype, shape) in own.layout.items():
            if self.layout[name] != (dtype, shape):
                got = " ".join(map(str, self.layout[name]))
                raise ValueError(f"{where}: {name} must be {dtype} {list(shape)}, got {got}")
        return groups

    def _checked_groups(self, where: str, own: Sequence[Mapping]) -> list[dict]:
        """The hyper-parameters of each group; ValueError unless groups are of the tables that ``own`` has in them."""
        given = self.groups if isinstance(self.groups, (list, tuple)) else [self.groups]
        if len(given) != len(own):
            raise ValueError(f"{where}: expected {len(own)} parameter groups, got {len(given)}")
        found = []
        for ours, group in zip(own, given, strict=True):
            missing = [name for name in ours if not isinstance(group, Mapping) or name not in group]
            if len(own) == 1 and "params" in missing:
                missing.remove("params")  # all tables, in files from before there could be several groups
            if missing:
                raise ValueError(f"{where}: expected parameter groups of {', '.join(ours)}, got none of {missing}")
            tables = group.get("params", ours["params"])
            if tables != ours["params"]:
                raise ValueError(
                    f"{where}: expected a parameter group of tables {ours['params']}, got {tables!r}"[:400]
                )
            found.append({name: value for name, value in group.items() if name != "params"})
        return found


def _described(tables: Any, where: str) -> list[str]:
    """Tables in words; ValueError where that is no list of them."""
    try:
        return ["{rows:,} x {width} {format}".format_map(each) for each in tables]
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError(f"{where}: expected rows, width and format of tables, got {tables!r}"[:400]) from None


def tensors_of(state: Mapping[int, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a state_dict's "state" by the names that they have in a file."""
    return {f"{i}.{name}": tensor for i, tensors in state.items() for name, tensor in tensors.items()}


def layout_of(tensors: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a file's header would say of the tensors; also of other values, which a foreign state_dict may hold."""
    found = {}
    for name, value in tensors.items():
        dtype = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        found[name] = _DTYPES.get(dtype, str(dtype).removeprefix("torch.")), tuple(getattr(value, "shape", ()))
    return found


def save_states(
    state_dict: Mapping[str, Any],
    path: str | os.PathLike,
    where: str,
    *,
    metadata: Mapping[str, str] | None,
    progress: Progress | None,
) -> Path:
    """:meth:`RowOptimizer.save_safetensors`."""
    path = file_path(path, where, _DEFAULT)
    metadata = checked_metadata(metadata, where)
    tensors = tensors_of(state_dict["state"])
    _check_replaceable(path, where)
    new = [NewTensor(name, *layout, tensors[name].nbytes) for name, layout in layout_of(tensors).items()]
    facts = state_dict[KEY] | {"groups": [_plain(group, where) for group in state_dict["param_groups"]]}
    header, places = header_of(new, metadata | {KEY: json.dumps(facts)})
    remove_abandoned(path)
    check_disk(path.parent, places[-1], where)
    chunks = [
        (flat[begin:end], place + begin)
        for flat, place in zip(map(flat_bytes, tensors.values()), places, strict=False)
        for begin, end in spans(len(flat), CHUNK)
    ]
    with new_file(path, partial_path(path)) as fd, closing(DirectFile(fd)) as direct:

        def write(chunk: tuple[torch.Tensor, int]) -> int:
            content, place = chunk
            direct.write(content.cpu().numpy(), place)
            return len(content)

        allocate(fd, places[-1])
        write_all(fd, header, 0)
        run_chunks(chunks, write, threads=THREADS, progress=progress, total=places[-1] - len(header))
    return path


@contextmanager
def open_states(path: str | os.PathLike, where: str) -> Iterator[tuple[Checkpoint, Content]]:
    """A file of :func:`save_states` and what its header says; CheckpointError where that is nothing or no JSON."""
    path = file_path(path, where, _DEFAULT)
    with Checkpoint(path, where) as checkpoint:
        text = checkpoint.metadata(path).get(KEY)
        if text is None:
            raise checkpoint.error(f"{path} holds no optimizer state: its header has no {KEY!r}")
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise checkpoint.error(f"{path} has a {KEY!r} that is no JSON ({error})") from None
        facts = facts if isinstance(facts, dict) else {}
        stored = map(checkpoint.tensor, checkpoint.names)
        layout = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in stored}
        groups = facts.pop("groups", None)
        yield checkpoint, Content(facts, facts.pop("group", None) if groups is None else groups, layout)


def fill_states(
    tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint, *, threads: int, progress: Progress | None
) -> None:
    """Read the tensors from an open file, where they have the same names."""
    targets = [(flat_bytes(tensor), [checkpoint.tensor(name)]) for name, tensor in tensors.items()]
    fill_tensors(targets, checkpoint, threads=threads, progress=progress)


def _plain(group: Mapping, where: str) -> dict:
    """A parameter group's entries as JSON holds them; Python's floats come back as they went."""
    found = dict(group)
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            found[name] = value = value.item()
        try:
            json.dumps(value)
        except TypeError:
            raise TypeError(
                f"{where}: entries of the parameter group must be numbers or texts, got {name} of "
                f"{type(value).__name__}"
            ) from None
    return found


def _check_replaceable(path: Path, where: str) -> None:
    """Raise ValueError where a file is in the way that is not an optimizer's."""
    ours = read_existing(path, where, lambda checkpoint: KEY in checkpoint.metadata(path))
    if ours is False:
        raise ValueError(f"{where}: {path} holds no optimizer state, and is not replaced; save to another file")
