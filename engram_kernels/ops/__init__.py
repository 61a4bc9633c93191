"""The public ops, a file each: what is called, what it checks, what it launches. Kernels are in rooms beside."""
