"""States of row optimizers into safetensors files and back, in chunks: a file is there whole or not at all.

    {i}.{name}      the state of table number i: sums [rows], or first and second [rows, R] and steps int32 [rows]
    __metadata__    "row_optimizer": JSON of what a state_dict has besides tensors

A file grows under a name of its own (``.<name>.partial``), goes to the disk (fsync) and takes its place by rename.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engram_kernels.checkpoints.files import SUFFIX, Checkpoint, CheckpointError
from engram_kernels.checkpoints.parallel import CHUNK, THREADS, Progress, check_threads, run_chunks, spans
from engram_kernels.checkpoints.reading import fill_tensors, flat_bytes
from engram_kernels.checkpoints.writing import (
    NewTensor,
    check_room,
    checked_metadata,
    file_path,
    header_of,
    locked_file,
    remove_abandoned,
    sync_folder,
    write_all,
)

if TYPE_CHECKING:
    from .optimizers import RowOptimizer

KEY = "row_optimizer"
_DEFAULT = f"optimizer{SUFFIX}"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32"}


def save_states(
    optimizer: "RowOptimizer",
    path: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """:meth:`RowOptimizer.save_safetensors`."""
    where = f"{type(optimizer).__name__}.save_safetensors"
    path = file_path(path, where, _DEFAULT)
    metadata = checked_metadata(metadata, where)
    content = optimizer.state_dict()
    tensors = {f"{i}.{name}": value for i, state in content["state"].items() for name, value in state.items()}
    _check_replaceable(path, where)
    new = [NewTensor(name, _DTYPES[x.dtype], tuple(x.shape), x.nbytes) for name, x in tensors.items()]
    facts = content[KEY] | {"group": _plain(content["param_groups"][0], where)}
    header, places = header_of(new, metadata | {KEY: json.dumps(facts)})
    remove_abandoned(path.parent, filter(_partial_name(path).fullmatch, os.listdir(path.parent)))
    check_room(path.parent, places[-1], where)
    chunks = [
        (flat, begin, end, place + begin)
        for flat, place in zip(map(flat_bytes, tensors.values()), places, strict=False)
        for begin, end in spans(len(flat), CHUNK)
    ]
    partial = path.parent / f".{path.name.removesuffix(SUFFIX)}-{secrets.token_hex(4)}.partial"
    fd = locked_file(partial)

    def write(chunk) -> int:
        flat, begin, end, place = chunk
        write_all(fd, flat[begin:end].cpu().numpy(), place)
        return end - begin

    try:
        os.ftruncate(fd, places[-1])
        write_all(fd, header, 0)
        run_chunks(chunks, write, threads=THREADS, progress=progress, total=places[-1] - len(header))
        os.fsync(fd)
        os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        os.close(fd)
    sync_folder(path.parent)
    return path


def load_states(
    optimizer: "RowOptimizer", path: str | os.PathLike, *, threads: int = THREADS, progress: Progress | None = None
) -> None:
    """:meth:`RowOptimizer.load_safetensors`."""
    where = f"{type(optimizer).__name__}.load_safetensors"
    check_threads(threads, where)
    path = file_path(path, where, _DEFAULT)
    with Checkpoint(path, where) as checkpoint:
        facts = _facts(checkpoint, path)
        check_facts(where, facts, optimizer)
        group = check_group(where, facts.pop("group", None), optimizer)
        expected = {f"{i}.{name}": x for i in range(len(optimizer.tables)) for name, x in optimizer.states(i).items()}
        check_tensors(where, {name: _form(checkpoint, name) for name in checkpoint.names}, expected)
        optimizer.wait_for_steps()
        targets = [(flat_bytes(target), [checkpoint.tensor(name)]) for name, target in expected.items()]
        try:
            fill_tensors(targets, checkpoint, threads=threads, progress=progress)
        except BaseException:
            # Some states are the file's and some are not: no step may follow.
            optimizer.close()
            raise
        optimizer.restore(facts, group)


def check_facts(where: str, facts: Any, optimizer: "RowOptimizer") -> None:
    """Raise ValueError unless ``facts`` are of an optimizer of this kind over tables of these shapes."""
    ours = optimizer.facts()
    if not isinstance(facts, dict) or not ours.keys() <= facts.keys():
        raise ValueError(
            f"{where}: expected what {ours['optimizer']} saved, with {', '.join(ours)}, got {facts!r}"[:400]
        )
    for name in ("version", "optimizer"):
        if facts[name] != ours[name]:
            raise ValueError(f"{where}: expected a state of {name} {ours[name]}, got {facts[name]}")
    if facts["tables"] != ours["tables"]:
        lists = [
            ", ".join("{rows:,} x {width} {format}".format_map(each) for each in x["tables"]) for x in (ours, facts)
        ]
        raise ValueError(f"{where}: expected states of tables {lists[0]}, got {lists[1]}")
    for name, least in (("steps", 0), ("skipped", 0), ("seed", None)):
        value = facts[name]
        if name == "seed" and value is None:
            continue
        if type(value) is not int or (least is not None and value < least):
            raise ValueError(f"{where}: {name} must be a whole number, got {value!r}")


def check_group(where: str, group: Any, optimizer: "RowOptimizer") -> dict:
    """The hyper-parameters of a parameter group, checked as those of a constructor are."""
    missing = [name for name in optimizer.defaults if not isinstance(group, Mapping) or name not in group]
    if missing:
        raise ValueError(f"{where}: expected hyper-parameters {', '.join(optimizer.defaults)}, got none of {missing}")
    found = {name: value for name, value in group.items() if name != "params"}
    if "betas" in found:
        found["betas"] = tuple(found["betas"])
    optimizer.check_options(where, found)
    return found


def check_tensors(where: str, found: Mapping[str, tuple], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless ``found``, (dtype, shape) by name, are those of ``expected``."""
    if found.keys() != expected.keys():
        missing, foreign = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise ValueError(f"{where}: expected {', '.join(expected)}; missing are {missing}, and foreign {foreign}")
    for name, tensor in expected.items():
        form = _DTYPES[tensor.dtype], tuple(tensor.shape)
        if tuple(found[name]) != form:
            raise ValueError(
                f"{where}: {name} must be {form[0]} {list(form[1])}, got {found[name][0]} {found[name][1]}"
            )


def form_of(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor as :func:`check_tensors` compares them."""
    return _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape)


def _form(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...]]:
    tensor = checkpoint.tensor(name)
    return tensor.dtype, tensor.shape


def _facts(checkpoint: Checkpoint, path: Path) -> dict:
    """What a file says of itself, CheckpointError where that is nothing or no JSON."""
    text = checkpoint.metadata(path).get(KEY)
    if text is None:
        raise checkpoint.error(f"{path} holds no optimizer state: its header has no {KEY!r}")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise checkpoint.error(f"{path} has a {KEY!r} that is no JSON ({error})") from None
    return found if isinstance(found, dict) else {}


def _plain(group: Mapping, where: str) -> dict:
    """A parameter group's entries as JSON holds them; Python's floats come back as they went."""
    found = {}
    for name, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, tuple):
            value = list(value)
        try:
            json.dumps(value)
        except TypeError:
            raise TypeError(
                f"{where}: entries of the parameter group must be numbers or texts, got {name} of "
                f"{type(value).__name__}"
            ) from None
        if name != "params":
            found[name] = value
    return found


def _check_replaceable(path: Path, where: str) -> None:
    """Raise ValueError where a file is in the way that is not an optimizer's."""
    if not path.exists():
        return
    try:
        with Checkpoint(path, where) as checkpoint:
            ours = KEY in checkpoint.metadata(path)
    except CheckpointError as error:
        raise ValueError(f"{where}: {path} is in the way and cannot be read; remove it first ({error})") from None
    if not ours:
        raise ValueError(f"{where}: {path} holds no optimizer state, and is not replaced; save to another file")


def _partial_name(path: Path) -> re.Pattern:
    """Names under which states for ``path`` grow."""
    return re.compile(rf"\.{re.escape(path.name.removesuffix(SUFFIX))}-[0-9a-f]{{8}}\.partial")
