"""Optimizers of a table's rows, and what they keep of each row: their state, in memory and in files."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
