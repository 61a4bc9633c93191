"""Outputs that lie over what a launch reads: refused, since a program may read what another one has written.

Compared are ranges of addresses, from a tensor's first element to its last, and for tensors whose rows are equally far
apart also where in that distance these lie: slices of one buffer, side by side, are apart.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from engram_kernels.geometry.plan import HashPlan


class Extent(NamedTuple):
    """What a tensor occupies from its address on, in bytes."""

    length: int  #: to the end of the last element; 0 where there is none
    period: int = 0  #: blocks lie at multiples of it, 0 for one block
    block: int = 0  #: bytes of each

    @classmethod
    def of(cls, x: torch.Tensor | None) -> "Extent":
        if x is None or not x.numel():
            return cls(0)
        size = x.element_size()
        block, outer = 1, []
        for extent, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda pair: pair[1]):
            if extent == 1:
                continue
            if stride == block and not outer:
                block *= extent
            else:
                outer.append((extent, stride))
        length = block + sum((extent - 1) * stride for extent, stride in outer)
        period = outer[0][1] if outer else 0
        if any(stride % period for _, stride in outer if period) or period < block:
            period = 0
        return cls(length * size, period * size, block * size)


class Apart:
    """The check that outputs lie apart from inputs and each other, for all calls of one signature.

    inputs: (name, tensor) in the order in which tensors come. fixed: (name, first address, bytes) of what all calls of
    the signature read. in_place: the input that an output may be, if it has the same address and strides.
    """

    def __init__(
        self,
        where: str,
        outs: Sequence[torch.Tensor | None],
        inputs: Sequence[tuple[str, torch.Tensor | None]],
        fixed: Iterable[tuple[str, int, int]] = (),
        in_place: str | None = None,
    ):
        self._where = where
        # Only what can overlap: a call costs 0.1 us for each tensor that is compared.
        self._outs = [(place, Extent.of(out)) for place, out in enumerate(outs) if out is not None]
        extents = [(place, name, Extent.of(x)) for place, (name, x) in enumerate(inputs)]
        self._inputs = [(place, extent.length, name, extent) for place, name, extent in extents if extent.length]
        self._fixed = [(first, first + length, name) for name, first, length in fixed if length]
        self._in_place = in_place if in_place and outs[0].stride() == dict(inputs)[in_place].stride() else None

    def __call__(self, outs: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor | None]) -> None:
        """ValueError where ``outs`` overlap ``inputs``, what is fixed or each other."""
        written = self._fixed
        for place, extent in self._outs:
            first = outs[place].data_ptr()
            end = first + extent.length
            for place, length, name, other in self._inputs:
                start = inputs[place].data_ptr()
                if start < end and first < start + length:
                    self._look_closer(name, first, extent, start, other)
            for start, stop, name in written:
                if start < end and first < stop:
                    self._refuse(name)
            if len(self._outs) > 1:
                written = [*written, (first, end, "another part of it")]

    def _look_closer(self, name: str, first: int, extent: Extent, start: int, other: Extent) -> None:
        """Raise unless the two interleave, or the input may be written in place."""
        if name == self._in_place and start == first:
            return
        if extent.period and extent.period == other.period:
            behind = (start - first) % extent.period
            if extent.block <= behind and behind + other.block <= extent.period:
                return
        self._refuse(name)

    def _refuse(self, name: str):
        but = f", but for {self._in_place} itself" if self._in_place else ""
        raise ValueError(f"{self._where}: out must not overlap what the call reads{but}, got memory of {name}")


def memory_of_plan(plan: HashPlan) -> list[tuple[str, int, int]]:
    """(name, address, bytes) of a plan's tensors, as errors call them."""
    names = ("multipliers", "primes", "offsets", "reciprocals", "token_map")
    tensors = [(f"plan.{name}", getattr(plan, name)) for name in names]
    return [(name, x.data_ptr(), Extent.of(x).length) for name, x in tensors if x is not None]
