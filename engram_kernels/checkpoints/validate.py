"""Tables in a checkpoint: found by their tensors' names, put together, and checked before a byte of them is read.

A table has a prefix, and behind it

    weight, scale                           DeepSeek-V4.1: layers.{i}.engram.embed.weight e4m3 [rows, R],
                                            .scale ue8m0 [rows, R / 32]
    shard_{k}.weight, weight_scale          Qwen: [model.language_model.]layers.{i}.ple.ple_embedding.ngram_embedding.,
                                            parts of the rows in order; one scale for all of them, where they are fp8
    shard_{k}.weight, shard_{k}.scale       what save_safetensors writes into more than one file

Scales may be called weight_scale or weight_scale_inv as well: their shape says what they are. Sources: the published
checkpoints, and the loaders of vLLM (models/deepseek_v41, qwen4_exp) and SGLang.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import FORMATS, SCALE_GROUP, RowFormat

from .files import Checkpoint, StoredTensor

_KNOWN = re.compile(
    r"(?P<prefix>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:engram\.embed|ple\.ple_embedding\.ngram_embedding)\.)(?P<rest>.+)"
)
_PART = re.compile(r"shard_(\d+)\.(.+)")
_SCALE_NAMES = ("scale", "weight_scale", "weight_scale_inv")
_DENSE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_WAY_OUT = (
    "load the model's fp8 or bfloat16 checkpoint instead, or write the rows out in bfloat16 with the tool that packed "
    "them, and `python -m engram_kernels table convert` those"
)


@dataclass(frozen=True)
class StoredTable:
    """One table of a checkpoint: parts of its rows in order, and their scales."""

    prefix: str
    layer: int | None  #: model layer, where the prefix tells
    format: RowFormat
    width: int
    weights: tuple[StoredTensor, ...]
    scales: tuple[StoredTensor, ...]  #: of the parts, for formats with scales of groups; else empty
    scale: float | None  #: the table's own, for format "e4m3"
    scale_name: str | None

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


def find_tables(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Prefix -> {rest of the name: name} of all tables with a published name; else of the one table there is.

    Names that all belong to one table under any prefix are such a table: a file that save_safetensors wrote.
    """
    names = list(names)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _KNOWN.fullmatch(name):
            found.setdefault(match["prefix"], {})[match["rest"]] = name
    if found or not names:
        return found
    weights = [name for name in names if re.fullmatch(r"(.*\.)?weight", name)]
    prefix = re.sub(r"(shard_\d+\.)?weight$", "", weights[0]) if weights else None
    if prefix is None or not all(name.startswith(prefix) and _is_member(name[len(prefix) :]) for name in names):
        return {}
    return {prefix: {name[len(prefix) :]: name for name in names}}


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
    table = read_table(checkpoint, *_choose(checkpoint, layer, prefix))
    if config is not None:
        layer = table.layer if layer is None else layer
        if layer not in config.layers:
            raise ValueError(f"{where}: layer must be one of the config's, {config.layers}, for {table.prefix}")
        for mismatch in table.mismatches(config, layer):
            raise checkpoint.error(f"{table.prefix}weight does not fit layer {layer}: {mismatch}")
    return table


def table_under(checkpoint: Checkpoint, prefix: str) -> tuple[str, dict[str, str]]:
    """Prefix and {rest of the name: name} of the table with this prefix, whatever it is."""
    prefix = as_prefix(prefix, checkpoint.where)
    members = {name[len(prefix) :]: name for name in checkpoint.names if name.startswith(prefix)}
    members = {rest: name for rest, name in members.items() if _is_member(rest)}
    if not members:
        raise checkpoint.error(f"no tensor {prefix}weight or {prefix}shard_0.weight; {_what_there_is(checkpoint)}")
    return prefix, members


def layer_of(prefix: str) -> int | None:
    """The model layer that a published prefix names."""
    match = _KNOWN.fullmatch(prefix + "weight")
    return int(match["layer"]) if match else None


def module_prefix(checkpoint: Checkpoint, layer: int) -> str:
    """What comes before the names of the layer's projection, norms and convolution."""
    name = re.compile(rf"((?:.*\.)?layers\.{layer}\.(?:engram|ple)\.)(?:wkv|key_proj)\.weight")
    found = [match[1] for name_there in checkpoint.names if (match := name.fullmatch(name_there))]
    if len(found) != 1:
        got = f"both {found[0]} and {found[1]} (choose by prefix=)" if found else "neither"
        raise checkpoint.error(
            f"expected layers.{layer}.engram.wkv.weight (DeepSeek-V4.1) or layers.{layer}.ple.key_proj.weight (Qwen), "
            f"got {got}"
        )
    return found[0]


def as_prefix(prefix: str, where: str) -> str:
    """``prefix`` with the dot at its end that may be left out."""
    if not isinstance(prefix, str):
        raise TypeError(f"{where}: prefix must be a text, got {type(prefix).__name__}")
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def read_table(checkpoint: Checkpoint, prefix: str, members: dict[str, str]) -> StoredTable:
    """The table of these tensors; CheckpointError where one is missing, foreign, or of another type or shape."""
    _refuse_packed(checkpoint, prefix, members)
    whole = "weight" in members
    parts = sorted(int(match[1]) for rest in members if (match := _PART.fullmatch(rest)) and match[2] == "weight")
    if whole == bool(parts):
        got = "both" if whole else "neither"
        raise checkpoint.error(f"expected either {prefix}weight or parts {prefix}shard_0.weight and on, got {got}")
    missing = sorted(set(range(parts[-1] + 1)) - set(parts)) if parts else []
    if missing:
        raise checkpoint.error(f"{prefix}shard_{{k}}.weight is missing for {len(missing)} k, {missing[0]} the first")
    stems = [""] if whole else [f"shard_{k}." for k in parts]
    weights = tuple(checkpoint.tensor(members[f"{stem}weight"]) for stem in stems)
    for weight in weights:
        if len(weight.shape) != 2 or (weight.dtype, weight.shape[1]) != (weights[0].dtype, weights[0].shape[1]):
            raise checkpoint.error(f"rows must be alike in all parts, [rows, width] of one dtype, got {weight}")
    if sum(weight.shape[0] for weight in weights) == 0:
        raise checkpoint.error(f"{weights[0]} has no rows")
    name, scales, scale = _scales(checkpoint, prefix, members, stems, weights)
    fmt = FORMATS[name]
    fmt.check_width(weights[0].shape[1], f"{checkpoint.where}: {prefix}weight")
    scale_name = next((rest for rest in _SCALE_NAMES if stems[0] + rest in members or rest in members), None)
    return StoredTable(prefix, layer_of(prefix), fmt, weights[0].shape[1], weights, scales, scale, scale_name)


def _choose(checkpoint: Checkpoint, layer: int | None, prefix: str | None) -> tuple[str, dict[str, str]]:
    """Prefix and members of the table meant."""
    if prefix is not None:
        return table_under(checkpoint, prefix)
    tables = find_tables(checkpoint.names)
    if layer is not None and None not in map(layer_of, tables):
        tables = {prefix: members for prefix, members in tables.items() if layer_of(prefix) == layer}
    if len(tables) != 1:
        wanted = "" if layer is None else f" of layer {layer}"
        count = f"{len(tables)} tables{wanted} (choose by layer= or prefix=)" if tables else f"no Engram table{wanted}"
        raise checkpoint.error(f"{count}; {_what_there_is(checkpoint)}")
    return next(iter(tables.items()))


def _what_there_is(checkpoint: Checkpoint) -> str:
    tables = list(find_tables(checkpoint.names))
    if tables:
        return f"there is {', '.join(f'{prefix}weight' for prefix in tables[:8])}"
    names = sorted(checkpoint.names)
    return f"the {len(names)} tensors are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _is_member(rest: str) -> bool:
    """Whether a name can belong to a table whose prefix was taken off."""
    match = _PART.fullmatch(rest)
    stem, *more = (match[2] if match else rest).split(".")
    return stem in ("weight", "weight_packed", "weight_scale_2", "input_scale", *_SCALE_NAMES) and (
        not more or stem == "weight"
    )


def _refuse_packed(checkpoint: Checkpoint, prefix: str, members: dict[str, str]) -> None:
    """Refuse tables of packed elements by the name of their format."""
    rests = [match[2] if (match := _PART.fullmatch(rest)) else rest for rest in members]
    packed = next((rest for rest in members if rest.endswith("weight_packed")), None)
    first = packed or next((rest for rest in ("weight", "shard_0.weight") if rest in members), None)
    if first is None:
        return
    weight = checkpoint.tensor(members[first])
    if packed is None and weight.dtype not in ("U8", "I8", "F4", "I32"):
        return
    stem = first.rpartition("weight")[0]
    scale = next((checkpoint.tensor(members[stem + name]) for name in _SCALE_NAMES if stem + name in members), None)
    if "weight_scale_2" in rests or (scale is not None and scale.dtype == "F8_E4M3"):
        kind = "an nvfp4 table (4-bit elements, one e4m3 scale per 16, one for all)"
    elif any(rest.startswith("weight.") for rest in rests) or (scale is None and weight.dtype == "U8"):
        kind = "an nf4 table (4-bit codes of a Gaussian's levels)"
    else:
        kind = f"a table of packed or integer elements, {weight.dtype}"
    raise checkpoint.error(f"{weight} is {kind}, which is none of our formats, {', '.join(FORMATS)}: {_WAY_OUT}")


def _scales(checkpoint, prefix, members, stems, weights) -> tuple[str, tuple[StoredTensor, ...], float | None]:
    """(name of the format, scales of the parts, scale of the table)."""
    dtype, width = weights[0].dtype, weights[0].shape[1]
    common = [rest for rest in _SCALE_NAMES if rest in members]
    own = [rest for rest in _SCALE_NAMES if stems[0] + rest in members and stems[0]]
    if len(common) + len(own) > 1:
        named = ", ".join([prefix + rest for rest in common] + [prefix + stems[0] + rest for rest in own])
        raise checkpoint.error(f"expected one kind of scale, got {named}")
    if dtype in _DENSE:
        if common or own:
            raise checkpoint.error(f"{weights[0]} takes no scale, got {prefix}{(common or [stems[0] + own[0]])[0]}")
        return _DENSE[dtype], (), None
    if dtype != "F8_E4M3":
        expected = ", ".join(("F8_E4M3", *_DENSE))
        raise checkpoint.error(f"rows must be of dtype {expected}, got {weights[0]}")
    if not common and not own:
        raise checkpoint.error(
            f"{weights[0]} has no scale: expected {prefix}scale, one ue8m0 byte per {SCALE_GROUP} elements (DeepSeek), "
            f"or {prefix}weight_scale, one float for the table (Qwen)"
        )
    if common:
        found = checkpoint.tensor(members[common[0]])
        if found.dtype in _FLOAT_DTYPES and found.nbytes == torch.empty(0, dtype=_FLOAT_DTYPES[found.dtype]).itemsize:
            value = float(checkpoint.read(found, _FLOAT_DTYPES[found.dtype]))
            if not 0 < value < float("inf"):
                raise checkpoint.error(f"{found} must be a positive number, got {value}")
            return "e4m3", (), value
    names = [members.get(rest) for rest in (common or [stem + own[0] for stem in stems])]
    if None in names:
        raise checkpoint.error(f"{prefix}{stems[names.index(None)]}{own[0]} is missing, where other parts have one")
    scales = tuple(map(checkpoint.tensor, names))
    for scale, weight in zip(scales, weights, strict=False):
        expected = (weight.shape[0], width // SCALE_GROUP)
        if scale.dtype not in ("F8_E8M0", "U8") or scale.shape != expected or len(scales) != len(weights):
            hint = f"one scale per row is none of our formats: {_WAY_OUT}" if _per_row(scale, weight) else ""
            raise checkpoint.error(
                f"scales of {weight} must be F8_E8M0 or U8 {list(expected)}, or one float for the table, "
                f"got {scale}{'; ' + hint if hint else ''}"
            )
    return "e4m3_ue8m0", scales, None


def _per_row(scale: StoredTensor, weight: StoredTensor) -> bool:
    rows = weight.shape[0]
    return scale.shape in ((rows,), (rows, 1)) and weight.shape[1] != SCALE_GROUP
