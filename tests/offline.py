"""Compile kernels without a GPU: real launchers, real arguments, a driver that only says which GPU it would be."""

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _StubDriver:
    """What Triton asks of a driver before it launches; launching is never reached."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling_for(name):
    """Within the context every launch compiles for the target called ``name``; yields the list of compiled kernels."""
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # it is keyed by device number, and every target is device 0 here
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    previous = driver._active
    driver.set_active(_StubDriver(TARGETS[name]))
    JITFunction.run = warm_up
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


@dataclass
class MachineCode:
    """Facts of one compiled kernel."""

    name: str
    registers: int
    spill_bytes: int
    instructions: int
    loads: dict[int, int]  # width in bytes -> global loads of it
    stores: dict[int, int]
    text: str


def machine_code(kernel):
    """Disassemble a compiled kernel, of either vendor."""
    return _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)


def _nvidia(kernel):
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run(folder / "cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _run(folder / "nvdisasm", "-c", cubin.name)
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    lines = [line for line in lines if not line.startswith("NOP")]
    width = lambda op: int(match[1]) // 8 if (match := re.search(r"\.(128|64)\b", op)) else _narrow(op)  # noqa: E731
    return MachineCode(
        kernel.metadata.name,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]) + sum(line.startswith(("LDL", "STL")) for line in lines),
        len(lines),
        dict(Counter(width(line) for line in lines if line.startswith("LDG"))),
        dict(Counter(width(line) for line in lines if line.startswith("STG"))),
        sass,
    )


def _narrow(op):
    return 1 if re.search(r"\.[US]8\b", op) else 2 if re.search(r"\.[US]16\b", op) else 4


def _amd(kernel):
    text = kernel.asm["amdgcn"]
    body = [line.split()[0] for line in text.splitlines() if re.match(r"\s+[vsdbg]\w*_\w+", line)]
    width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}

    def count(kind):
        ops = [op for op in body if op.startswith((f"global_{kind}", f"buffer_{kind}", f"flat_{kind}"))]
        return dict(Counter(next((w for n, w in width.items() if n in op), 0) for op in ops))

    return MachineCode(
        kernel.metadata.name,
        int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        + int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        len(body),
        count("load"),
        count("store"),
        text,
    )


def _run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
