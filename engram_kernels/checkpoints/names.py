"""Tables among a checkpoint's tensors, found by name. A table has a prefix, and behind it

    weight, scale                           DeepSeek-V4.1: layers.{i}.engram.embed.weight e4m3 [rows, R],
                                            .scale ue8m0 [rows, R / 32]
    shard_{k}.weight, weight_scale          Qwen: [model.language_model.]layers.{i}.ple.ple_embedding.ngram_embedding.,
                                            the rows in several tensors; one scale for all of them, where they are fp8
    the same with uint8 rows                nvfp4: e2m1 pairs [rows, R / 2], weight_scale or shard_{k}.weight_scale e4m3
                                            [rows, R / 16], weight_scale_2 for the table
    weight, scale                           mxfp4: e2m1 pairs, uint8 [rows, R / 2], ue8m0 or uint8 [rows, R / 32]
    shards.{k}.weight                       Qwen as MLX's converters write it, which is refused by name
    shard_{k}.weight, shard_{k}.scale       what save_safetensors writes into more than one file

Scales may be called weight_scale or weight_scale_inv as well: their shape says what they are. Sources: the published
checkpoints, and the loaders of vLLM (models/deepseek_v41, qwen4_exp) and SGLang.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from engram_kernels.geometry.row_format import RowFormat

from .files import Checkpoint

SCALE_NAMES = ("scale", "weight_scale", "weight_scale_inv")
#: The table's own scale of nvfp4, beside those of groups.
TABLE_SCALE_NAME = "weight_scale_2"
#: Dense formats by what safetensors calls their dtype.
DENSE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
#: What safetensors calls bytes of scales, by RowFormat.group_scale.
FILE_SCALES = {"ue8m0": "F8_E8M0", "e4m3": "F8_E4M3"}
_FILE_DTYPES = {name: dtype for dtype, name in DENSE.items()}


def file_dtype(fmt: RowFormat) -> str:
    """What safetensors calls the dtype of rows; pairs of e2m1 are U8, as checkpoints have them."""
    return _FILE_DTYPES.get(fmt.name, "U8" if fmt.packed > 1 else "F8_E4M3")


#: A name behind the prefix, of one of several tensors that hold the rows.
_SHARD = re.compile(r"(?P<stem>(?:shard_|shards\.)(?P<number>\d{1,9})\.)(?P<rest>.+)")
_KNOWN = re.compile(
    r"(?P<prefix>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:engram\.embed|ple\.ple_embedding\.ngram_embedding)\.)(?P<rest>.+)"
)


def find_tables(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Prefix -> {rest of the name: name} of all tables with a published name; else of the one table there is.

    Names that all belong to one table under any prefix are such a table: a file that save_safetensors wrote.
    """
    names = list(names)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _KNOWN.fullmatch(name):
            found.setdefault(match["prefix"], {})[match["rest"]] = name
    if found:
        return found
    first = next((name for name in names if re.fullmatch(r"(.*\.)?weight", name)), None)
    prefix = first and re.sub(r"((shard_|shards\.)\d+\.)?weight$", "", first)
    if prefix is None or not all(name.startswith(prefix) and _is_member(name[len(prefix) :]) for name in names):
        return {}
    return {prefix: {name[len(prefix) :]: name for name in names}}


class Part(NamedTuple):
    """What a name behind a table's prefix says: ``stem`` names one of several tensors of rows, "" the only one."""

    stem: str
    number: int | None
    rest: str


def part_of(name: str) -> Part:
    match = _SHARD.fullmatch(name)
    return Part(match["stem"], int(match["number"]), match["rest"]) if match else Part("", None, name)


def choose_table(checkpoint: Checkpoint, layer: int | None, prefix: str | None) -> tuple[str, dict[str, str]]:
    """Prefix and {rest of the name: name} of the one table that layer and prefix mean; CheckpointError for none."""
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


def table_under(checkpoint: Checkpoint, prefix: str) -> tuple[str, dict[str, str]]:
    """Prefix and {rest of the name: name} of the table with this prefix, whatever it is."""
    prefix = as_prefix(prefix, checkpoint.where)
    rests = {name[len(prefix) :]: name for name in checkpoint.names if name.startswith(prefix)}
    members = {rest: name for rest, name in rests.items() if _is_member(rest)}
    if not members:
        raise checkpoint.error(f"no tensor {prefix}weight or {prefix}shard_0.weight; {_what_there_is(checkpoint)}")
    return prefix, members


def layer_of(prefix: str) -> int | None:
    """The model layer that a published prefix names."""
    match = _KNOWN.fullmatch(prefix + "weight")
    return int(match["layer"]) if match else None


def module_prefix(checkpoint: Checkpoint, layer: int) -> str:
    """What comes before the names of the layer's projection, norms and convolution."""
    projection = re.compile(rf"((?:.*\.)?layers\.{layer}\.(?:engram|ple)\.)(?:wkv|key_proj)\.(.+)")
    matches = [match for name in checkpoint.names if (match := projection.fullmatch(name))]
    found = [match[1] for match in matches if match[2] == "weight"]
    if len(found) != 1:
        got = f"both {found[0]} and {found[1]} (choose by prefix=)" if found else "neither"
        got += f", only {', '.join(match[0] for match in matches[:4])}" if matches and not found else ""
        raise checkpoint.error(
            f"expected layers.{layer}.engram.wkv.weight (DeepSeek-V4.1) or layers.{layer}.ple.key_proj.weight (Qwen), "
            f"got {got}"
        )
    return found[0]


def as_prefix(prefix: str, where: str) -> str:
    """``prefix`` with the dot at its end that may be left out."""
    if not isinstance(prefix, str):
        raise TypeError(f"{where}: prefix must be a text, got {type(prefix).__name__}")
    check_text(prefix, "prefix", where)
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def check_text(text: str, name: str, where: str) -> None:
    """Raise ValueError where a text cannot be written: half of a surrogate pair is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {name} must be text that UTF-8 can write, got {text!r}"[:300]) from None


def _what_there_is(checkpoint: Checkpoint) -> str:
    tables = list(find_tables(checkpoint.names).values())
    if tables:
        return f"there is {', '.join(map(_first_member, tables[:8]))}"
    names = sorted(checkpoint.names)
    return f"the {len(names)} tensors are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _first_member(members: dict[str, str]) -> str:
    """The name that says best where a table is."""
    return next((name for rest, name in members.items() if rest.endswith("weight")), next(iter(members.values())))


def _is_member(rest: str) -> bool:
    """Whether a name can belong to a table whose prefix was taken off."""
    stem, *more = part_of(rest).rest.split(".")
    if more:
        return stem == "weight"
    return re.fullmatch(r"weight(_\w+)?", stem) is not None or stem in ("input_scale", *SCALE_NAMES)
