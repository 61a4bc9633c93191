"""Triton's launches: the real launcher starts a kernel, which does nothing, and the same is work for the executor."""

import torch
from triton.compiler.compiler import CompiledKernel

from tests.machine import Allocation
from tests.machine.gpu import Machine

from . import library, timeline

_run = CompiledKernel.run


class StreamedMachine(Machine):
    """Executes what is launched when its stream comes to it."""

    def execute(self, kernel, values, grid, shared_bytes, given, binary):
        allocations = in_use()  # at the launch: memory may be freed, by the stream's order, before the kernel runs
        timeline.submit(
            lambda: self.execute_once(kernel.name, kernel, values, grid, shared_bytes, allocations, races=False)
        )


MACHINE = StreamedMachine("sm_90")


def in_use():
    """What a kernel may touch now: blocks in use, as large as they were asked for, pinned and registered memory."""
    found = []
    for segment in torch.cuda.memory_snapshot():
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                size = block["requested_size"] or block["size"]
                found.append(Allocation(block["address"], size, f"a block of {size} bytes"))
    return found + [Allocation(*each, f"host memory of {each[1]} bytes") for each in library.host_ranges()]


class Launcher:
    """In the place of a compiled kernel's own."""

    def __init__(self, kernel, real):
        self._kernel, self._real = kernel, real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __call__(self, x, y, z, stream, function, packed, about, enter, leave, *arguments):
        self._real(x, y, z, stream, function, packed, about, enter, leave, *arguments)
        kernel, signature = self._kernel, self._kernel.src.signature
        kept = [name for name, kind in signature.items() if kind != "constexpr"]
        if len(arguments) != len(kept):  # Inductor leaves constants out
            arguments = [
                value for value, kind in zip(arguments, signature.values(), strict=True) if kind != "constexpr"
            ]
        given = list(zip(kept, arguments, strict=True))
        MACHINE.launch(kernel.asm["ptx"], given, (x, y, z), kernel.metadata.shared, function)


def install():
    def run(kernel):
        launcher = vars(kernel).get("simulated_launcher")
        if launcher is None:
            launcher = kernel.simulated_launcher = Launcher(kernel, _run.fget(kernel))
        return launcher

    CompiledKernel.run = property(run)
