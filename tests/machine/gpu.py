"""A stand-in for a GPU: Triton compiles a launch for a target, and the machine code (PTX) runs on CPU tensors.

Triton loads and launches through its active driver. The one here keeps the text that Triton compiled (and so what its
cache on disk holds, which the compile lane shares), and executes it where a driver would start it. What a launch may
touch is what it is given, see memory.py; what the executor reports is an error, unless BENIGN lists it.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

import engram_kernels.arguments

from . import Fault, Kernel, execute
from .given import GivenMemory
from .orders import takes_orders

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10}  # that a program may have
ORDERS = ("up", "down")  # of warps, beside all in step
COMPARED_BYTES = 64 << 20  # launches that may write to more are run in one order


@dataclass(frozen=True)
class Benign:
    """A report that is no error: which kernel's, of which kind, in which memory, and why."""

    kernel: str
    kind: str
    memory: str
    reason: str


BENIGN = (
    Benign(
        "repeat_rows_kernel",
        "race",
        "clock_ptr:",
        "every warp loads the clock that thread 0 moves on, and only that thread uses what it loaded",
    ),
    Benign(
        "probe_cache_kernel",
        "race",
        "stamps_ptr:",
        "hits write one stamp, and programs ask of a stamp whether it is above 0, which the old and the new both are",
    ),
)


class Report(AssertionError):
    """What the executor found in a launch."""


class Machine:
    """A driver for Triton, as far as launching goes, and the count of what it ran."""

    def __init__(self, target):
        self.target, self.utils, self.launcher_cls = TARGETS[target], self, self._loaded
        self._shared = SHARED_BYTES[target]
        self.memory = GivenMemory()
        self.kernels = {}  # machine code -> Kernel
        self.ordered = set()  # kernels whose next launch is run in all orders of warps
        self.ran = Counter()  # kernels, launches, programs, orders, instructions

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return dict(max_shared_mem=self._shared)

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, most threads); launches know their code from :meth:`_loaded`."""
        return name, name, 0, 0, 1024

    def unload_module(self, module):
        pass

    def _loaded(self, source, metadata):
        path = get_cache_manager(metadata.hash).get_file(f"{source.name}.ptx")
        with open(path) as file:
            text = file.read()
        if text not in self.kernels:
            self.kernels[text] = Kernel(text)
            if takes_orders(text):
                self.ordered.add(self.kernels[text])
        kernel = self.kernels[text]
        kinds = [source.signature[name] for name in source.fn.arg_names]
        named = [(name, kind) for name, kind in zip(source.fn.arg_names, kinds, strict=True)]

        def launch(x, y, z, stream, function, packed, about, enter, leave, *arguments):
            given = [(name, value) for (name, kind), value in zip(named, arguments, strict=True) if kind != "constexpr"]
            self.launch(kernel, given, (x, y, z), metadata.shared)

        return launch

    def launch(self, kernel, given, grid, shared_bytes):
        """Run a kernel whose arguments are ``given`` as (name, value)."""
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for _, value in given]
        values += [0] * (len(kernel.parameters) - len(values))  # of memory that Triton keeps for other kernels
        values = [
            float(value) if kind.lstrip(".") in ("f32", "f64") else int(value)
            for (kind, _), value in zip(kernel.parameters, values, strict=True)
        ]
        programs = grid[0] * grid[1] * grid[2]
        self.ran.update(launches=1, programs=programs)
        if not programs:
            return
        allocations = self.memory.of_launch(given)
        self.execute(kernel, values, grid, shared_bytes, given, allocations)

    def execute(self, kernel, values, grid, shared_bytes, given, allocations):
        """Execute a launch, in the orders of warps that could matter, and raise what is reported."""
        ordered = kernel in self.ordered and sum(each.size for each in allocations) <= COMPARED_BYTES
        self.ordered.discard(kernel)
        before = [each.bytes.copy() for each in allocations] if ordered else []
        first = None
        for order in (None, *ORDERS) if ordered else (None,):
            if order:
                for allocation, bytes_ in zip(allocations, before, strict=True):
                    allocation.bytes[:] = bytes_
                allocations = self.memory.of_launch(given)
            where = f"{kernel.name}" + (f", warps {order}" if order else "")
            try:
                run = execute(kernel, values, grid, shared_bytes, allocations, schedule=order)
            except Fault as fault:
                raise Report(f"{where}: {fault}") from fault
            self.ran.update(orders=1, instructions=run.executed)
            found = [report for report in run.reports if not is_benign(kernel.name, report)]
            if found:
                raise Report(f"{where}: " + "; ".join(f"{r.kind}: {r.text} {r.location}" for r in found[:4]))
            if not ordered:
                return
            after = [each.bytes.copy() for each in allocations]
            first = first or after
            for allocation, one, other in zip(allocations, first, after, strict=True):
                if not np.array_equal(one, other):
                    raise Report(f"{where}: {allocation.name} has other bits than with all warps in step")


def is_benign(kernel, report):
    return any(
        known.kernel == kernel and known.kind == report.kind and report.text.startswith(known.memory)
        for known in BENIGN
    )


@contextlib.contextmanager
def standing_in(target, kind=Machine):
    """Within the context kernels take CPU tensors, and run as machine code for ``target``; yields the machine."""
    machine, before = kind(target), driver._active
    taking = engram_kernels.arguments.CPU_TAKES_KERNELS
    driver.set_active(machine)
    engram_kernels.arguments.CPU_TAKES_KERNELS = True
    try:
        with machine.memory.watching():
            yield machine
    finally:
        engram_kernels.arguments.CPU_TAKES_KERNELS = taking
        driver._active = before
