"""Pure PyTorch reference of every op: the specification, and what runs on a CPU.

Same rooms, file and function names as the ops in ``engram_kernels``, same signatures. Written to be read: no loop over
tokens, differentiable where the op is, float64 where the inputs are. Works on any device.
"""

from .ops.gate import gate_residual
from .ops.gate_conv import gate_conv_residual
from .ops.hash_rows import hash_lookup
from .ops.hashing import ngram_hash
from .ops.rows import lookup

__all__ = ["gate_conv_residual", "gate_residual", "hash_lookup", "lookup", "ngram_hash"]
