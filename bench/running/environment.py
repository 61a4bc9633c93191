"""The machine and the versions that a result was made with."""

import datetime
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LINK_QUERY = ("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max")
_CLOCK_QUERY = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit")
_THROTTLE_QUERY = ("clocks_throttle_reasons.active", "temperature.gpu")
_VERSIONS = ("driver", "torch", "triton", "python", "engram_kernels", "commit")
#: What must be equal for a run to go on where another one stopped.
IDENTITY = ("gpu", *_VERSIONS, "host_table_bytes", "text", "implementations")


def describe_gpu(device) -> dict:
    """GPU, driver and versions; what cannot be found is None."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        **smi(device, ("driver_version", *_LINK_QUERY)),
    }


def _runtime() -> str:
    """What torch was built for."""
    import torch

    found = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return next((f"{name} {version}" for name, version in found.items() if version), "CPU")


def describe_software() -> dict:
    """Versions, host and date."""
    import numpy
    import torch
    import triton

    from engram_kernels import __version__
    from engram_kernels.tables.memory.report import available_host_memory, total_host_memory

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "engram_kernels": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "runtime": _runtime(),
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "host_bytes": total_host_memory(),
        "host_bytes_available": available_host_memory(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def clocks(device) -> dict:
    """Clocks (MHz), what holds them back, power (W) and the state of the link as they are now."""
    return smi(device, (*_CLOCK_QUERY, *_THROTTLE_QUERY, *_LINK_QUERY))


def clocks_under(load, device) -> dict:
    """:func:`clocks` while the device works: ``load()`` is called until they have been read. Idle ones say nothing."""
    import torch

    with ThreadPoolExecutor(1) as reader:
        found = reader.submit(clocks, device)
        while not found.done():
            load()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return found.result()


def smi(device, fields: tuple[str, ...]) -> dict:
    """Fields of nvidia-smi for a GPU; each None where there is no such tool or field."""
    import torch

    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if torch.cuda.is_available() else None
    if uuid is not None:
        command.append(f"--id=GPU-{str(uuid).removeprefix('GPU-')}")
    values = _output(command)
    found: list[str | None] = []
    if values and values.strip():
        found += [value.strip() for value in values.splitlines()[0].split(",")]
    if len(found) != len(fields):
        if len(fields) > 1:  # it refuses all of them where it does not know one
            return {name: value for field in fields for name, value in smi(device, (field,)).items()}
        found = [None]
    names = [{"driver_version": "driver"}.get(field, field) for field in fields]
    return dict(zip(names, found, strict=True))


def commit() -> str:
    """The checkout's commit, with ``+changes`` where files differ from it; "unknown" where nothing tells.

    Where .git does not travel, as to a borrowed machine, the file COMMIT does that ``make commit-file`` writes.
    """
    if (ROOT / ".git").exists():  # else git would answer for a repository around this folder
        revision = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
        if revision is not None:
            changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
            return revision.strip() + ("+changes" if changed else "")
    return _read(str(ROOT / "COMMIT")) or "unknown"


def huge_share(address: int) -> float | None:
    """Share of the resident memory of the mapping at ``address`` that is in huge pages, of whatever kind."""
    huge = other = 0
    inside = False
    for line in (_read("/proc/self/smaps") or "").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and (size := re.match(r"(\w+):\s+(\d+) kB", line)):
            if size[1] in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"):
                huge, other = huge + int(size[2]), other - int(size[2])
            elif size[1] in ("Shared_Hugetlb", "Private_Hugetlb"):  # these are not in Rss
                huge += int(size[2])
            elif size[1] == "Rss":
                other += int(size[2])
    return huge / (huge + other) if huge + other else None


def cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.M)
    return match[1] if match else platform.machine()


def slug(name: str) -> str:
    """A GPU's name as part of a file's: lower case, words joined by dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
