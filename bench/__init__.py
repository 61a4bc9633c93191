"""Benchmarks of engram_kernels, ``python -m bench``: one file per operation, ``bench_<file>.py``, and roofs beside."""
