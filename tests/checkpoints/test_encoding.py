"""Rows into storage formats, against a formulation in numpy float64 that searches where the code computes."""

import math

import numpy as np
import pytest
import torch

from engram_kernels import reference
from engram_kernels.checkpoints.encoding import decode_rows, encode_rows, table_scale
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.testing import tables
from engram_kernels.testing.oracles import e4m3_value, ue8m0_value

MAGNITUDES = np.array([e4m3_value(byte) for byte in range(127)])
E4M3, UE8M0 = FORMATS["e4m3"], FORMATS["e4m3_ue8m0"]


def nearest_e4m3(values):
    """Bytes of the nearest e4m3 numbers, of two equally near the one whose last bit is 0; values within +-448."""
    sizes = np.abs(values)
    above = np.searchsorted(MAGNITUDES, sizes).clip(1, 126)
    low, high = sizes - MAGNITUDES[above - 1], MAGNITUDES[above] - sizes
    take_above = (high < low) | ((high == low) & (above % 2 == 0))
    found = np.where(take_above, above, above - 1)
    found = np.where(np.isnan(values), 127, found)
    return (found | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def group_byte(values):
    """The least scale byte from 1 on under which no value exceeds 448; 127 for zeros."""
    greatest = np.nanmax(np.abs(values), initial=0)
    if greatest == 0:
        return 127
    return next(byte for byte in range(1, 255) if greatest <= 448 * ue8m0_value(byte))


def adversarial(rows, width, seed=0):
    """Values over the whole range of float32, ties and limits of e4m3 among them, by groups of 32."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows * width // 32, 32)) * np.exp2(
        generator.integers(-140, 120, (rows * width // 32, 1))
    )
    ties = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    special = [
        np.zeros(32),
        np.full(32, -0.0),
        np.r_[448.0, ties[-31:] * 0.99],
        np.r_[np.nextafter(np.float32(448), np.float32(449)), np.ones(31)],
        np.r_[448.0, ties[:31]],  # with scale 1: every subnormal tie
        np.r_[-448.0, -ties[40:71]],
        np.r_[464.0, 463.99, np.full(30, 1.0)],
        np.full(32, np.finfo(np.float32).max),
        np.full(32, 2.0**-149),
        np.r_[2.0**-126, np.full(31, 2.0**-149)],
        np.r_[np.nan, np.full(31, 3.3)],
        np.full(32, np.nan),
    ]
    values[: len(special)] = special
    return torch.from_numpy(values.astype(np.float32).reshape(rows, width))


def test_groups_against_the_search():
    values = adversarial(40, 128)
    rows, scales = encode_rows(values, UE8M0, "t")
    assert rows.dtype == torch.float8_e4m3fn and scales.dtype == torch.uint8 and scales.shape == (40, 4)
    groups = values.double().numpy().reshape(-1, 32)
    expected = np.array([group_byte(group) for group in groups])
    np.testing.assert_array_equal(scales.flatten().numpy(), expected)
    bits = nearest_e4m3(groups / np.exp2(expected[:, None] - 127.0))
    np.testing.assert_array_equal(rows.view(torch.uint8).numpy().reshape(-1, 32), bits)
    assert scales.min() >= 1 and scales.max() < 255 and {127, 128} <= set(scales.flatten().tolist())


def test_every_tie_goes_to_the_even_neighbour():
    ties = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    values = torch.tensor(np.r_[ties, -ties, 448.0, 0.0].reshape(2, -1), dtype=torch.float32)[:, :127]
    rows, _ = encode_rows(values.contiguous(), E4M3, "t", scale=1.0)
    bits = rows.view(torch.uint8)
    assert torch.equal(bits, torch.from_numpy(nearest_e4m3(values.double().numpy())))
    assert not (bits % 2 * (values.abs() != 448)).any()


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-20, 1e-38])
def test_a_scale_for_the_table(scale):
    """Divided in float32, then rounded; beyond 448 the largest."""
    values = torch.randn(30, 48) * scale * 200
    values[0, :4] = torch.tensor([math.nan, -0.0, 1e6 * scale, -1e6 * scale])
    rows, groups = encode_rows(values, E4M3, "t", scale=scale)
    assert groups is None
    quotient = (values.numpy() / np.float32(scale)).astype(np.float64)
    expected = nearest_e4m3(quotient.clip(-448, 448))
    np.testing.assert_array_equal(rows.view(torch.uint8).numpy(), expected)
    assert rows.view(torch.uint8)[0, :4].tolist() == [0x7F, 0x80, 0x7E, 0xFE]


@pytest.mark.parametrize("magnitude", [1.0, 447.9, 3e38, 1e-30, 5e-39])
def test_the_scale_that_is_measured_takes_the_greatest_value_to_448(magnitude):
    scale = table_scale(magnitude, E4M3)
    rows, _ = encode_rows(torch.tensor([[magnitude, -magnitude] * 8]), E4M3, "t", scale=scale)
    assert scale == float(np.float32(np.float32(magnitude) / 448)) and set(rows.float().abs().flatten().tolist()) == {
        448.0
    }
    assert table_scale(0.0, E4M3) == 1.0


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dense_formats_are_casts(name):
    values = torch.cat([torch.randn(4, 32), torch.tensor([[math.nan, math.inf, 1e6, 65519.9] * 8])])
    rows, scales = encode_rows(values, FORMATS[name], "t")
    assert scales is None and rows.dtype == FORMATS[name].dtype
    assert torch.equal(rows.nan_to_num(7), values.to(rows.dtype).nan_to_num(7))


def test_decoding_is_the_reference_and_encoding_gives_the_values_back():
    """Of finite values: a group may take a smaller scale than it had, under which they are the same numbers."""
    weight, scale = tables.random_parts(200, 64, "e4m3_ue8m0")
    scale.clamp_(20, 230)
    values = decode_rows(weight, scale, UE8M0)
    assert torch.equal(values.nan_to_num(7), reference.ops.rows.dequantise(weight, scale, UE8M0).nan_to_num(7))
    rows, scales = encode_rows(values, UE8M0, "t")
    assert torch.equal(decode_rows(rows, scales, UE8M0).nan_to_num(7), values.nan_to_num(7))
    assert (scales <= scale).all()
    weight, scale = tables.random_parts(200, 64, "e4m3")
    values = decode_rows(weight, None, E4M3, scale)
    assert torch.equal(
        encode_rows(values, E4M3, "t", scale=scale)[0].float().nan_to_num(7), weight.float().nan_to_num(7)
    )


@pytest.mark.parametrize("fmt", [E4M3, UE8M0])
def test_infinity_is_refused(fmt):
    values = torch.ones(5, 64)
    values[3, 40] = -math.inf
    with pytest.raises(ValueError, match=f"^caller: {fmt.name} has no infinity, and row 3 of these 5 holds one$"):
        encode_rows(values, fmt, "caller", scale=1.0)
