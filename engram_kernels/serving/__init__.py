"""What a serving engine needs between steps: state by slot, history, prefetched rows."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
