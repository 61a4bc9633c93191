"""Safetensors files: found, checked, read, written, verified and converted. No table is needed for any of it."""
