"""What the launchers of all kernels share: checks, devices, streams, kept launches, and sums in a fixed order."""
