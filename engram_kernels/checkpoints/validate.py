"""A checkpoint's table put together from its tensors, and checked before a byte of its rows is read."""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import FORMATS, UE8M0_GROUP, RowFormat, checked_scale

from .files import TABLE_KEY, Checkpoint, StoredTensor
from .names import DENSE, FILE_SCALES, SCALE_NAMES, TABLE_SCALE_NAME, choose_table, layer_of, part_of

_WAY_OUT = (
    "load the model's fp8 or bfloat16 checkpoint instead, or write the rows out in bfloat16 with the tool that packed "
    "them, and `python -m engram_kernels table convert` those"
)
#: A file that is one of several by its name, as Hugging Face's libraries call them.
_OF = re.compile(r"(?P<stem>.*?)(?P<number>\d{1,9})[-_]of[-_](?P<all>\d{1,9})(?P<end>.*)\.safetensors")


@dataclass(frozen=True)
class StoredTable:
    """One table of a checkpoint: the tensors that hold its rows, in order, and their scales."""

    prefix: str
    layer: int | None  #: model layer, where the prefix tells
    format: RowFormat
    width: int
    weights: tuple[StoredTensor, ...]
    scales: tuple[StoredTensor, ...]  #: one for each of ``weights``, for formats with scales of groups; else empty
    scale: float | None  #: the table's own, for formats "e4m3" and "nvfp4"
    scale_name: str | None
    counted: bool = True  #: whether something told how many parts there are
    token_map: str | None = None  #: digest of the token map that the rows were made with, where the files tell it

    @property
    def name(self) -> str:
        """The tensors of rows, by names that are there."""
        return self.weights[0].name + (f" to {self.weights[-1].name}" if len(self.weights) > 1 else "")

    @property
    def rows(self) -> int:
        return sum(weight.shape[0] for weight in self.weights)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.weights, *self.scales))

    @property
    def paths(self) -> list[Path]:
        return list(dict.fromkeys(tensor.path for tensor in (*self.weights, *self.scales)))

    def mismatches(self, config: EngramConfig, layer: int) -> list[str]:
        """What of the table's shape differs from that of the config's layer, in words."""
        rows = config.rows_per_layer[config.layers.index(layer)]
        found = []
        if self.rows != rows:
            found.append(f"{rows:,} rows expected, got {self.rows:,} in {len(self.weights)} tensors")
        if self.width != config.row_width:
            found.append(f"rows of {config.row_width} elements expected, got {self.width}")
        return found


def select_table(
    checkpoint: Checkpoint, config: EngramConfig | None = None, layer: int | None = None, prefix: str | None = None
) -> StoredTable:
    """The table that the arguments mean, checked against the config where there is one."""
    where = checkpoint.where
    if config is not None and not isinstance(config, EngramConfig):
        raise TypeError(f"{where}: config must be an EngramConfig, got {type(config).__name__}")
    if config is not None and layer is not None and layer not in config.layers:
        raise ValueError(f"{where}: layer must be one of the config's, {config.layers}, got {layer}")
    if config is not None and layer is None and len(config.layers) == 1:
        layer = config.layers[0]
    table = read_table(checkpoint, *choose_table(checkpoint, layer, prefix))
    if config is not None:
        layer = table.layer if layer is None else layer
        if layer not in config.layers:
            raise ValueError(f"{where}: layer must be one of the config's, {config.layers}, for {table.prefix}")
        for mismatch in table.mismatches(config, layer):
            raise checkpoint.error(f"{table.name} does not fit layer {layer}: {mismatch}")
    else:
        check_all_given(checkpoint, table)
    return table


def table_digest(checkpoint: Checkpoint, table: StoredTable) -> str:
    """SHA-256, in hex, of what says which files a table is in: their sizes and times, its tensors and its scale.

    No row is read for it, and paths are left out: a folder may be mounted elsewhere.
    """
    paths = table.paths
    files = [os.fstat(checkpoint.open_fd(path)) for path in paths]
    tensors = [
        [tensor.name, tensor.dtype, tensor.shape, tensor.offset, paths.index(tensor.path)]
        for tensor in (*table.weights, *table.scales)
    ]
    facts = [table.format.name, table.width, table.scale, table.token_map, tensors]
    facts.append([[file.st_size, file.st_mtime_ns] for file in files])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_table(checkpoint: Checkpoint, prefix: str, members: dict[str, str]) -> StoredTable:
    """The table of these tensors; CheckpointError where one is missing, foreign, or of another type or shape."""
    _refuse_packed(checkpoint, prefix, members)
    parts = sorted((part.number, part.stem) for part in map(part_of, members) if part.stem and part.rest == "weight")
    whole = "weight" in members
    if whole == bool(parts):
        got = "both" if whole else "neither"
        there_is = ", ".join(sorted(members.values())[:8])
        raise checkpoint.error(
            f"expected either {prefix}weight or parts {prefix}shard_0.weight and on, got {got}; there is {there_is}"
        )
    if mlx := next((stem for _, stem in parts if not stem.startswith("shard_")), None):
        # Not read: such a conversion may hold norms as 1 + w too, and nothing in it says so.
        raise checkpoint.error(
            f"{members[mlx + 'weight']} is of MLX's layout, shards.{{k}}.weight; load the model's own checkpoint, or "
            "rename the parts to shard_{k}.weight, which `python -m engram_kernels table convert` makes one tensor"
        )
    understood = ("weight", "input_scale", TABLE_SCALE_NAME, *SCALE_NAMES)
    if foreign := sorted(name for rest, name in members.items() if part_of(rest).rest not in understood):
        raise checkpoint.error(
            f"{', '.join(foreign[:4])} beside the rows is part of none of our formats, {', '.join(FORMATS)}: {_WAY_OUT}"
        )
    numbers = [number for number, _ in parts]
    if twice := [number for number, after in itertools.pairwise(numbers) if number == after]:
        raise checkpoint.error(f"{prefix} has two parts of number {twice[0]}")
    if parts and numbers[-1] != len(numbers) - 1:
        first = next(k for k, number in enumerate(numbers) if number != k)
        count = numbers[-1] + 1 - len(numbers)
        raise checkpoint.error(f"{prefix}shard_{{k}}.weight is missing for {count:,} k, {first} the first")
    stems = [stem for _, stem in parts] or [""]
    weights = tuple(checkpoint.tensor(members[f"{stem}weight"]) for stem in stems)
    for weight in weights:
        if len(weight.shape) != 2 or (weight.dtype, weight.shape[1]) != (weights[0].dtype, weights[0].shape[1]):
            raise checkpoint.error(f"rows must be alike in all parts, [rows, width] of one dtype, got {weight}")
    rows = sum(weight.shape[0] for weight in weights)
    if rows == 0:
        raise checkpoint.error(f"{weights[0]} has no rows")
    said = _what_is_said(checkpoint, prefix, weights)
    for what, number in (("rows", rows), ("parts", len(weights))):
        if said.get(what, number) != number:
            title = prefix.rstrip(".") or "the table"
            raise checkpoint.error(f"{title} was saved with {said[what]:,} {what}, and these files have {number:,}")
    name, scales, scale = _scales(checkpoint, prefix, members, stems, weights)
    fmt = FORMATS[name]
    width = fmt.width_of(weights[0])
    fmt.check_width(width, f"{checkpoint.where}: {weights[0].name}")
    scale_name = next((rest for rest in SCALE_NAMES if stems[0] + rest in members or rest in members), None)
    return StoredTable(
        prefix,
        layer_of(prefix),
        fmt,
        width,
        weights,
        scales,
        scale,
        scale_name,
        counted=bool(said) or not parts,
        token_map=said.get("token_map"),
    )


def check_all_given(checkpoint: Checkpoint, table: StoredTable) -> None:
    """Raise CheckpointError where parts may be missing: files called "-of-N" were given, not all N, and nothing counts.

    An index or what save_safetensors wrote into the files counts, as does a config, whose rows are exact.
    """
    given: dict[tuple[Path, str, int], set[int]] = {}
    for path in checkpoint.given:
        if match := _OF.fullmatch(path.name):
            given.setdefault((path.parent, match["stem"], int(match["all"])), set()).add(int(match["number"]))
    for path in () if table.counted else table.paths:
        match = _OF.fullmatch(path.name)
        if match is None or path not in checkpoint.given:
            continue
        count = int(match["all"])
        numbers = given[path.parent, match["stem"], count]
        if len(numbers) < count:
            first = next(number for number in range(1, count + 1) if number not in numbers)
            raise checkpoint.error(
                f"{table.name} may lack parts: {count - len(numbers):,} of {count:,} files like {path} were not given, "
                f"number {first} the first; give all of them, their index, or config= to tell the rows"
            )


def _what_is_said(checkpoint: Checkpoint, prefix: str, weights: tuple[StoredTensor, ...]) -> dict[str, Any]:
    """Rows, parts and token map of this table where save_safetensors wrote them into the files' headers."""
    found = {}
    for path in dict.fromkeys(weight.path for weight in weights):
        text = checkpoint.metadata(path).get(TABLE_KEY)
        if text is None:
            continue
        try:
            said = json.loads(text)
            readable = all(type(said[name]) is int for name in ("rows", "parts"))
            readable &= isinstance(said["token_map"], str | None)
        except (ValueError, TypeError, KeyError, RecursionError):
            readable = False
        if not readable:
            raise checkpoint.error(f"{path} has a {TABLE_KEY!r} in its header that cannot be read: {text[:200]!r}")
        if said.get("prefix") != prefix:
            continue  # of another table, which a tool has renamed or put elsewhere
        if found and said != found:
            raise checkpoint.error(f"{path} is of another save than {weights[0].path}")
        found = said
    return found


def _refuse_packed(checkpoint: Checkpoint, prefix: str, members: dict[str, str]) -> None:
    """Refuse tables of packed elements that are none of our formats, by the name of theirs."""
    parts = {rest: part_of(rest) for rest in members}
    packed = next((rest for rest in members if rest.endswith("weight_packed")), None)
    first = packed or next((rest for rest, part in parts.items() if part.rest == "weight"), None)
    if first is None:
        return
    weight = checkpoint.tensor(members[first])
    if packed is None and weight.dtype[0] not in "UI" and weight.dtype != "F4":
        return
    stem = first.rpartition("weight")[0]
    scale = next((checkpoint.tensor(members[stem + name]) for name in SCALE_NAMES if stem + name in members), None)
    if "biases" in [part.rest for part in parts.values()]:
        kind = "an MLX table of packed elements (a scale and a bias per group)"
    elif any(part.rest.startswith("weight.") for part in parts.values()) or (scale is None and weight.dtype == "U8"):
        kind = "an nf4 table (4-bit codes of a Gaussian's levels)"
    elif packed is None and weight.dtype == "U8":
        return  # nvfp4 or mxfp4, or something else that its scales tell
    else:
        kind = f"a table of packed or integer elements, {weight.dtype}"
    raise checkpoint.error(f"{weight} is {kind}, which is none of our formats, {', '.join(FORMATS)}: {_WAY_OUT}")


def _scales(checkpoint, prefix, members, stems, weights) -> tuple[str, tuple[StoredTensor, ...], float | None]:
    """(name of the format, scales of each of ``weights``, scale of the table)."""
    dtype, stem = weights[0].dtype, stems[0]
    found = [rest for rest in dict.fromkeys((*SCALE_NAMES, *(stem + name for name in SCALE_NAMES))) if rest in members]
    if len(found) > 1:
        raise checkpoint.error(f"expected one kind of scale, got {', '.join(prefix + rest for rest in found)}")
    if dtype in DENSE:
        if found:
            raise checkpoint.error(f"{weights[0]} takes no scale, got {prefix}{found[0]}")
        return DENSE[dtype], (), None
    if dtype not in ("F8_E4M3", "U8"):
        expected = ", ".join(("F8_E4M3", "U8 (pairs of e2m1)", *DENSE))
        raise checkpoint.error(f"rows must be of dtype {expected}, got {weights[0]}")
    if not found:
        raise checkpoint.error(
            f"{weights[0]} has no scale: expected {prefix}scale, one ue8m0 byte per {UE8M0_GROUP} elements (DeepSeek), "
            f"or {prefix}weight_scale, one float for the table (Qwen)"
        )
    rests = found
    if found[0] not in SCALE_NAMES:  # one for each part
        rests = [each + found[0].removeprefix(stem) for each in stems]
        if missing := [rest for rest in rests if rest not in members]:
            raise checkpoint.error(f"{prefix}{missing[0]} is missing, where other parts have one")
    scales = tuple(checkpoint.tensor(members[rest]) for rest in rests)
    if all(scale.dtype in DENSE and math.prod(scale.shape) == 1 for scale in scales) and dtype != "U8":
        return "e4m3", (), _one_scale(checkpoint, scales)
    name = "e4m3_ue8m0" if dtype == "F8_E4M3" else "nvfp4" if scales[0].dtype == "F8_E4M3" else "mxfp4"
    _check_groups(checkpoint, FORMATS[name], weights, scales)
    own = [checkpoint.tensor(members[TABLE_SCALE_NAME])] if TABLE_SCALE_NAME in members else []
    if bool(own) != FORMATS[name].table_scale:
        need = "one float for the table" if not own else "none"
        got = "none" if not own else str(own[0])
        raise checkpoint.error(f"{weights[0]}, {name}, takes {need} as {prefix}{TABLE_SCALE_NAME}, got {got}")
    for scale in own:
        if scale.dtype not in DENSE or math.prod(scale.shape) != 1:
            raise checkpoint.error(f"{prefix}{TABLE_SCALE_NAME} must be one float for the table, got {scale}")
    return name, scales, _one_scale(checkpoint, own) if own else None


def _one_scale(checkpoint: Checkpoint, scales: Sequence[StoredTensor]) -> float:
    """The table's own scale, which parts may each repeat."""
    values = {float(checkpoint.read(scale, FORMATS[DENSE[scale.dtype]].dtype)) for scale in scales}
    if len(values) > 1:
        raise checkpoint.error(
            f"{scales[0]} and those of other parts are one scale per part, which is none of our formats: {_WAY_OUT}"
        )
    try:
        return float(checked_scale(values.pop(), str(scales[0])))
    except ValueError as error:
        raise checkpoint.error(str(error)) from None


def _check_groups(checkpoint: Checkpoint, fmt: RowFormat, weights, scales) -> None:
    """Raise CheckpointError unless each of ``weights`` has its scales of groups."""
    width = fmt.width_of(weights[0])
    dtypes = (FILE_SCALES[fmt.group_scale], *(["U8"] if fmt.group_scale == "ue8m0" else []))
    for scale, weight in zip(scales, weights, strict=False):
        expected = (weight.shape[0], fmt.scale_bytes(width))
        if scale.dtype not in dtypes or scale.shape != expected or len(scales) != len(weights):
            whole = (sum(part.shape[0] for part in weights), width) if len(scales) == 1 else (weight.shape[0], width)
            kind = "part" if scale.shape == (len(weights),) != (1,) else _kind_of_scale(scale.shape, whole, fmt.group)
            hint = f"; one scale per {kind} is none of our formats: {_WAY_OUT}" if kind else ""
            one = "" if fmt.packed > 1 else ", or one float for the table"
            raise checkpoint.error(
                f"scales of {weight} must be {' or '.join(dtypes)} {list(expected)}{one}, got {scale}{hint}"
            )


def _kind_of_scale(shape: tuple[int, ...], weight: tuple[int, ...], group: int) -> str | None:
    """What a scale of this shape is one of each of, where that is none of ours."""
    rows, width = weight
    if shape in ((rows,), (rows, 1)) and width != group:
        return "row"
    if shape in ((width,), (1, width)):
        return "channel"
    if len(shape) == 2 and 0 < shape[0] < rows and 0 < shape[1] < width:
        return "block"
    return None
