"""Kernels of gate_conv_residual: scale, convolution, its state, gradients."""
