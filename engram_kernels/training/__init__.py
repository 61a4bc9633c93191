"""Optimizers of rows, their state and their files."""
