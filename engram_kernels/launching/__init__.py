"""What the launchers of all kernels share: checks, devices, streams, kept launches, sums in a fixed order, exchanges of ranks."""
