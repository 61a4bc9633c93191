"""Roofs, timing and machine of the benchmarks: the roofs' kernels in the interpreter, compiled, and on a GPU."""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench.running import environment, footprints, roofs, timing
from bench.running.cases import load_cases
from tests.reports.offline import TARGETS, compiling_for, machine_code
from tests.support.patience import HANG

from .toys import CPU, FakeTimer

ROOT = Path(__file__).parents[2]


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
        roofs.launch_copy(0, 0, 4096, roofs.CopyShape(8, 16, 2048))
        torch.tensor(1 // 0)
    assert launched == [dict(kernel="linear_copy_kernel", registers=40, spills=0, programs=8)]
    assert timing.JITFunction.run is before


def test_footprints_reach_from_64_mib_to_all_of_it():
    gib = 1 << 30
    assert footprints.sizes(16 * gib, False) == [gib // 16, gib, 4 * gib, 16 * gib]
    assert footprints.sizes(5 * gib + 100, True) == [gib // 16, gib, 2 * gib, 4 * gib, 5 * gib]
    assert footprints.sizes(1 << 20, False) == [1 << 20]


class Driver:
    """Registers in chunks until ``limit`` bytes, and keeps what is registered."""

    def __init__(self, limit=1 << 60):
        self.limit, self.registered = limit, {}

    def register(self, address, nbytes):
        if sum(self.registered.values()) + nbytes > self.limit:
            return "error 2: out of memory"
        self.registered[address] = nbytes
        return None

    def unregister(self, address):
        del self.registered[address]


def test_small_pages_are_small_and_given_back(monkeypatch):
    monkeypatch.setattr(footprints, "_CHUNK", 4 << 20)
    driver = Driver()
    mapping = footprints.SmallPages(10 << 20, driver)
    mapping.bytes.fill_(1)
    assert environment.huge_share(mapping.bytes.data_ptr()) == 0 and list(driver.registered.values())[-1] == 2 << 20
    assert sum(driver.registered.values()) == 10 << 20 and len(driver.registered) == 3
    mapping.close()
    assert not driver.registered
    refused = Driver(6 << 20)
    with pytest.raises(RuntimeError, match="10,485,760 bytes of small pages: error 2"):
        footprints.SmallPages(10 << 20, refused)
    assert not refused.registered


def test_footprints_without_time_or_memory_are_left_out(monkeypatch):
    said = []
    monkeypatch.setattr(footprints, "measure_footprints", lambda timer, memory, pages, *rest: [(pages, len(memory))])
    table, roofs_found = torch.zeros(1 << 20, dtype=torch.uint8), dict(sweep=[])
    options = dict(copy_bytes=1 << 16, say=said.append)
    found = footprints.table_footprints(None, CPU, table, roofs_found, timing.Budget(1e-4, lambda: 0.0), **options)
    assert found == [("huge", 1 << 20)] and said == ["footprints of small pages are left out for time"]
    found = footprints.table_footprints(None, CPU, table, roofs_found, timing.Budget(99, lambda: 0.0), **options)
    assert found == [("huge", 1 << 20), ("small", 1 << 20)]

    def refuse(nbytes, driver):
        raise RuntimeError("refused,\nagain")

    monkeypatch.setattr(footprints, "SmallPages", refuse)
    assert (
        len(footprints.table_footprints(None, CPU, table, roofs_found, timing.Budget(99, lambda: 0.0), **options)) == 1
    )
    assert said[-1] == "footprints of small pages are left out: refused, again"


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


def test_the_commit_of_a_copy(tmp_path, monkeypatch):
    """A file says it where .git did not travel; a repository around the copy is not asked; what is there goes first."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "around"], check=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.setattr(environment, "ROOT", copy)
    assert environment.commit() == "unknown"
    (copy / "COMMIT").write_text("0123456789ab+changes\n")
    assert environment.commit() == "0123456789ab+changes"
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", environment.commit())


def test_clocks_are_read_while_a_kernel_runs(monkeypatch):
    """After the roofs the GPU rests, and its clocks say nothing of the kernels that were measured."""
    loaded = threading.Event()
    monkeypatch.setattr(environment, "smi", lambda device, fields: dict(fields=fields) if loaded.wait(HANG) else None)
    (fields,) = environment.clocks_under(loaded.set, CPU).values()
    assert {"clocks.sm", "clocks_throttle_reasons.active"} < set(fields)


def test_the_copy_within_a_device_is_of_random_bytes(monkeypatch):
    seen = []

    def launch(source, target, nbytes, shape):
        seen.append(len(set(ctypes.string_at(source, nbytes))))

    monkeypatch.setattr(roofs, "launch_copy", launch)
    roofs._device_copy(FakeTimer(), CPU, 1 << 16)
    assert len(seen) == 6 and set(seen) == {256}


ROOFS_SCRIPT = """
import torch
from bench.running import footprints, roofs, timing

class Timer:
    def measure(self, calls):
        calls[0]()
        return timing.Measurement.of([1e-3])

host = torch.randint(-(2**31), 2**31, (16384,), dtype=torch.int64).to(torch.int32)
for shape, nbytes in ((roofs.CopyShape(3, 4, 2048), 5 * 2048), (roofs.CopyShape(2, 16, 8192), 6 * 8192)):
    target = torch.full((16384 + 64,), -1, dtype=torch.int32)
    roofs.launch_copy(host.data_ptr(), target.data_ptr(), nbytes, shape)
    assert torch.equal(target[: nbytes // 4], host[: nbytes // 4]) and bool((target[nbytes // 4 :] == -1).all())
    ring = torch.full((shape.tile,), -1, dtype=torch.int32)
    alone = roofs.CopyShape(1, shape.width, shape.tile)
    roofs.launch_copy(host.data_ptr(), ring.data_ptr(), 4 * shape.tile, alone, 2 * shape.tile)
    last = host[2 * shape.tile // 4 : 4 * shape.tile // 4]
    assert torch.equal(ring[: len(last)], last) and bool((ring[len(last) :] == -1).all())
out = torch.zeros(1, dtype=torch.int32)
words, lines = host.tolist(), set()
for steps in (1, 7, 50):
    key, word = 12345, 0
    for _ in range(steps):
        line = ((word ^ key) * 512) >> 32
        word, key = words[line * 32] % 2**32, (key * 1664525 + 1013904223) % 2**32
        lines.add(line)
    roofs.launch_chase(host.data_ptr(), 65536, 12345, steps, out)
    assert int(out) % 2**32 == word, steps
assert len(lines) > 40 and max(lines) > 400
roofs.PROGRAMS, roofs.CHASE_STEPS = (1, 32), 3
memory = host.view(torch.uint8)
footprints.SMALLEST, footprints.FIRST = 16384, 32768
wide = footprints.wide_footprints(Timer(), torch.device("cpu"), 65536, lambda text: None, 32768)
assert [(entry["pages"], entry["bytes"]) for entry in wide] == [
    (pages, size) for pages in ("huge", "small") for size in (16384, 32768, 65536)
]
assert wide[1]["linear"] == 32768 / 1e-3 and all(entry["round_trip"] == 0 for entry in wide)
sizes, budget = dict(copy_bytes=40000, device_bytes=32768), timing.Budget(9, lambda: 0.0)
found = footprints.all_roofs(Timer(), torch.device("cpu"), memory, False, wide, budget, print, **sizes)
assert len(found["sweep"]) == 3 + 9 and found["copy_engine"] == 32768 / 1e-3 and found["zero_copy"] == 65536 / 1e-3
assert found["empty"] == 1e-3 and found["device_copy"] == 2 * 32768 / 1e-3 and found["host_bytes"] == 65536
assert roofs.best_shapes(found["sweep"], 2)[0].programs == 32 and found["footprints"] is wide
"""


def test_roofs_in_the_interpreter():
    """In a process of its own: the interpreter has to be on before Triton is imported."""
    variables = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", ROOFS_SCRIPT], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.compile
@pytest.mark.parametrize("target", TARGETS)
def test_roofs_compile_to_the_loads_they_name(target):
    out, address = torch.empty(1, dtype=torch.int32), 0x7F00_0000_0000
    shapes = [roofs.CopyShape(132, width, tile) for width in roofs.WIDTHS for tile in roofs.TILES]
    with compiling_for(target) as compiled:
        for shape in shapes:
            roofs.launch_copy(address, address + 4096, 1 << 40, shape)
        roofs.launch_chase(address, 1 << 36, 5, 256, out)
        roofs.launch_empty(out)
    codes = [machine_code(entry) for entry in compiled]
    assert all(code.spills == 0 for code in codes)
    for code, shape in zip(codes, shapes, strict=False):
        threads = 4 * (64 if target == "gfx942" else 32)
        width = min(shape.width, shape.tile // threads)  # AMD's wider waves have 8 bytes each of the smallest tile
        assert set(code.loads) == set(code.stores) == {str(width)}, shape
    # AMD's compiler sees that the chase is one thread's, and reads by scalar loads, which are not counted here.
    assert set(codes[-2].loads) == (set() if target == "gfx942" else {"4"}) and not codes[-1].loads


@pytest.mark.gpu
@pytest.mark.alone
def test_a_whole_run_on_a_gpu(tmp_path):
    device = torch.device("cuda", 0)
    machine = {**environment.describe_gpu(device), **environment.describe_software()}
    machine |= dict(host_table_bytes=256 << 20, device_table_bytes=64 << 20)
    chosen = command.parse(["--only", "*=8", "--out", str(tmp_path)])
    timer = timing.GpuTimer(device, samples=5)
    # The clock stands still: there is time for everything but baselines of torch.compile, which would take minutes.
    assert command.measure(chosen, timing.Budget(50.0, lambda: 0.0), device, machine, timer) == 0
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["finished"] and len(content["cases"]) == sum(case.tokens == 8 for case in load_cases())
    for record in content["cases"]:
        assert record["status"] == "ok" and record["kernels"] and record["graph"] and record["host"] > 0, record
        assert all(kernel["registers"] > 0 for kernel in record["kernels"])
    assert [record["batch"] for record in content["steps"]] == [8, 8]
    assert [record["programs"] for record in content["interference"]] == [8, 8]
    assert all(record["status"] == "ok" for record in (*content["steps"], *content["interference"]))
    # Of times the order of magnitude: what a machine reaches is the benchmarks' to say.
    assert all(-0.5 < record["cost"]["ready"] < 1 for record in content["steps"])
    assert {entry["pages"] for entry in content["roofs"]["footprints"]} == {"huge", "small"}
    assert 0 < content["roofs"]["empty"] < 1e-3 and 0 < content["roofs"]["round_trip"] < 1e-4
