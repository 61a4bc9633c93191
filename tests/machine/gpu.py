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
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

import engram_kernels.launching.device
from tests.reports.offline import TARGETS
from tests.support.launches import forget_launches

from . import Fault, Kernel, execute
from .given import GivenMemory
from .parsing.orders import takes_orders

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10}  # that a program may have, by target
MOST_PROGRAMS = 2**31 - 1, 2**16 - 1, 2**16 - 1  # in each dimension of a grid
ORDERS = ("up", "down")  # of warps, beside all in step
COMPARED_BYTES = 64 << 20  # launches that may write to more are run in one order


@dataclass(frozen=True)
class Benign:
    """A report that is no error: which kernel's, of which kind, in which memory, and why."""

    kernel: str
    kind: str
    memory: str
    reason: str

    @property
    def name(self):
        return f"{self.kernel}: {self.kind} in {self.memory.rstrip(':')}"


BENIGN = (
    Benign(
        "probe_cache_kernel",
        "race",
        "stamps_ptr:",
        "hits write one stamp, and programs ask of a stamp whether it is above 0, which the old and the new both are",
    ),
    Benign(
        "conv_residual_kernel",
        "race",
        "hidden_ptr, out_ptr:",
        "in place a thread stores where it has loaded; threads that load a copy of it and store none drop theirs",
    ),
    Benign(
        "gate_backward_kernel",
        "race",
        "product_ptr:",
        "what is added up goes back and nowhere else; threads that load a copy of it and store none drop theirs",
    ),
)


class Report(AssertionError):
    """What the executor found in a launch."""


class Machine:
    """A driver for Triton, as far as launching goes, and the count of what it ran."""

    def __init__(self, target):
        self.target, self.utils = TARGETS[target], self
        self._shared = SHARED_BYTES[target]
        self.memory = GivenMemory()
        self.kernels = {}  # machine code, whether launched as dependent -> Kernel
        self.ordered = set()  # machine code whose next launch, its first, is run in all orders of warps
        self.ran = Counter()  # kernels, launches, programs, runs: a launch in each of its orders
        self.benign = Counter()  # reports that BENIGN lists, by its names

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return dict(max_shared_mem=self._shared)

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, most threads); launches know their PTX from the cache."""
        return name, binary, 0, 0, 1024

    def unload_module(self, module):
        pass

    @staticmethod
    def launcher_cls(source, metadata):
        """What Triton calls to launch a kernel; it keeps this for good, so the machine is the one in force then."""
        path = get_cache_manager(metadata.hash).get_file(f"{source.name}.ptx")
        with open(path) as file:
            text = file.read()
        kinds = [source.signature[name] for name in source.fn.arg_names]
        named = list(zip(source.fn.arg_names, kinds, strict=True))

        def launch(x, y, z, stream, function, packed, about, enter, leave, *arguments):
            if metadata.target != driver.active.get_current_target():
                raise ValueError(f"{metadata.name} was compiled for {metadata.target}")
            given = [(name, value) for (name, kind), value in zip(named, arguments, strict=True) if kind != "constexpr"]
            driver.active.launch(text, given, (x, y, z), metadata.shared, function, metadata.launch_pdl)

        return launch

    def kernel(self, text, dependent=False):
        """The kernel of a machine code, parsed once for launches with ``launch_pdl`` and once for those without."""
        if (text, dependent) not in self.kernels:
            self.kernels[text, dependent] = Kernel(text, dependent)
            self.ran.update(kernels=1)
            if takes_orders(text):
                self.ordered.add(text)
        return self.kernels[text, dependent]

    def launch(self, text, given, grid, shared_bytes, binary, dependent=False):
        """Run a kernel whose arguments are ``given`` as (name, value). ``binary`` is what ptxas made of its text."""
        kernel = self.kernel(text, dependent)
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
        if any(size > most for size, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise Report(f"{kernel.name}: a grid of {grid} programs, at most {MOST_PROGRAMS}")
        self.execute(kernel, values, grid, shared_bytes, given, binary)

    def execute(self, kernel, values, grid, shared_bytes, given, binary):
        """Execute a launch in the orders of warps that could matter, and raise what is reported."""
        allocations, text = self.memory.of_launch(given), kernel.text
        ordered = text in self.ordered and sum(each.size for each in allocations) <= COMPARED_BYTES
        self.ordered.discard(text)
        before = [each.bytes.copy() for each in allocations] if ordered else []
        first = None
        for order in (None, *ORDERS) if ordered else (None,):
            if order:
                for allocation, bytes_ in zip(allocations, before, strict=True):
                    allocation.bytes[:] = bytes_
                allocations = self.memory.of_launch(given)
            where = f"{kernel.name}, warps {order}" if order else kernel.name
            self.execute_once(where, kernel, values, grid, shared_bytes, allocations, schedule=order)
            if not ordered:
                return
            after = [each.bytes.copy() for each in allocations]
            first = first or after
            for allocation, one, other in zip(allocations, first, after, strict=True):
                if not np.array_equal(one, other):
                    raise Report(f"{where}: {allocation.name} has other bits than with all warps in step")

    def execute_once(self, where, kernel, values, grid, shared_bytes, allocations, **options):
        """Execute a launch, and raise what is reported but BENIGN; options as for :func:`execute`."""
        try:
            run = execute(kernel, values, grid, shared_bytes, allocations, **options)
        except Fault as fault:
            raise Report(f"{where}: {fault}") from fault
        self.ran.update(runs=1)
        found = [report for report in run.reports if not self.is_benign(kernel.name, report)]
        if found:
            raise Report(f"{where}: " + "; ".join(f"{r.kind}: {r.text} {r.location}" for r in found[:4]))

    def is_benign(self, kernel, report):
        """Whether BENIGN lists a report, which is counted then."""
        for known in BENIGN:
            if (known.kernel, known.kind) == (kernel, report.kind) and report.text.startswith(known.memory):
                self.benign[known.name] += 1
                return True
        return False


@contextlib.contextmanager
def standing_in(target, kind=Machine):
    """Within the context kernels take CPU tensors, and run as machine code for ``target``; yields the machine."""
    machine, before = kind(target), driver._active
    taking = engram_kernels.launching.device.CPU_TAKES_KERNELS
    driver.set_active(machine)
    forget_launches()
    engram_kernels.launching.device.CPU_TAKES_KERNELS = True
    try:
        with machine.memory.watching():
            yield machine
    finally:
        engram_kernels.launching.device.CPU_TAKES_KERNELS = taking
        driver._active = before
        forget_launches()
