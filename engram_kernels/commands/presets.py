"""Published models by the names of their presets, and the bytes of their tables."""

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.row_format import row_format

from .arguments import CommandError

PRESETS = ("deepseek_v41_flash", "engram_27b", "engram_40b", "deepseek_demo", "qwen38_flash_next")


def preset(name: str) -> EngramConfig:
    """The config that ``--config`` names."""
    if name not in PRESETS:
        raise CommandError(f"--config must be one of {', '.join(PRESETS)}, got {name!r}")
    return getattr(EngramConfig, name)()


def row_bytes(config: EngramConfig) -> int:
    """Bytes of a row with its scales."""
    return row_format(config.format, "row_bytes").stored_bytes(config.row_width)


def layer_bytes(config: EngramConfig) -> list[int]:
    """Bytes of each layer's table, scales included."""
    return [rows * row_bytes(config) for rows in config.rows_per_layer]
