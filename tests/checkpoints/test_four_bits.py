"""Rows of four bits: codes and scales against a search by brute force, whatever is encoded together."""

import math

import numpy as np
import pytest
import torch

from engram_kernels.checkpoints import encoding
from engram_kernels.checkpoints.encoding import decode_rows, encode_rows
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.testing.oracles import e2m1_value, e4m3_value, ue8m0_value

SCALE = 0.0123
LEVELS = np.array([e2m1_value(code) for code in range(16)])
#: How scale bytes are tried from that of the greatest value, as the documentation of the module says.
TRIED = {"mxfp4": (0, -1, 1), "nvfp4": (0, -1, 1, 3, 4, 5, 6)}


def options_of(name):
    return dict(scale=SCALE) if name == "nvfp4" else {}


def factor_of(name, byte):
    """float32 that codes of a group with this scale byte are multiplied by."""
    if name == "mxfp4":
        return np.float32(ue8m0_value(byte))
    return np.float32(np.float32(e4m3_value(byte)) * np.float32(SCALE))


def nearest_code(value):
    """The code nearest to a float64; of two as near that with an even number; the sign is kept."""
    distances = np.abs(LEVELS[:8] - abs(value))
    best = [code for code in range(8) if distances[code] == distances.min()]
    return min(best, key=lambda code: code % 2) | (8 if math.copysign(1, value) < 0 else 0)


def greatest_byte(name, group):
    """The scale byte that takes the greatest value to about 6."""
    most = np.abs(group).max()
    if name == "mxfp4":
        fitting = [byte for byte in range(1, 255) if float(most) <= 6 * ue8m0_value(byte)]
        return fitting[0] if most else 127
    wanted = np.float32(np.float32(most / np.float32(6)) / np.float32(SCALE))
    values = np.array([e4m3_value(byte) for byte in range(127)])
    distances = np.abs(values - min(float(wanted), 448.0))
    near = [byte for byte in range(127) if distances[byte] == distances.min()]
    return max(1, min(near, key=lambda byte: byte % 2))


def encoded_group(name, group, byte):
    """(codes, squared error) of a group under a scale byte."""
    factor = factor_of(name, byte)
    codes = [nearest_code(float(np.float32(value / factor))) for value in group]
    decoded = np.array([np.float32(np.float32(LEVELS[code]) * factor) for code in codes])
    return codes, float((((np.abs(group) - np.abs(decoded)).astype(np.float32)).astype(np.float64) ** 2).sum())


def rows_of(kind):
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(12, 64, generator=generator)
    if kind == "normal":
        return normal * 0.4
    if kind == "heavy":
        return normal / torch.rand(12, 64, generator=generator).clamp_(min=1e-3) * 0.1
    values = normal * torch.logspace(-12, 1, 12)[:, None]  # of many sizes, among them scales that are subnormal
    values[3], values[4, :32] = 0.0, -0.0
    return values


@pytest.mark.parametrize("kind", ["normal", "heavy", "sizes"])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_codes_and_scales_are_those_of_a_search_by_hand(name, kind):
    fmt, values = FORMATS[name], rows_of(kind)
    nearest_rows, nearest_scales = encode_rows(values, fmt, "t", nearest=True, **options_of(name))
    rows, scales = encode_rows(values, fmt, "t", **options_of(name))
    improved = 0
    for row, given in enumerate(values.numpy()):
        for number, group in enumerate(given.reshape(-1, fmt.group)):
            first = greatest_byte(name, group)
            most = 254 if name == "mxfp4" else 126
            tried = list(dict.fromkeys(min(max(first + step, 1), most) for step in TRIED[name]))
            found = {byte: encoded_group(name, group, byte) for byte in tried}
            best = min(tried, key=lambda byte: found[byte][1])
            assert int(nearest_scales[row, number]) == first
            chosen = int(scales[row, number])
            # Sums of float32 may tie in their last bits.
            assert found[chosen][1] <= found[best][1] * (1 + 1e-6), (row, number)
            improved += found[chosen][1] < found[first][1]
            at = slice(number * fmt.group // 2, (number + 1) * fmt.group // 2)
            for stored, byte in ((nearest_rows, first), (rows, chosen)):
                packed = [low | high << 4 for low, high in np.reshape(found[byte][0], (-1, 2)).tolist()]
                assert stored[row, at].tolist() == packed, (row, number)
    assert improved  # the search is worth something on every kind


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_row_has_the_bits_that_it_has_alone(name):
    fmt, values = FORMATS[name], torch.cat([rows_of("normal"), rows_of("heavy")])
    rows, scales = encode_rows(values, fmt, "t", **options_of(name))
    none = encode_rows(values[:0], fmt, "t", **options_of(name))
    assert none[0].shape == (0, 32) and none[1].shape == (0, fmt.scale_bytes(64))
    for row in range(len(values)):
        alone = encode_rows(values[row : row + 1].clone(), fmt, "t", **options_of(name))
        assert torch.equal(alone[0][0], rows[row]) and torch.equal(alone[1][0], scales[row])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_what_four_bits_hold_comes_back(name):
    """Every level of both signs under moderate scales: nothing is rounded, and zeros keep their sign."""
    fmt = FORMATS[name]
    codes = torch.arange(16).repeat(4)  # each group holds a 6
    weight = (codes[::2] | codes[1::2] << 4).to(torch.uint8).repeat(40, 1)
    scale = torch.arange(50, 90, dtype=torch.uint8)[:, None].repeat(1, fmt.scale_bytes(64))
    own = SCALE if name == "nvfp4" else None
    values = decode_rows(weight, scale, fmt, own)
    rows, scales = encode_rows(values, fmt, "t", **options_of(name))
    assert torch.equal(rows, weight) and torch.equal(scales, scale)
    assert torch.signbit(decode_rows(rows, scales, fmt, own)[:, 8]).all()  # code 8 is -0


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("value, word", [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_what_they_do_not_hold_is_an_error(name, value, word):
    values = torch.ones(5, 32)
    values[3, 17] = value
    with pytest.raises(ValueError, match=f"^caller: {name} has no {word}, and row 3 of these 5 holds one$"):
        encode_rows(values, FORMATS[name], "caller", **options_of(name))


def test_values_beyond_a_tables_scale_become_the_greatest():
    values = torch.zeros(1, 32)
    values[0, :3] = torch.tensor([1e6, -1e6, 6 * 448 * SCALE])
    fmt = FORMATS["nvfp4"]
    rows, scales = encode_rows(values, fmt, "t", scale=SCALE, nearest=True)
    decoded = decode_rows(rows, scales, fmt, SCALE)
    assert decoded[0, :3].tolist() == pytest.approx([6 * 448 * SCALE, -6 * 448 * SCALE, 6 * 448 * SCALE])
    assert encoding.overflows(values, rows, fmt, SCALE) == 2
