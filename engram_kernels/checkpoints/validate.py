"""A checkpoint's table put together from its tensors, and checked before a byte of its rows is read."""

import math
from dataclasses import dataclass
from pathlib import Path

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import FORMATS, SCALE_GROUP, RowFormat, checked_scale

from .files import Checkpoint, StoredTensor
from .names import SCALE_NAMES, SHARD, choose_table, layer_of

#: Dense formats by what safetensors calls their dtype.
DENSE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_WAY_OUT = (
    "load the model's fp8 or bfloat16 checkpoint instead, or write the rows out in bfloat16 with the tool that packed "
    "them, and `python -m engram_kernels table convert` those"
)


@dataclass(frozen=True)
class StoredTable:
    """One table of a checkpoint: the tensors that hold its rows, in order, and their scales."""

    prefix: str
    layer: int | None  #: model layer, where the prefix tells
    format: RowFormat
    width: int
    weights: tuple[StoredTensor, ...]
    scales: tuple[StoredTensor, ...]  #: one for each of ``weights``, for format "e4m3_ue8m0"; else empty
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
            raise checkpoint.error(f"{table.prefix}weight does not fit layer {layer}: {mismatch}")
    return table


def read_table(checkpoint: Checkpoint, prefix: str, members: dict[str, str]) -> StoredTable:
    """The table of these tensors; CheckpointError where one is missing, foreign, or of another type or shape."""
    _refuse_packed(checkpoint, prefix, members)
    whole = "weight" in members
    shards = sorted(int(match[1]) for rest in members if (match := SHARD.fullmatch(rest)) and match[2] == "weight")
    if whole == bool(shards):
        got = "both" if whole else "neither"
        raise checkpoint.error(f"expected either {prefix}weight or parts {prefix}shard_0.weight and on, got {got}")
    missing = sorted(set(range(shards[-1] + 1)) - set(shards)) if shards else []
    if missing:
        raise checkpoint.error(f"{prefix}shard_{{k}}.weight is missing for {len(missing)} k, {missing[0]} the first")
    stems = [""] if whole else [f"shard_{k}." for k in shards]
    weights = tuple(checkpoint.tensor(members[f"{stem}weight"]) for stem in stems)
    for weight in weights:
        if len(weight.shape) != 2 or (weight.dtype, weight.shape[1]) != (weights[0].dtype, weights[0].shape[1]):
            raise checkpoint.error(f"rows must be alike in all parts, [rows, width] of one dtype, got {weight}")
    if sum(weight.shape[0] for weight in weights) == 0:
        raise checkpoint.error(f"{weights[0]} has no rows")
    name, scales, scale = _scales(checkpoint, prefix, members, stems, weights)
    fmt = FORMATS[name]
    fmt.check_width(weights[0].shape[1], f"{checkpoint.where}: {prefix}weight")
    scale_name = next((rest for rest in SCALE_NAMES if stems[0] + rest in members or rest in members), None)
    return StoredTable(prefix, layer_of(prefix), fmt, weights[0].shape[1], weights, scales, scale, scale_name)


def _refuse_packed(checkpoint: Checkpoint, prefix: str, members: dict[str, str]) -> None:
    """Refuse tables of packed elements by the name of their format."""
    rests = [match[2] if (match := SHARD.fullmatch(rest)) else rest for rest in members]
    packed = next((rest for rest in members if rest.endswith("weight_packed")), None)
    first = packed or next((rest for rest in ("weight", "shard_0.weight") if rest in members), None)
    if first is None:
        return
    weight = checkpoint.tensor(members[first])
    if packed is None and weight.dtype not in ("U8", "I8", "F4", "I32"):
        return
    stem = first.rpartition("weight")[0]
    scale = next((checkpoint.tensor(members[stem + name]) for name in SCALE_NAMES if stem + name in members), None)
    if "weight_scale_2" in rests or (scale is not None and scale.dtype == "F8_E4M3"):
        kind = "an nvfp4 table (4-bit elements, one e4m3 scale per 16, one for all)"
    elif any(rest.startswith("weight.") for rest in rests) or (scale is None and weight.dtype == "U8"):
        kind = "an nf4 table (4-bit codes of a Gaussian's levels)"
    else:
        kind = f"a table of packed or integer elements, {weight.dtype}"
    raise checkpoint.error(f"{weight} is {kind}, which is none of our formats, {', '.join(FORMATS)}: {_WAY_OUT}")


def _scales(checkpoint, prefix, members, stems, weights) -> tuple[str, tuple[StoredTensor, ...], float | None]:
    """(name of the format, scales of each of ``weights``, scale of the table)."""
    dtype, width = weights[0].dtype, weights[0].shape[1]
    stem = stems[0]
    found = [rest for rest in dict.fromkeys((*SCALE_NAMES, *(stem + name for name in SCALE_NAMES))) if rest in members]
    if len(found) > 1:
        raise checkpoint.error(f"expected one kind of scale, got {', '.join(prefix + rest for rest in found)}")
    if dtype in DENSE:
        if found:
            raise checkpoint.error(f"{weights[0]} takes no scale, got {prefix}{found[0]}")
        return DENSE[dtype], (), None
    if dtype != "F8_E4M3":
        expected = ", ".join(("F8_E4M3", *DENSE))
        raise checkpoint.error(f"rows must be of dtype {expected}, got {weights[0]}")
    if not found:
        raise checkpoint.error(
            f"{weights[0]} has no scale: expected {prefix}scale, one ue8m0 byte per {SCALE_GROUP} elements (DeepSeek), "
            f"or {prefix}weight_scale, one float for the table (Qwen)"
        )
    rests = found
    if found[0] in SCALE_NAMES:  # one for all parts
        scale = checkpoint.tensor(members[found[0]])
        if scale.dtype in DENSE and math.prod(scale.shape) == 1:
            value = float(checkpoint.read(scale, FORMATS[DENSE[scale.dtype]].dtype))
            try:
                return "e4m3", (), float(checked_scale(value, str(scale)))
            except ValueError as error:
                raise checkpoint.error(str(error)) from None
    else:
        rests = [each + found[0].removeprefix(stem) for each in stems]
        if missing := [rest for rest in rests if rest not in members]:
            raise checkpoint.error(f"{prefix}{missing[0]} is missing, where other parts have one")
    scales = tuple(checkpoint.tensor(members[rest]) for rest in rests)
    for scale, weight in zip(scales, weights, strict=False):
        expected = (weight.shape[0], width // SCALE_GROUP)
        if scale.dtype not in ("F8_E8M0", "U8") or scale.shape != expected or len(scales) != len(weights):
            per_row = scale.shape in ((weight.shape[0],), (weight.shape[0], 1)) and width != SCALE_GROUP
            hint = f"; one scale per row is none of our formats: {_WAY_OUT}" if per_row else ""
            raise checkpoint.error(
                f"scales of {weight} must be F8_E8M0 or U8 {list(expected)}, or one float for the table, "
                f"got {scale}{hint}"
            )
    return "e4m3_ue8m0", scales, None
