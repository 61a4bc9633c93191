"""RowFormat: bytes of rows and scales, and which widths a format takes."""

import pytest
import torch

from engram_kernels.geometry.row_format import FORMATS, row_format

# name -> dtype, bits per element, elements per scale byte (0: no scale of its own per row)
EXPECTED = {
    "float32": (torch.float32, 32, 0),
    "bfloat16": (torch.bfloat16, 16, 0),
    "float16": (torch.float16, 16, 0),
    "float64": (torch.float64, 64, 0),
    "e4m3": (torch.float8_e4m3fn, 8, 0),
    "e4m3_ue8m0": (torch.float8_e4m3fn, 8, 32),
    "nvfp4": (torch.uint8, 4, 16),
    "mxfp4": (torch.uint8, 4, 32),
}


def test_the_formats_are_these():
    assert set(FORMATS) == set(EXPECTED)
    for name, (dtype, _, _) in EXPECTED.items():
        assert row_format(name, "test").name == name and FORMATS[name].dtype == dtype
    assert {name: fmt.group_scale for name, fmt in FORMATS.items() if fmt.group} == {
        "e4m3_ue8m0": "ue8m0",
        "nvfp4": "e4m3",
        "mxfp4": "ue8m0",
    }
    assert {name for name, fmt in FORMATS.items() if fmt.table_scale} == {"e4m3", "nvfp4"}
    assert {name for name, fmt in FORMATS.items() if not fmt.scaled} == {"float32", "bfloat16", "float16", "float64"}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("width", [32, 64, 80, 160, 256, 1024])
def test_bytes_of_rows_and_scales(name, width):
    dtype, bits, group = EXPECTED[name]
    fmt, scales = FORMATS[name], width // group if group else 0
    assert (fmt.row_bytes(width), fmt.scale_bytes(width)) == (width * bits // 8, scales)
    assert fmt.stored_bytes(width) == width * bits // 8 + scales
    weight = torch.empty(3, fmt.row_items(width), dtype=dtype)
    assert (fmt.width_of(weight), weight.nbytes) == (width, 3 * fmt.row_bytes(width))


def test_bytes_of_the_published_rows():
    v41, qwen, paper = FORMATS["e4m3_ue8m0"], FORMATS["e4m3"], FORMATS["bfloat16"]
    assert 24 * (v41.row_bytes(256) + v41.scale_bytes(256)) == 6336
    assert 16 * (qwen.row_bytes(160) + qwen.scale_bytes(160)) == 2560
    assert 16 * (paper.row_bytes(80) + paper.scale_bytes(80)) == 2560
    four = FORMATS["nvfp4"], FORMATS["mxfp4"]
    assert [fmt.stored_bytes(256) for fmt in four] == [144, 136] and [fmt.stored_bytes(160) for fmt in four] == [90, 85]


@pytest.mark.parametrize(
    "name, widths",
    [
        ("float32", (4, 8, 20, 1024)),
        ("float64", (2, 6, 1024)),
        ("bfloat16", (8, 80, 1016)),
        ("float16", (8, 24)),
        ("e4m3", (16, 48, 160)),
        ("e4m3_ue8m0", (32, 96, 256, 1024)),
        ("nvfp4", (32, 96, 160, 1024)),
        ("mxfp4", (32, 96, 160, 1024)),
    ],
)
def test_widths_that_fit(name, widths):
    for width in widths:
        FORMATS[name].check_width(width, "test")


@pytest.mark.parametrize(
    "name, width, expected",
    [
        ("float32", 6, "bytes of a row must be a multiple of 16, got 6 x float32 = 24"),
        ("float64", 3, "bytes of a row must be a multiple of 16, got 3 x float64 = 24"),
        ("bfloat16", 4, "bytes of a row must be a multiple of 16, got 4 x bfloat16 = 8"),
        ("e4m3", 40, "bytes of a row must be a multiple of 16, got 40 x e4m3 = 40"),
        ("e4m3_ue8m0", 48, "e4m3_ue8m0 needs a row width divisible by 32, got 48"),
        ("e4m3_ue8m0", 40, "bytes of a row must be a multiple of 16, got 40 x e4m3_ue8m0 = 40"),
        ("nvfp4", 48, "bytes of a row must be a multiple of 16, got 48 x nvfp4 = 24"),
        ("nvfp4", 33, "bytes of a row must be a multiple of 16, got 33 x nvfp4 = 16.5"),
        ("mxfp4", 16, "bytes of a row must be a multiple of 16, got 16 x mxfp4 = 8"),
        *((name, width, f"row width must be between 1 and 1024 elements, got {width}")
          for name in EXPECTED for width in (0, -32, 1056)),
    ],
)  # fmt: skip
def test_widths_that_do_not(name, width, expected):
    with pytest.raises(ValueError, match=f"^the_caller: {expected}$"):
        FORMATS[name].check_width(width, "the_caller")


@pytest.mark.parametrize("name", ["fp8", "", "Float32", None])
def test_an_unknown_name_lists_the_choices(name):
    expected = f"^the_caller: format must be one of {', '.join(FORMATS)}, got {name!r}$"
    with pytest.raises(ValueError, match=expected):
        row_format(name, "the_caller")
