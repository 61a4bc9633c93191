"""TileKernels' gate as a baseline, forward and backward, where its package is installed.

    tile_kernels.engram      engram_gate_fwd, engram_gate_bwd, grad_w_reduce

It needs TileLang and sm_90 or later, so that its files alone do not run, and takes 4 branches of bfloat16 with a D of
whole 256s. Key and value are one ``kv [T, H + 1, D]``, as they lie for us too, and the product of both norms is made
before anything is timed. Written from the functions of 2.1.0; not run yet.
"""

import importlib
from importlib import metadata
from types import SimpleNamespace

import torch

from .inputs import CLAMP, whole_kv

FUNCTIONS = ("engram_gate_fwd", "engram_gate_bwd", "grad_w_reduce")


def load() -> SimpleNamespace:
    """The functions; ImportError or AttributeError where they are not there."""
    package = importlib.import_module("tile_kernels.engram")
    return SimpleNamespace(**{name: getattr(package, name) for name in FUNCTIONS})


def version() -> str:
    try:
        return metadata.version("tile-kernels")
    except metadata.PackageNotFoundError:
        return "unknown"


def gate(functions, inputs, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float):
    """Over sets of (hidden, key, value), without what a backward pass reads."""
    pairs = _pairs(inputs)
    both = query_norm.float() * key_norm.float()
    return lambda index: functions.engram_gate_fwd(*pairs[index], both, eps, CLAMP, save_for_backward=False)[0]


def gate_gradients(functions, inputs, grads, query_norm, key_norm, eps: float, forward: bool):
    """Gradients of hidden, kv and both norms; ``forward`` counts the forward pass too."""
    pairs = _pairs(inputs)
    both = query_norm.float() * key_norm.float()
    shape = dict(dtype=torch.float32, device=query_norm.device)

    def run(index: int):
        return functions.engram_gate_fwd(*pairs[index], both, eps, CLAMP, save_for_backward=True)[1:]

    saved = None if forward else [run(index) for index in range(len(pairs))]

    def call(index: int):
        scalars = run(index) if saved is None else saved[index]
        of_hidden, of_kv, parts = functions.engram_gate_bwd(grads[index], *pairs[index], both, *scalars, CLAMP)
        of_norms = [torch.zeros(query_norm.shape, **shape) for _ in range(2)]  # it adds to what is there
        functions.grad_w_reduce(parts, query_norm, key_norm, *of_norms)
        return [of_hidden, of_kv.flatten(1), *of_norms]

    return call


def _pairs(inputs):
    """(hidden, kv ``[T, H + 1, D]``) of each set, no copies."""
    return [
        (hidden, whole_kv(key, value).view(len(key), key.shape[1] + 1, key.shape[2])) for hidden, key, value in inputs
    ]
