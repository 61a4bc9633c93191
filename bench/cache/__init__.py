"""Benchmarks of the n-gram cache."""
