"""Texts and graphs: the PTX of a kernel, its machine code, the order of blocks and of warps."""
