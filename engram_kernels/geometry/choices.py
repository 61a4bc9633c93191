"""Texts that options take, as types: type checkers refuse any other, and editors offer them.

What a running program takes is its kinds (geometry/kinds.py); a test compares both.
"""

from typing import TYPE_CHECKING, Literal

import torch

#: Where a table's rows are.
Placement = Literal["device", "host", "shared", "staged", "cpu"]
#: Where an optimizer's states are, and where scales of rows are that lie elsewhere.
StatePlacement = Literal["device", "host", "cpu"]
ScalePlacement = Literal["device"]
#: In which order rows are read.
ReadOrder = Literal["direct", "address", "head"]
#: Rows as values, or as they are stored.
OutFormat = Literal["values", "storage"]
#: What a gate at d = 0 counts as.
ZeroGate = Literal["copysign", "sign"]
#: Entries of a cache that an n-gram may be in.
Ways = Literal[1, 2, 4, 8, 16, 32]
#: How rows are stored: names of ``FORMATS`` in row_format.py.
FormatName = Literal["float32", "bfloat16", "float16", "e4m3_ue8m0", "e4m3", "nvfp4", "mxfp4", "float64"]
#: What reads in place of a token that an n-gram must not see, and how multipliers of the hash are made.
Window = Literal["pad", "eos"]
MultiplierRule = Literal["numpy", "splitmix64"]
#: What each of several ranks holds of a table, and what becomes of their row gradients.
Split = Literal["columns", "rows"]
Mean = Literal["mean", "sum"]
Reduce = Literal["alone", "mean", "sum"]
#: Rows and their scales as they are stored; None where the format has no scales of rows.
RowsAndScales = tuple[torch.Tensor, torch.Tensor | None]
#: What a Prefetcher reads: tensors, or rows and scales. One without a parameter is a Prefetcher of tensors.
if TYPE_CHECKING:
    from typing_extensions import TypeVar  # Python's own takes a default from 3.13 on

    Read = TypeVar("Read", torch.Tensor, RowsAndScales, default=torch.Tensor)
else:
    from typing import TypeVar

    Read = TypeVar("Read", torch.Tensor, RowsAndScales)
#: (value, scale) of a convolution, oldest first.
ConvState = tuple[torch.Tensor, torch.Tensor]
