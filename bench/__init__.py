"""Benchmarks of engram_kernels, ``python -m bench``: a file per operation, by room, and what runs them."""
