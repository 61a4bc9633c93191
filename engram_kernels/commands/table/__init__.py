"""``python -m engram_kernels table``: checkpoints inspected, verified and converted."""
