"""Loads and stores through one pointer that only luck orders, read from the code that Triton gives layouts (TTGIR).

What is smaller than a tile is replicated: every warp loads it and one stores it. Where that one has stored before
another loads, the other computes from the new value, unless a barrier stands between. The same holds where load and
store have different layouts. It is harmless where the value goes back through the pointer and nowhere else: then what
is stored comes from loads before it, and other warps' loads from nowhere to nothing. Different places of one pointer
are not told apart.
"""

import json
import math
import re
from typing import NamedTuple

_OPERATION = re.compile(r"^\s*(?:(%[\w$.-]+)(?::\d+)?(?:, %[\w$.-]+)* = )?\"?([a-z_]+\.[a-z_.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w$.-]+")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<\w+>|\w+), (#\w+|#ttg\.slice<.*?\}>)>")
# AMD's buffer operations take a scalar pointer and, in brackets, offsets. Its dialect was amdgpu in Triton 3.6.
_LOADS = ("tt.load", "ttg.async_copy_global_to_local", "amdg.buffer_load", "amdgpu.buffer_load")
_STORES = ("tt.store", "amdg.buffer_store", "amdgpu.buffer_store")
_OTHERS = ("ttg.local_", "ttg.async_", "tt.atomic_", "amdg.buffer_atomic_", "amdgpu.buffer_atomic_")
_BARRIERS = ("ttg.barrier", "gpu.barrier")
# A change of layout is one too: it goes through a barrier, or stays within a warp.
_ELEMENTWISE = ("arith.", "math.", "tt.extern_elementwise", "tt.clampf", "ttg.convert_layout")


class Operation(NamedTuple):
    line: int
    result: str | None
    name: str
    body: str
    values: list
    place: str  # in the kernel's source, where the text says so


class Access(NamedTuple):
    operation: Operation
    pointer: str  # argument of the kernel, "*argument" for an address that was loaded through it
    layout: str  # its name in the text, "" for a scalar
    shape: tuple

    def alike(self, other):
        return (self.layout, self.shape) == (other.layout, other.shape)


def unordered(text):
    """[(pointer, load, store)] where a warp may compute from what another has stored already, or not yet."""
    operations = list(_operations(text))
    loads, stores = _accesses(text, operations)
    barriers = [operation.line for operation in operations if operation.name in _BARRIERS]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    if int(re.search(r'"ttg.num-warps" = (\d+)', text)[1]) == 1:
        return []
    found = set()
    for load in loads:
        for store in stores:
            first, last = sorted((load.operation.line, store.operation.line))
            if load.pointer != store.pointer or any(first < line < last for line in barriers):
                continue
            own = load.alike(store) and not replicated(load, layouts)  # each warp stores what it loads
            if not own and not _only_goes_back(load, stores, operations):
                found.add((load.pointer, load.operation.place, store.operation.place))
    return sorted(found)


def replicated(access, layouts):
    """Whether several warps have the same elements of a tensor."""
    return not access.layout or _replicates(layouts.get(access.layout, access.layout), access.shape, layouts)


def _replicates(layout, shape, layouts):
    if sliced := re.search(r"#ttg\.slice<\{dim = (\d+), parent = (#[\w.]+(?:<\{.*\}>)?)\}>", layout):
        parent, dim = layouts.get(sliced[2], sliced[2]), int(sliced[1])
        warps = _numbers(parent, "warpsPerCTA")
        along = warps is not None and warps[dim] > 1
        return along or _replicates(parent, (*shape[:dim], math.inf, *shape[dim:]), layouts)
    if (warps := _numbers(layout, "warpsPerCTA")) is not None:
        inner = zip(_numbers(layout, "sizePerThread"), _numbers(layout, "threadsPerWarp"), warps, shape, strict=True)
        return any(n > 1 and elements * threads * n > size for elements, threads, n, size in inner)
    if bases := re.search(r"warp = (\[.*?\]), block", layout):
        return any(not any(basis) for basis in json.loads(bases[1]))
    raise ValueError(f"a layout that is not known: {layout}")


def _numbers(layout, name):
    found = re.search(rf"{name} = (\[[\d, ]+\])", layout)
    return json.loads(found[1]) if found else None


def _only_goes_back(load, stores, operations):
    """Whether what was loaded goes through operations on single elements back through the pointer, and nowhere else."""
    reached = {load.operation.result}
    back = {store.operation.line for store in stores if store.pointer == load.pointer}
    for operation in operations:
        if operation.line <= load.operation.line:
            continue
        used = reached.intersection(operation.values)
        reached.discard(operation.result)  # names are used again where the first value is out of sight
        if used and operation.name.startswith(_ELEMENTWISE):
            reached.add(operation.result)
        elif used and (operation.line not in back or _pointer(operation) in used):
            return False
    return load.operation.result is not None and "async" not in load.operation.name


def _pointer(operation):
    """What an access goes through: before the brackets, or first."""
    named = re.search(r"(%[\w$.-]+)\[", operation.body) if "buffer_" in operation.name else None
    return named[1] if named else next(iter(operation.values), None)


def _operations(text):
    """The operations of a kernel, in order."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))
    for number, line in enumerate(text.splitlines()):
        if match := _OPERATION.match(line):
            body, *where = match[3].split(" loc(")
            place = where[0].rstrip(")") if where else ""
            while place in places or (inner := re.search(r"(#loc\d*)\)?$", place)):  # to a file and a line
                place = places[place if place in places else inner[1]]
            yield Operation(number, match[1], match[2], body, _VALUE.findall(body), place.split("/")[-1])


def _accesses(text, operations):
    """Loads and stores, each with the argument that its pointer comes from."""
    origins = {name: name[1:] for name in re.findall(r"(%[\w$.-]+): (?:!tt\.ptr|i64|i32)", text)}
    loads, stores = [], []
    for operation in operations:
        if operation.name == "scf.for":
            for inner, outer in re.findall(r"(%[\w$.-]+) = (%[\w$.-]+)", operation.body):
                if outer in origins:
                    origins[inner] = origins[outer]
        pointers = [_pointer(operation)] if operation.name in _LOADS + _STORES else operation.values
        origin = next((origins[name] for name in pointers if name in origins), None)
        if operation.name in _LOADS + _STORES:
            if origin is None:
                raise ValueError(f"{operation.name}{operation.body}: where its pointer comes from is not known")
            tensor = _TENSOR.search(operation.body.split(" : ")[-1])
            shape = tuple(int(size) for size in tensor[1].split("x")[:-1]) if tensor else ()
            access = Access(operation, origin, tensor[2] if tensor else "", shape)
            (loads if operation.name in _LOADS else stores).append(access)
            origin = f"*{origin.lstrip('*')}"
        elif re.search("load|store|copy_global", operation.name) and not operation.name.startswith(_OTHERS):
            raise ValueError(f"an access that is not known: {operation.name}{operation.body}")
        if operation.result and origin is not None:
            origins[operation.result] = origin
    return loads, stores
