"""Benchmarks of the ops."""
