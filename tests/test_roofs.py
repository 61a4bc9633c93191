"""Roofs, timing and machine of the benchmarks: the roofs' kernels in the interpreter, compiled, and on a GPU."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import environment, roofs, timing
from bench.cases import load_cases

from .offline import TARGETS, compiling_for, machine_code

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_measurements():
    measured = timing.Measurement.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (measured.median, measured.low, measured.high, measured.samples) == (3.0, 1.0, 5.0, 5)
    assert timing.Measurement.of(range(101)).as_dict() == dict(median=50, low=10, high=90, samples=101)
    assert timing.CpuTimer(samples=4).measure([lambda: None]).samples == 4


def test_kernels_are_watched(monkeypatch):
    compiled = types.SimpleNamespace(n_regs=40, n_spills=0)
    monkeypatch.setattr(timing.JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: compiled)
    before = timing.JITFunction.run
    with contextlib.suppress(ZeroDivisionError), timing.watching_kernels() as launched:
        roofs.launch_copy(0, 0, 16, roofs.CopyShape(8, 16, 2048))
        torch.tensor(1 // 0)
    assert launched == [dict(kernel="linear_copy_kernel", registers=40, spills=0, programs=8)]
    assert timing.JITFunction.run is before


def test_links_are_one_cycle_over_all_lines():
    words, order = roofs.links(128 * 50, torch.Generator().manual_seed(1))
    entry, seen = int(order[0]), []
    for _ in range(50):
        seen.append(entry)
        entry = int(words[entry])
    assert entry == seen[0] and seen == order.tolist() and sorted(seen) == [16 * line for line in range(50)]


def test_environment(monkeypatch):
    software = environment.describe_software()
    assert software["torch"] == torch.__version__ and software["host_bytes_available"] > 0
    assert environment.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
    memory = torch.zeros(1 << 22, dtype=torch.uint8)
    assert 0 <= environment.huge_share(memory.data_ptr()) <= 1 and environment.huge_share(0) is None
    answers = {"--query-gpu=a,b": "1, 2\n", "--query-gpu=a": "1\n"}
    monkeypatch.setattr(environment, "_output", lambda line: answers.get(line[1]))
    assert environment.smi(CPU, ("a", "b")) == dict(a="1", b="2")
    assert environment.smi(CPU, ("a", "c")) == dict(a="1", c=None)


ROOFS_SCRIPT = """
import torch
from bench import roofs, timing

class Timer:
    def measure(self, calls):
        calls[0]()
        return timing.Measurement.of([1e-3])

host = torch.arange(4096, dtype=torch.int32)
for shape in (roofs.CopyShape(3, 4, 2048), roofs.CopyShape(2, 16, 8192)):
    target = torch.full((4096 + 64,), -1, dtype=torch.int32)
    roofs.launch_copy(host.data_ptr(), target.data_ptr(), 4092, shape)
    assert torch.equal(target[:4092], host[:4092]) and bool((target[4092:] == -1).all())
words, order = roofs.links(128 * 50, torch.Generator().manual_seed(1))
out = torch.zeros(1, dtype=torch.int64)
for steps in (0, 1, 7, 51):
    roofs.launch_chase(words.data_ptr(), int(order[2]), steps, out)
    assert int(out) == int(order[(2 + steps) % 50])
roofs.PROGRAMS = (1, 32)
found = roofs.measure_roofs(Timer(), torch.device("cpu"), host.view(torch.uint8), words=2048, device_words=4096)
assert len(found["sweep"]) == 3 + 9 and found["copy_engine"] == 8192 / 1e-3 and found["zero_copy"] == 8192 / 1e-3
assert found["empty"] == 1e-3 and found["device_copy"] == 2 * 4 * 4096 / 1e-3
"""


def test_roofs_in_the_interpreter():
    """In a process of its own: the interpreter has to be on before Triton is imported."""
    variables = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", ROOFS_SCRIPT], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.compile
@pytest.mark.parametrize("target", TARGETS)
def test_roofs_compile_to_the_loads_they_name(target):
    out, address = torch.empty(1, dtype=torch.int64), 0x7F00_0000_0000
    shapes = [roofs.CopyShape(132, width, tile) for width in roofs.WIDTHS for tile in roofs.TILES]
    with compiling_for(target) as compiled:
        for shape in shapes:
            roofs.launch_copy(address, address + 4096, 4096, shape)
        roofs.launch_chase(address, 0, 256, out)
        roofs.launch_empty(out)
    codes = [machine_code(entry) for entry in compiled]
    assert all(code.spills == 0 for code in codes)
    for code, shape in zip(codes, shapes, strict=False):
        threads = 4 * (64 if target == "gfx942" else 32)
        width = min(shape.width, shape.tile // threads)  # AMD's wider waves have 8 bytes each of the smallest tile
        assert set(code.loads) == set(code.stores) == {str(width)}, shape
    # AMD's compiler sees that the chase is one thread's, and reads by scalar loads, which are not counted here.
    assert set(codes[-2].loads) == (set() if target == "gfx942" else {"8"}) and not codes[-1].loads


@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(tmp_path):
    device = torch.device("cuda", 0)
    machine = {**environment.describe_gpu(device), **environment.describe_software()}
    machine |= dict(host_table_bytes=256 << 20, device_table_bytes=64 << 20)
    chosen = command.parse(["--only", "*T=8", "--out", str(tmp_path)])
    timer = timing.GpuTimer(device, samples=5)
    assert command.measure(chosen, timing.Budget(200.0), device, machine, timer) == 0
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["finished"] and len(content["cases"]) == sum(case.tokens == 8 for case in load_cases())
    for record in content["cases"]:
        assert record["status"] == "ok" and record["kernels"] and record["graph"] and record["host"] > 0, record
        assert all(kernel["registers"] > 0 for kernel in record["kernels"])
    assert 0 < content["roofs"]["empty"] < 1e-4 and 0 < content["roofs"]["round_trip"] < 1e-5
