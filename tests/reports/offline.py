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
#: Those on which launches depend on the one before (launching/dependent.py).
DEPENDENT = ("sm_90", "sm_100")


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
    """Within the context every launch compiles for the target called ``name``.

    Yields a list that fills with (compiled kernel, rows or tokens per step, warps), for :func:`machine_code`.
    """
    compiled, functions = [], set()
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        functions.add(self)
        self.device_caches.clear()  # it is keyed by device number, and every target is device 0 here
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        # Rows or tokens that one step of one program handles.
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        unit = given.get("BLOCK_ROWS") or given.get("BLOCK_T") or 1
        compiled.append((kernel, unit, kwargs["num_warps"]))
        return kernel

    previous = driver._active
    driver.set_active(_StubDriver(TARGETS[name]))
    JITFunction.run = warm_up
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous
        for function in functions:
            function.device_caches.clear()


@dataclass(frozen=True)
class MachineCode:
    """Facts of one compiled kernel. Counts are static: a loop's body counts once."""

    kernel: str
    registers: int
    shared_bytes: int
    spills: int  # bytes of stack, and instructions that touch it
    instructions: int
    per_unit: float  # warp instructions for each row or token of a step
    loads: dict[str, int]  # width in bytes -> loads of it from global memory
    stores: dict[str, int]
    divisions: int  # calls of 64-bit division routines
    float64: int  # float64 arithmetic instructions


def machine_code(compiled):
    """Disassemble what :func:`compiling_for` yields, of either vendor."""
    kernel, unit, num_warps = compiled
    facts = _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)
    return MachineCode(
        kernel=kernel.metadata.name,
        shared_bytes=kernel.metadata.shared,
        per_unit=round(facts["instructions"] * num_warps / unit, 1),
        **facts,
    )


def _nvidia(kernel):
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run(folder / "cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _run(folder / "nvdisasm", "-c", cubin.name)
    ops = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    ops = [op for op in ops if op != "NOP"]
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=int(re.search(r"STACK:(\d+)", usage)[1]) + sum(op.startswith(("LDL", "STL")) for op in ops),
        instructions=len(ops),
        loads=_widths(op for op in ops if op.startswith("LDG")),
        stores=_widths(op for op in ops if op.startswith("STG")),
        divisions=len(set(re.findall(r"__cuda_sm\d+_(?:div|rem)_\w+", sass))),
        float64=sum(op.split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") for op in ops),
    )


def _widths(ops):
    def width(op):
        match = re.search(r"\.(128|64|U8|S8|U16|S16)\b", op)
        return {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[match[1]] if match else 4

    return {str(size): count for size, count in sorted(Counter(width(op) for op in ops).items())}


def _amd(kernel):
    text = kernel.asm["amdgcn"]
    ops = [line.split()[0] for line in text.splitlines() if re.match(r"\s+[vsdbgf]\w*_\w+", line)]
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}

    def widths(kind):
        found = [op for op in ops if op.startswith((f"global_{kind}", f"buffer_{kind}", f"flat_{kind}"))]
        counts = Counter(next(size for name, size in sizes.items() if name in op) for op in found)
        return {str(size): count for size, count in sorted(counts.items())}

    return dict(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        spills=int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        + int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        instructions=len(ops),
        loads=widths("load"),
        stores=widths("store"),
        divisions=0,  # inlined on this target; the instruction count shows them
        float64=sum(bool(re.match(r"v_(add|mul|fma|rcp|div\w*|cvt\w*)_f64", op)) for op in ops),
    )


def _run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
