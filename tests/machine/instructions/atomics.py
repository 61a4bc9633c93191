"""Atomic operations on an array, one lane after the other."""

import numpy as np

from .values import canonical


def _increment(old, limit):
    return 0 if old >= limit else old + 1


def _decrement(old, limit):
    return limit if old == 0 or old > limit else old - 1


# Of exact Python numbers; ``add`` of integers wraps where the result is stored.
OPERATIONS = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "inc": _increment,
    "dec": _decrement,
}
# What each may work on; f32 may only be added.
TYPES = {
    "add": ("u32", "s32", "u64", "f32"),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "inc": ("u32",),
    "dec": ("u32",),
    "cas": ("b32", "b64"),
}


def apply(operation, items, at, operands):
    """Change ``items[at]`` lane by lane, in their order; returns what each lane found there.

    ``operands`` are one array, or two for cas: what is expected and what is put there.
    """
    found = np.empty(len(at), items.dtype)
    if operation == "add" and items.dtype.kind == "f":
        for lane, place in enumerate(at):
            found[lane] = items[place]
            items[place] = canonical(items[place : place + 1] + operands[0][lane : lane + 1])[0]
        return found
    wrap = (1 << 8 * items.dtype.itemsize) - 1
    unsigned = items.view(f"u{items.dtype.itemsize}")
    lists = [each.tolist() for each in operands]
    for lane, place in enumerate(at.tolist()):
        old = items[place].item()
        found[lane] = old
        if operation == "cas":
            if old == lists[0][lane]:
                unsigned[place] = lists[1][lane]
        else:
            unsigned[place] = OPERATIONS[operation](old, lists[0][lane]) & wrap
    return found
