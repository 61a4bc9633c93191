"""The hot n-gram cache: rows that are asked for often, in device memory."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
