"""What the launchers of all kernels share: checks, devices, streams, kept launches, sums, exchanges of ranks."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
