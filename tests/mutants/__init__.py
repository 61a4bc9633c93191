"""One mutant is one kernel broken in one way; python -m tests.mutation sees whether a test notices.

A change reads like a patch: its kind (and what tells two of a kind apart) and file, the text that the file holds
exactly once, and what replaces it. A change in a helper stands for every kernel whose own tests have to notice it.
``-k`` goes straight to the test that sees a change, and keeps one that writes out of bounds to cases with guard bands
wide enough. Each file here has the mutants of one operation; machine_code.py has those that only compiled code shows.
Left out is what no result can show: an ``other=`` never used, a swap of the norms inside their product.
"""

from . import cache, editing, gate, gate_backward, gate_conv, hashing, machine_code, read_order, rows, serving, training
from .change import Mutant as Mutant

# What the list has to hold at least once; a kernel without the thing that is broken is spared it.
KINDS = (
    "mask dropped, other dropped, stride swapped, 32-bit product, truncated remainder, window off by one, "
    "cu_seqlens ignored, history reversed, offset omitted, last tile skipped, scale byte off by one, "
    "eps outside the mean, norms swapped, branch fixed to 0, taps reversed, dilation minus one, "
    "barrier dropped, alignment wrong, wait dropped"
).split(", ")

FILES = (hashing, rows, read_order, cache, gate, gate_conv, gate_backward, training, editing, serving, machine_code)
MUTANTS = tuple(mutant for file in FILES for mutant in file.MUTANTS)
