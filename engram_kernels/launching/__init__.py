"""What the launchers of all kernels share: checks, devices, streams, kept launches, sums, exchanges of ranks."""
