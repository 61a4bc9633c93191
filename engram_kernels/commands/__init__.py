"""The command line, ``python -m engram_kernels``: what it prints and what it returns."""
