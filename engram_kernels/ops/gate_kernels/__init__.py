"""Kernels of gate_residual: the gate of a branch, gradients."""
