"""Where the demo's tables go, and what is in them.

On a CPU they are address space: only pages with a written row exist. On a GPU they go to the device where they fit,
else to the host, else one goes to each; only where that fails too are they made smaller.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from engram_kernels.commands.console import gib
from engram_kernels.commands.presets import layer_bytes
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.memory.report import available_host_memory

from .checks import stored_row

#: What tables leave free of a GPU's and of the host's memory, for tensors of the demo and for others.
_KEPT_FREE = 8 << 30
_SCALED_SHARE = 0.6


@dataclass(frozen=True)
class TablePlan:
    """Geometry and placement of each layer's table, in words too."""

    config: EngramConfig
    placements: tuple[str, ...]
    summary: str


def choose_placements(needs: list[int], device_free: int, host_free: int) -> tuple[str, ...] | None:
    """A placement for each of these tables; None where they do not fit."""
    if sum(needs) <= device_free:
        return ("device",) * len(needs)
    if sum(needs) <= host_free:
        return ("host",) * len(needs)
    if needs[0] <= device_free and sum(needs[1:]) <= host_free:
        return ("device", *("host",) * (len(needs) - 1))
    return None


def plan_tables(config: EngramConfig, device: torch.device) -> TablePlan:
    """Full geometry where it fits, a smaller one where not, which the summary then says."""
    needs = layer_bytes(config)
    if device.type == "cpu":
        return TablePlan(config, ("host",) * len(needs), f"full size: {_describe(config)}; address space only")
    device_free = max(0, torch.cuda.mem_get_info(device)[0] - _KEPT_FREE)
    host_free = max(0, available_host_memory() - _KEPT_FREE)
    placements = choose_placements(needs, device_free, host_free)
    if placements is not None:
        return TablePlan(config, placements, f"full size: {_describe(config)}; {_where(placements)}")
    placement = "device" if device_free >= host_free else "host"
    share = _SCALED_SHARE * max(device_free, host_free) / sum(needs)
    smaller = dataclasses.replace(config, table_sizes=[max(2, int(size * share)) for size in config.table_sizes])
    placements = (placement,) * len(needs)
    reason = f"neither GPU ({gib(device_free)} usable) nor host ({gib(host_free)}) holds {gib(sum(needs))}"
    summary = f"SCALED DOWN to {share:.1%}, as {reason}: {_describe(smaller)}; {_where(placements)}"
    return TablePlan(smaller, placements, summary)


def make_tables(plan: TablePlan) -> list[EngramTable]:
    """Tables that read as zero everywhere."""
    config, tables = plan.config, []
    for rows, placement in zip(config.rows_per_layer, plan.placements, strict=True):
        tables.append(EngramTable.empty(rows, config.row_width, config.format, placement=placement))
        if placement == "device":  # other placements are fresh pages, which are zero
            tables[-1].weight.view(torch.uint8).zero_()
            tables[-1].scale.zero_()
    return tables


def write_rows(table: EngramTable, layer: int, ids: np.ndarray) -> int:
    """Give rows ``ids [n]`` the content that is due there; returns the bytes of the distinct ones."""
    ids = np.unique(ids)
    weight, scale = stored_row(layer, ids)
    at = torch.from_numpy(ids).to(table.weight.device)
    table.weight.view(torch.uint8)[at] = torch.from_numpy(weight).to(at.device)
    table.scale[at] = torch.from_numpy(scale).to(at.device)
    return weight.nbytes + scale.nbytes


def _describe(config: EngramConfig) -> str:
    rows = " and ".join(f"{rows:,}" for rows in config.rows_per_layer)
    return f"{len(config.layers)} layers of {rows} rows, {gib(layer_bytes(config)[0])} each"


def _where(placements: tuple[str, ...]) -> str:
    names = {"device": "on the GPU", "host": "in host memory"}
    if len(set(placements)) == 1:
        return f"{names[placements[0]]}"
    return "one on the GPU, the other in host memory"
