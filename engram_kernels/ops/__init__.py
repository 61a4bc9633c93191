"""The public ops, a file each: what is called, what it checks, what it launches. Kernels are in rooms beside."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
