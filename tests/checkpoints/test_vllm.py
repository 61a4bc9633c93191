"""nvfp4 rows as vLLM 0.33.0 decodes them on a CPU: what its ``dequantize_to_dtype`` gave for random rows.

``data/vllm_nvfp4.npz`` holds its results; where its wheel lies in ``peers/`` (CONTRIBUTING.md) it is asked again. It
multiplies the two scales first, and rounds that product, which its GPU kernel does not, nor do we: float32 values may
differ by that rounding.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.peers.files import load_functions
from engram_kernels import EngramTable, lookup
from tests.support.documents import ROOT

DATA = Path(__file__).parents[1] / "data" / "vllm_nvfp4.npz"
SOURCE = ROOT / "peers/vllm/model_executor/layers/quantization/utils/nvfp4_emulation_utils.py"
ROWS, WIDTH, SCALE = 256, 160, 0.0031


def random_rows():
    """(codes, scales, the table's scale): every byte; scales finite."""
    generator = torch.Generator().manual_seed(33)
    codes = torch.randint(0, 256, (ROWS, WIDTH // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (ROWS, WIDTH // 16), generator=generator, dtype=torch.uint8)
    scales.masked_fill_((scales & 0x7F) == 0x7F, 0x38)
    return codes, scales, torch.tensor(SCALE)


def vllm_values():
    """float32 ``[ROWS, WIDTH]`` by vLLM's function."""
    function = load_functions(SOURCE, ["dequantize_to_dtype"]).dequantize_to_dtype
    codes, scales, own = random_rows()
    return function(codes, scales.view(torch.float8_e4m3fn), own, torch.float32, swizzle=False)


def test_values_are_vllms_up_to_the_rounding_of_its_scales():
    theirs = torch.from_numpy(np.load(DATA)["values"])
    codes, scales, own = random_rows()
    with EngramTable.from_tensors(codes, scales, own_scale=own, placement="cpu") as table:
        ours = lookup(table, torch.arange(ROWS), out_dtype=torch.float32)
        stored = lookup(table, torch.arange(ROWS))
    steps = (ours.view(torch.int32) - theirs.view(torch.int32)).abs()
    assert steps.max() <= 1 and torch.equal(torch.signbit(ours), torch.signbit(theirs))
    assert 0.01 < (steps > 0).float().mean() < 0.1
    assert torch.equal(stored, theirs.bfloat16())


@pytest.mark.skipif(not SOURCE.exists(), reason="needs vLLM's file in peers/")
def test_the_data_are_what_vllm_computes():
    assert np.array_equal(vllm_values().numpy(), np.load(DATA)["values"])
