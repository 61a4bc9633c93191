"""Models that ``--config`` names: presets, or a checkpoint's config.json; and the bytes of their tables.

Importing this file imports no torch: a mistake in a name is told at once.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import CommandError

if TYPE_CHECKING:
    from engram_kernels.geometry.config import EngramConfig

#: Formats of rows that kernels read, by name (geometry/row_format.py).
FORMATS = ("float32", "bfloat16", "float16", "e4m3_ue8m0", "e4m3", "nvfp4", "mxfp4")
PRESETS = ("deepseek_v41_flash", "engram_27b", "engram_40b", "deepseek_demo", "qwen38_flash_next")


def model_name(text: str) -> str:
    """A ``type`` of argparse: a preset's name, a config.json, or a folder that has one."""
    if text not in PRESETS and not _config_file(text).is_file():
        known = ", ".join(PRESETS)
        raise argparse.ArgumentTypeError(f"expected one of {known}, a config.json or a folder with one, got {text!r}")
    return text


def read_config(model: "str | tuple[str, EngramConfig]", row_format: str | None = None) -> "tuple[str, EngramConfig]":
    """(name, config) of a preset, of a ``config.json``, or of a folder with one; what was read before stays so.

    row_format: another format of rows than the model's own.
    """
    if isinstance(model, tuple):
        return model
    name, config = _read(model)
    if row_format is None:
        return name, config
    try:
        return f"{name} in {row_format}", dataclasses.replace(config, format=row_format)
    except ValueError as error:
        raise CommandError(f"--format {row_format}: {error}") from None


def _read(text: str) -> "tuple[str, EngramConfig]":
    from engram_kernels.geometry.config import EngramConfig

    if text in PRESETS:
        return text, getattr(EngramConfig, text)()
    path = _config_file(text)
    try:
        return str(path), EngramConfig.from_hf(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CommandError(f"--config {path}: {error}") from None
    except OSError as error:
        raise CommandError(f"--config {path}: {error.strerror}") from None


def row_bytes(config: "EngramConfig") -> int:
    """Bytes of a row with its scales."""
    from engram_kernels.geometry.row_format import row_format

    return row_format(config.format, "row_bytes").stored_bytes(config.row_width)


def layer_bytes(config: "EngramConfig") -> list[int]:
    """Bytes of each layer's table, scales included."""
    return [rows * row_bytes(config) for rows in config.rows_per_layer]


def _config_file(text: str) -> Path:
    return Path(text) / "config.json" if Path(text).is_dir() else Path(text)
