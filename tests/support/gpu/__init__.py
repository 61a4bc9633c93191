"""What stands in for a GPU in tests, drivers, streams and clocks, and what ran on a real one."""
