"""What a launch knows of the tables that it reads: their descriptors on the device, and constants."""

import mmap
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .memory.access import host_access
from .placed import PlacedRows
from .placement import REGISTERED


class TableView(NamedTuple):
    """A tensor and constants, so that registered ops can take it apart."""

    descriptors: torch.Tensor  #: int64 ``[L, 4]`` on the device, a TableDescriptor in each row
    format: str
    width: int
    placement: str
    link_bytes: int = 0  #: of the largest table that is read over PCIe or NVLink; 0 for none
    page_bytes: int = 0  #: of its pages
    link: str = "pcie"  #: over which it is read (tables/memory/access.py)

    @property
    def memory(self) -> str:
        """Where rows come from, as launches see it: "device", "coherent" (host memory over NVLink-C2C), or "host"."""
        if self.placement == "device" or (self.link_bytes and self.link == "unified"):
            return "device"
        return "coherent" if self.link_bytes and self.link == "coherent" else "host"

    @property
    def form(self) -> tuple:
        """What launches go by: which descriptors they are, and all that is no tensor."""
        return self.descriptors.data_ptr(), self.descriptors.shape, *self[1:]


def read_in_place(table: PlacedRows, device: torch.device) -> bool:
    """Whether kernels read a table of placement "staged" where its rows are, by the host's page tables."""
    if device.type != "cuda" or not table.loadable or table.direct is not None:
        return False
    return host_access(device.index or 0).pageable


def over_link(table: PlacedRows, device: torch.device) -> tuple[int, int, str]:
    """(bytes of all rows and scales, of their pages, link) where a GPU reads them on the host; else (0, 0, "pcie")."""
    if table.placement in REGISTERED:
        return table.nbytes, table.page_bytes, table.link
    if read_in_place(table, device):
        return table.nbytes, mmap.PAGESIZE, host_access(device.index or 0).link
    return 0, 0, "pcie"


def view_tables(tables: Sequence[PlacedRows], device: torch.device) -> TableView:
    """The view of tables of one format and width, for launches on ``device``.

    It is kept, by value, on the first table: only the first call with these tables copies to the device. To a compiled
    graph the descriptors are an input then, so that it can be captured; where the first call of all is a compiled one,
    its graph makes them, and the second is compiled anew.
    """
    first = tables[0]
    key = (device, *[table.descriptor_key for table in tables])
    if key not in first.kept_views:
        # operator.index makes constants of what torch.compile takes for symbols.
        numbers = [[operator.index(number) for number in table.descriptor] for table in tables]
        descriptors = torch.tensor(numbers, dtype=torch.int64).to(device)
        layout = first.format.name, first.width, first.placement
        largest = 0, 0, "pcie"
        for table in tables:  # max() is more than Dynamo follows
            found = over_link(table, device)
            largest = found if found[0] > largest[0] else largest
        first.kept_views[key] = TableView(descriptors, *layout, *largest)
    return first.kept_views[key]
