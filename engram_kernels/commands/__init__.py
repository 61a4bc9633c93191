"""The command line, ``engram-kernels``: what it is told, what it prints and what it returns."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
