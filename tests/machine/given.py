"""Memory that a launch is given: its tensors, and those whose address is among its arguments.

Tables, caches, states of optimizers and staged rows reach a kernel as numbers: an argument, or an element of an int64
tensor (the descriptors). Whoever makes such a number asks the tensor for it, so ``Tensor.data_ptr`` is where it is
noted, as long as the tensor's memory lives. Everything else is out of bounds.

``torch.empty`` gives memory filled with a pattern here; what still holds it is undefined.
"""

import contextlib
import ctypes
import functools
from unittest import mock

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from . import Allocation

PATTERN = 0xCB
FILLED_BYTES = 64 << 20  # larger memory is left as it is: tests map terabytes of which they touch a page
DESCRIPTORS = 4096  # elements of the largest int64 tensor that is searched for addresses


def extent(tensor):
    """(first address, end) of a strided tensor's elements."""
    first = _data_ptr(tensor)
    if not tensor.numel():
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def _is_memory(value):
    return (
        isinstance(value, torch.Tensor)
        and type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and value.numel() > 0
    )


_data_ptr = torch.Tensor.data_ptr


class GivenMemory:
    def __init__(self):
        self._asked = {}  # first address -> (end, what holds the memory)
        self._filled = {}  # first address -> (end, what holds the memory)

    @contextlib.contextmanager
    def watching(self):
        """Note addresses that are asked for, and fill what is made without content."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.Tensor, "data_ptr", self._noting()))
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
                stack.enter_context(mock.patch.object(owner, name, self._filling(getattr(owner, name))))
            yield

    def _noting(self):
        def data_ptr(tensor):
            address = _data_ptr(tensor)
            if _is_memory(tensor):
                first, end = extent(tensor)
                known = self._asked.get(first)
                if known is None or known[0] < end or known[1].expired():
                    self._asked[first] = end, StorageWeakRef(tensor.untyped_storage())
            return address

        return data_ptr

    def _filling(self, make):
        @functools.wraps(make)
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if not torch.compiler.is_compiling() and _is_memory(tensor):
                first, end = extent(tensor)
                if end - first <= FILLED_BYTES:
                    ctypes.memset(first, PATTERN, end - first)
                    self._filled[first] = end, StorageWeakRef(tensor.untyped_storage())
            return tensor

        return made

    def of_launch(self, given):
        """The allocations of a launch with arguments ``given`` as (name, value)."""
        parts, numbers = [], []
        for name, value in given:
            if isinstance(value, torch.Tensor):
                parts.append((*extent(value), name))
                if value.dtype == torch.int64 and value.numel() <= DESCRIPTORS:
                    numbers.append((name, value.detach().reshape(-1).numpy()))
            elif isinstance(value, int):
                numbers.append((name, np.array([value], dtype=np.int64)))
        for first, (end, holder) in list(self._asked.items()):
            if holder.expired():
                del self._asked[first]
                continue
            for name, values in numbers:
                if ((values >= first) & (values < end)).any():
                    parts.append((first, end, f"memory behind {name}"))
        return [self._allocation(*part) for part in _merged(parts)]

    def _allocation(self, first, end, name):
        undefined = None
        for start, (stop, holder) in list(self._filled.items()):
            if holder.expired():
                del self._filled[start]
            elif start < end and first < stop:
                low, high = max(first, start), min(end, stop)
                low += -low % 4
                raw = np.frombuffer((ctypes.c_uint8 * max(0, high - low)).from_address(low), np.uint8)
                words = raw[: len(raw) // 4 * 4].view(np.uint32) == PATTERN * 0x01010101
                if words.any():
                    if undefined is None:
                        undefined = np.zeros(end - first, np.uint8)
                    undefined[low - first :][: 4 * len(words)] = np.repeat(words, 4)
        return Allocation(first, end - first, name, undefined)


def _merged(parts):
    """(first, end, name) of maximal runs of overlapping parts."""
    merged = []
    for first, end, name in sorted(part for part in parts if part[0] < part[1]):
        if merged and first < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
            if name not in merged[-1][2].split(", "):
                merged[-1][2] += f", {name}"
        else:
            merged.append([first, end, name])
    return merged
