"""How a GPU reaches the host's memory, and whether its driver has to hold a range for that.

    link        GPUs                      memory that kernels read
    pcie        cards                     ranges registered with the driver
    coherent    GH200, GB200, GB300       any, by the host's own page tables (ATS) over NVLink-C2C
    unified     MI300A, GB10              any: host and GPU have one memory

Attributes of CUDA's and HIP's drivers (cudaDevAttrPageableMemoryAccess and ...UsesHostPageTables), asked through
ctypes, as torch has no call for them. A card whose pages migrate on demand (HMM) reads pageable memory too, by faults:
slowly, so that it counts as pcie.
"""

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch

# Of CUdevice_attribute (cuda.h) and hipDeviceAttribute_t (hip_runtime_api.h).
_PAGEABLE, _HOST_PAGE_TABLES = {"cuda": 88, "hip": 65}, {"cuda": 100, "hip": 66}
_LIBRARIES = {"cuda": ("libcuda.so.1",), "hip": ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")}


class HostAccess(NamedTuple):
    """What :func:`host_access` finds."""

    link: str = "pcie"
    pageable: bool = False  #: kernels read memory that no driver was told of


@lru_cache
def host_access(device: int) -> HostAccess:
    """Access of the GPU with this number to the host's memory; that of a card where the driver does not say."""
    unified = bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    kind = "hip" if torch.version.hip else "cuda"
    driver = _driver(kind)
    pageable = driver is not None and _attribute(driver, kind, _PAGEABLE[kind], device)
    if unified:
        return HostAccess("unified", pageable)
    if pageable and _attribute(driver, kind, _HOST_PAGE_TABLES[kind], device):
        return HostAccess("coherent", True)
    return HostAccess()


def _driver(kind: str) -> ctypes.CDLL | None:
    for name in _LIBRARIES[kind]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _attribute(driver: ctypes.CDLL, kind: str, number: int, device: int) -> bool:
    value, handle = ctypes.c_int(0), ctypes.c_int(device)
    try:
        if kind == "cuda" and driver.cuDeviceGet(ctypes.byref(handle), device):
            return False
        ask = driver.cuDeviceGetAttribute if kind == "cuda" else driver.hipDeviceGetAttribute
        return ask(ctypes.byref(value), number, handle) == 0 and value.value == 1
    except AttributeError:  # a library without the call
        return False
