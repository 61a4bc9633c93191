"""Kernels of vLLM and SGLang as baselines of the V4.1 cases, read from a folder that git ignores (``--peers DIR``).

    DIR/vllm      files that bench/peers/vllm.py names
    DIR/sglang    files that bench/peers/sglang.py names

TileKernels' gate is a third where its package is installed (bench/peers/tile_kernels.py).

CONTRIBUTING.md says how to fill the folder. Of a file only the functions named there run, and what they refer to: the
packages themselves are not imported, since both want an engine around them.
"""

import re
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch

from engram_kernels import EngramTable, HashPlan

from . import sglang as sglang_peer
from . import tile_kernels as tile_kernels_peer
from . import vllm as vllm_peer
from .files import MissingPeer, load_functions
from .inputs import Requests

#: In the order in which they are measured.
NAMES = ("vllm", "sglang", "tilekernels")


class Peers:
    """What a folder holds, loaded when it is asked for. ``say`` gets one line for a peer that is missing.

    ``asserts=False`` leaves out the checks of their launchers, which refuse tensors that are not on a GPU.
    """

    def __init__(self, folder: Path, say=print, asserts: bool = True):
        self.folder, self._say, self._asserts = Path(folder), say, asserts

    def describe(self) -> dict[str, str]:
        """Peer -> version, of those that are there, for a result's environment."""
        return {name: self._version(name) for name in NAMES if getattr(self, name) is not None}

    @cached_property
    def vllm(self) -> SimpleNamespace | None:
        return self._load("vllm", vllm_peer.FILES)

    @cached_property
    def sglang(self) -> SimpleNamespace | None:
        return self._load("sglang", sglang_peer.FILES)

    @cached_property
    def tilekernels(self) -> SimpleNamespace | None:
        try:
            return tile_kernels_peer.load()
        except Exception as error:  # not installed, or its compiler is missing
            self._leave_out("tilekernels", error)
            return None

    def hash(self, token_ids, plan: HashPlan, requests: Requests | None = None) -> dict:
        """Baselines of ngram_hash over ``token_ids``, one sequence a set or ``requests``."""
        makers = dict(vllm=lambda: vllm_peer.hash(self.vllm, token_ids, plan, requests))
        makers["sglang"] = lambda: sglang_peer.hash(self.sglang, token_ids, plan, requests)
        return self._present(makers)

    def lookup(self, table: EngramTable, row_ids, programs: int | None = None) -> dict:
        """Baselines of lookup. programs: of a persistent grid at most, for a device that does not say."""
        makers = dict(vllm=lambda: vllm_peer.lookup(self.vllm, table, row_ids, programs))
        makers["sglang"] = lambda: sglang_peer.lookup(self.sglang, table, row_ids)
        return self._present(makers)

    def hash_lookup(self, token_ids, plan: HashPlan, tables, programs: int | None = None) -> dict:
        """Baselines of hash_lookup: a launch for the hash of all layers, then one a layer."""
        makers = dict(vllm=lambda: vllm_peer.hash_lookup(self.vllm, token_ids, plan, tables, programs))
        makers["sglang"] = lambda: sglang_peer.hash_lookup(self.sglang, token_ids, plan, tables)
        return self._present(makers)

    def gate(self, inputs, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float) -> dict:
        """Baselines of gate_residual over sets of (hidden, key, value), key and value views of one kv."""
        makers = dict(vllm=lambda: vllm_peer.gate(self.vllm, inputs, query_norm, key_norm, eps))
        makers["sglang"] = lambda: sglang_peer.gate(self.sglang, inputs, query_norm, key_norm, eps)
        makers["tilekernels"] = lambda: tile_kernels_peer.gate(self.tilekernels, inputs, query_norm, key_norm, eps)
        return self._present(makers)

    def gate_gradients(self, inputs, grads, norms, eps: float, forward: bool) -> dict:
        """Baselines of gate_residual's backward pass, or of both passes, for gradients of all its five inputs."""
        arguments = (inputs, grads, *norms, eps, forward)
        return self._present(dict(tilekernels=lambda: tile_kernels_peer.gate_gradients(self.tilekernels, *arguments)))

    def _present(self, makers: dict) -> dict:
        return {name: make for name, make in makers.items() if getattr(self, name) is not None}

    def _load(self, name: str, files: dict) -> SimpleNamespace | None:
        found = SimpleNamespace()
        try:
            for file, functions in files.items():
                loaded = load_functions(self.folder / name / file, functions, asserts=self._asserts)
                found.__dict__.update(loaded.__dict__)
        except Exception as error:  # a peer that changed must not cost the run
            self._leave_out(name, error)
            return None
        return found

    def _leave_out(self, name: str, error: Exception) -> None:
        text = error if isinstance(error, MissingPeer) else f"{type(error).__name__}: {error}"
        self._say(f"peer {name} is left out: {' '.join(str(text).split())}")

    def _version(self, name: str) -> str:
        if name == "tilekernels":
            return tile_kernels_peer.version()
        found = sorted(self.folder.glob(f"{name}-*.dist-info"))
        match = re.match(rf"{name}-(.+)\.dist-info", found[-1].name) if found else None
        return match[1] if match else "unknown"
