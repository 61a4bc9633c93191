"""Safetensors files: found, checked, read, written, verified and converted. No table is needed for any of it."""

from engram_kernels.geometry.rooms import find_modules

find_modules(globals())
