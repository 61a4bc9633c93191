"""Benchmarks of prefetching, state and whole steps."""
