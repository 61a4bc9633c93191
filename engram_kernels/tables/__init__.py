"""``EngramTable``: rows in a format and a placement, loaded, saved, staged and trained."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
