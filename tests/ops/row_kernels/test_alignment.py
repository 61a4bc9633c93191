"""Rows that start anywhere though the first is aligned: what a pointer's alignment does not tell, strides must."""

import pytest
import torch

from engram_kernels import gate_residual, split_kv


def apart(rows, gap):
    """The same rows ``[T, n]``, each ``gap`` elements behind the one before; the first is aligned."""
    wide = torch.zeros(len(rows), rows.shape[1] + gap, dtype=rows.dtype, device=rows.device)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


@pytest.mark.kernel
@pytest.mark.parametrize("gap", [1, 4])
def test_rows_of_the_gate(device, gap):
    """Vectors of 16 bytes would be misaligned in every row but the first. The bits are those of rows without gaps."""
    tokens, branches, width = 3, 2, 64
    hidden = torch.randn(tokens, branches * width).bfloat16().to(device)
    kv = torch.randn(tokens, (branches + 1) * width).bfloat16().to(device)
    norms = [torch.randn(branches, width).bfloat16().to(device) for _ in range(2)]

    def gated(hidden, kv):
        hidden = hidden.unflatten(1, (branches, width))
        return gate_residual(hidden, *split_kv(kv, branches, width), *norms, eps=1e-6)

    assert torch.equal(gated(apart(hidden, gap), apart(kv, gap)), gated(hidden, kv))
