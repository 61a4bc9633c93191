"""Benchmarks of engram_kernels, ``python -m bench``: one file per operation in the package's rooms, run by ``running``."""
