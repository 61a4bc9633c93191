"""Correctness cases for implementations of the ops, ours and others': golden data, adversarial parameters, oracles."""
