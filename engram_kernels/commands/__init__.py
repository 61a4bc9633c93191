"""The command line, ``engram-kernels``: what it is told, what it prints and what it returns."""
