"""What calls of equal form share: arguments are checked, and the launch worked out, for the first of them alone.

A bare launch costs the host 10 us, and checking arguments as much again. A call's form is its tensors' shapes, strides,
types and devices, and its options; nothing that checks find or launches are told depends on more, but for addresses.
"""

from collections.abc import Callable

import torch

_MOST = 1024


def form_of(*tensors: torch.Tensor | None) -> tuple | None:
    """The part of a form that tensors are; None where something else is among them, which checks will refuse."""
    form = []
    try:
        for x in tensors:
            if x is None:
                form.append(None)
            else:
                form += x.shape, x.stride(), x.dtype, x.device
    except AttributeError:
        return None
    return tuple(form)


class Prepared(dict):
    """Launches by form. All are forgotten when there are 1,024, as many lengths as no serving engine repeats."""

    def launch(self, form: tuple) -> Callable | None:
        """The launch that was kept for calls of this form, if any."""
        try:
            return self.get(form)
        except TypeError:  # an option that cannot be hashed, which checks will refuse
            return None

    def keep(self, form: tuple, launch: Callable) -> Callable:
        """``launch``, which calls of this form find from now on."""
        if len(self) >= _MOST:
            self.clear()
        self[form] = launch
        return launch

    def __reduce__(self):
        return Prepared, ()  # copies begin anew: launches hold tensors of the original
