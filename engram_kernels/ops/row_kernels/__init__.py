"""Kernels of lookup and hash_lookup: rows copied and dequantised, the order in which they are read."""
