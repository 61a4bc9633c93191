"""The ``Engram`` module, what puts it in the place of other models' modules, and its warm-up."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
