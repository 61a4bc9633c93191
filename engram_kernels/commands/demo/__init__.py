"""``python -m engram_kernels demo``: Engram on real text, and what each kernel does."""
