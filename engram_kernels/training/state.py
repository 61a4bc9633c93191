"""What an optimizer keeps per row of a table, zero at the start, in the memory of a placement."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.memory.host import HostMapping, RuntimeDriver

PLACEMENTS = ("device", "host", "cpu")


class StateArray(NamedTuple):
    """One array of a state, as it is called in files; float32 is float64 for a table of such rows."""

    name: str
    dtype: torch.dtype
    shape: Callable[[int, int], tuple[int, ...]]  #: of (rows, R)
    #: None is beside the rows, in the placement of the state; "steps" the device of the steps; or "cpu".
    place: str | None = None


def per_row(rows: int, width: int) -> tuple[int, ...]:
    """A number a row."""
    return (rows,)


def per_element(rows: int, width: int) -> tuple[int, ...]:
    """A number an element."""
    return (rows, width)


class RowState:
    """Arrays beside a table. placement: None is the table's, "host" for a shared table."""

    def __init__(self, table: EngramTable, arrays: Sequence[StateArray], placement: str | None, where: str):
        if placement is None:
            # A shared table has one writer, whose state no other process needs.
            placement = "host" if table.placement == "shared" else table.placement
        if placement not in PLACEMENTS:
            raise ValueError(f"{where}: state_placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        if placement == "device" and not torch.cuda.is_available():
            raise ValueError(f"{where}: state_placement 'device' needs a GPU, and torch finds none")
        self.placement, self._mappings, self.tensors = placement, [], {}
        self._addresses: dict[str, int] = {}  # the kernels' way to them
        try:
            for name, dtype, shape_of, place in arrays:
                shape = shape_of(table.rows, table.width)
                dtype = table.anchor.dtype if dtype == torch.float32 else dtype
                if place is None:
                    self.tensors[name] = self._zeros(shape, dtype, table.anchor.device)
                else:
                    device = "cpu" if place == "cpu" else table.anchor.device
                    self.tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
                self._addresses[name] = self.tensors[name].data_ptr()
        except BaseException:
            self.close()
            raise

    def check_readable_on(self, device: torch.device, where: str) -> None:
        """Raise ValueError unless a step on ``device`` can read and write this state."""
        if not self.tensors:
            raise ValueError(f"{where}: the optimizer is closed")
        for name, tensor in self.tensors.items():
            if tensor.data_ptr() != self._addresses[name]:
                raise ValueError(f"{where}: the memory of {name} was moved or freed, as by set_, .data or resize_")
        mapped = self.placement == "host" and all(mapping.registered for mapping in self._mappings)
        if next(iter(self.tensors.values())).device != device and not mapped:
            raise ValueError(f"{where}: a step on {device} needs its state there or in registered host memory")

    def close(self) -> None:
        """Release the memory."""
        self.tensors = {}
        for mapping in self._mappings:
            mapping.close()
        self._mappings = []

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self.placement != "host":
            return torch.zeros(shape, dtype=dtype, device=device if self.placement == "device" else "cpu")
        driver = RuntimeDriver() if torch.cuda.is_available() else None
        self._mappings.append(HostMapping(torch.Size(shape).numel() * dtype.itemsize, driver))
        return self._mappings[-1].bytes.view(dtype).view(shape)
