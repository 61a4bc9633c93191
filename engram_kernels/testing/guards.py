"""Outputs that start poisoned, inside a buffer whose margins must not change."""

import torch

MARGIN = 64  # elements before and after


class Guarded:
    """``tensor`` of ``shape`` filled with a poison that no op writes; :meth:`check` after the op."""

    def __init__(self, shape, dtype, device):
        count = torch.Size(shape).numel()
        self._buffer = torch.empty(count + 2 * MARGIN, dtype=dtype, device=device)
        # A NaN of all ones, which no arithmetic gives; -1 would be a row id.
        self._poison = 0xFF if dtype.is_floating_point else 0xA5
        self._raw().fill_(self._poison)
        self.tensor = self._buffer[MARGIN : MARGIN + count].view(shape)

    def _raw(self):
        return self._buffer.view(torch.uint8)

    def check(self, poisonous=False):
        """The tensor, once its margins are found untouched and no element is still poison; AssertionError where not.

        poisonous: NaN of the poison's bits may be among the results, as the CPU converts to bfloat16.
        """
        size = self._buffer.element_size()
        raw = self._raw().view(-1, size) == self._poison
        margins = torch.cat([raw[:MARGIN], raw[-MARGIN:]])
        if not margins.all():
            raise AssertionError("wrote outside the output")
        if size > 1 and not poisonous and raw[MARGIN:-MARGIN].all(1).any():
            raise AssertionError("left elements unwritten")
        return self.tensor
