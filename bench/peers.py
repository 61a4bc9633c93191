"""Kernels of vLLM and SGLang as baselines of the V4.1 cases, read from a folder that git ignores (``--peers DIR``).

    DIR/vllm      models/deepseek_v41/common/engram.py: _hash_ids_kernel, _engram_lookup_kernel,
                  _fused_engram_post_wkv_kernel, launched as its modules launch them
    DIR/sglang    kernels/ops/embeddings: engram_hash_ids, engram_gather, fused_engram_gate, called as they are

TileKernels' gate is a third where its package is installed (tile_kernels_peer.py).

CONTRIBUTING.md says how to fill the folder. Of a file only the functions named here run, and what they refer to: the
packages themselves are not imported, since both want an engine around them. vLLM's outputs are allocated once, like
ours; SGLang's hash and gate allocate theirs in every call, as they do there.
"""

import re
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import triton

from engram_kernels import EngramTable, HashPlan

from . import tile_kernels_peer
from .baselines import device_view
from .peer_files import MissingPeer, load_functions

#: In the order in which they are measured.
NAMES = ("vllm", "sglang", "tilekernels")
VLLM = "models/deepseek_v41/common/engram.py"
SGLANG = "kernels/ops/embeddings/engram_{}.py"
SCALE_GROUP = 32
CLAMP = 1e-6


class Peers:
    """What a folder holds, loaded when it is asked for. ``say`` gets one line for a peer that is missing."""

    def __init__(self, folder: Path, say=print):
        self.folder, self._say = Path(folder), say

    def describe(self) -> dict[str, str]:
        """Peer -> version, of those that are there, for a result's environment."""
        return {name: self._version(name) for name in NAMES if getattr(self, name) is not None}

    @cached_property
    def vllm(self) -> SimpleNamespace | None:
        names = ("_hash_ids_kernel", "_engram_lookup_kernel", "_fused_engram_post_wkv_kernel")
        return self._load("vllm", [(VLLM, names)])

    @cached_property
    def sglang(self) -> SimpleNamespace | None:
        names = dict(hash=("engram_hash_ids",), gather=("engram_gather",), gate=("fused_engram_gate",))
        return self._load("sglang", [(SGLANG.format(file), found) for file, found in names.items()])

    @cached_property
    def tilekernels(self) -> SimpleNamespace | None:
        try:
            return tile_kernels_peer.load()
        except Exception as error:  # not installed, or its compiler is missing
            self._leave_out("tilekernels", error)
            return None

    def hash(self, token_ids, plan: HashPlan) -> dict:
        """Baselines of ngram_hash over ``token_ids``, one sequence a set."""
        makers = dict(vllm=lambda: vllm_hash(self.vllm, token_ids, plan))
        makers["sglang"] = lambda: sglang_hash(self.sglang, token_ids, plan)
        return self._present(makers)

    def lookup(self, table: EngramTable, row_ids) -> dict:
        """Baselines of lookup."""
        makers = dict(vllm=lambda: vllm_lookup(self.vllm, table, row_ids))
        makers["sglang"] = lambda: sglang_lookup(self.sglang, table, row_ids)
        return self._present(makers)

    def hash_lookup(self, token_ids, plan: HashPlan, tables) -> dict:
        """Baselines of hash_lookup: a launch for the hash of all layers, then one a layer."""
        return self._present(dict(vllm=lambda: vllm_hash_lookup(self.vllm, token_ids, plan, tables)))

    def gate(self, inputs, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float) -> dict:
        """Baselines of gate_residual over sets of (hidden, key, value), key and value views of one kv."""
        makers = dict(vllm=lambda: vllm_gate(self.vllm, inputs, query_norm, key_norm, eps))
        makers["sglang"] = lambda: sglang_gate(self.sglang, inputs, query_norm, key_norm, eps)
        makers["tilekernels"] = lambda: tile_kernels_peer.gate(self.tilekernels, inputs, query_norm, key_norm, eps)
        return self._present(makers)

    def gate_gradients(self, inputs, grads, norms, eps: float, forward: bool) -> dict:
        """Baselines of gate_residual's backward pass, or of both passes, for gradients of all its five inputs."""
        arguments = (inputs, grads, *norms, eps, forward)
        return self._present(dict(tilekernels=lambda: tile_kernels_peer.gate_gradients(self.tilekernels, *arguments)))

    def _present(self, makers: dict) -> dict:
        return {name: make for name, make in makers.items() if getattr(self, name) is not None}

    def _load(self, name: str, files: list) -> SimpleNamespace | None:
        found = SimpleNamespace()
        try:
            for file, functions in files:
                found.__dict__.update(load_functions(self.folder / name / file, functions).__dict__)
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


def vllm_hash(kernels, token_ids, plan: HashPlan):
    """As NgramHashState.forward without a slot cache: one sequence from its start, no token dead."""
    launch, ids = _vllm_hash_launch(kernels, token_ids, plan)

    def call(index):
        launch(index)
        return ids

    return call


def vllm_lookup(kernels, table: EngramTable, row_ids):
    """As ParallelEngramEmbedding.lookup with all heads on one rank, and unsorted as it is for huge pages."""
    out = _rows_like(table, row_ids[0])
    launch = _vllm_lookup_launch(kernels, table, row_ids[0].device)

    def call(index):
        launch(row_ids[index], out)
        return out

    return call


def vllm_hash_lookup(kernels, token_ids, plan: HashPlan, tables):
    """Hash, then a lookup for each layer, row ids in memory between them."""
    hash_ids, ids = _vllm_hash_launch(kernels, token_ids, plan)
    out = torch.stack([_rows_like(table, ids[:, layer]) for layer, table in enumerate(tables)])
    lookups = [_vllm_lookup_launch(kernels, table, ids.device) for table in tables]

    def call(index):
        hash_ids(index)
        for layer, lookup in enumerate(lookups):
            lookup(ids[:, layer], out[layer])
        return out

    return call


def vllm_gate(kernels, inputs, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float):
    """As the end of Engram.forward, with no mask."""
    out = torch.full_like(inputs[0][0], float("nan"))
    tokens, branches, width = out.shape
    pairs = [(hidden, whole_kv(key, value)) for hidden, key, value in inputs]
    block = triton.next_power_of_2(width)

    def call(index):
        hidden, kv = pairs[index]
        strides = (*hidden.stride(), *kv.stride(), *query_norm.stride(), *key_norm.stride(), 0, *out.stride())
        kernels._fused_engram_post_wkv_kernel[(tokens * branches,)](
            hidden,
            kv,
            query_norm,
            key_norm,
            hidden,
            out,
            tokens,
            *strides,
            eps,
            CLAMP,
            DIM=width,
            HC_MULT=branches,
            BLOCK_SIZE=block,
            HAS_MASK=False,
            num_warps=8 if block >= 2048 else 4,
        )
        return out

    return call


def sglang_hash(functions, token_ids, plan: HashPlan):
    """engram_hash_ids: mode 0, decode, for one token; mode 2, extend, for more. History is not written back."""
    device, tokens = token_ids[0].device, len(token_ids[0])
    layers, longest = plan.multipliers.shape
    ids = [each.long() for each in token_ids]  # its own type
    positions = torch.arange(tokens, device=device)
    run: dict = dict(mode=0)
    if tokens > 1:
        zeros = dict(dtype=torch.int32, device=device)
        run = dict(mode=2, row=torch.zeros(tokens, **zeros), starts=torch.zeros(1, **zeros))
    options = dict(
        history=torch.zeros(1, longest - 1, dtype=torch.int32, device=device),
        token_map=plan.token_map.long(),
        multipliers=plan.multipliers,
        primes=plan.primes.view(layers, longest - 1, -1),
        offsets=plan.offsets,
        pad_id=plan.pad,
        **run,
    )
    return lambda index: functions.engram_hash_ids(ids[index], positions, **options)[0]


def sglang_lookup(functions, table: EngramTable, row_ids):
    """engram_gather; in address order from the host, as it does over PCIe."""
    _check_format(table)
    out = _rows_like(table, row_ids[0])
    options = dict(row_hi=table.rows, sort_ids=table.placement == "host")

    def call(index):
        addresses = table.weight.data_ptr(), table.scale.data_ptr()
        flat = row_ids[index].view(-1), out.view(-1, table.width)
        functions.engram_gather(*addresses, *flat, table.width, SCALE_GROUP, **options)
        return out

    return call


def sglang_gate(functions, inputs, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float):
    pairs = [(hidden, whole_kv(key, value)) for hidden, key, value in inputs]
    return lambda index: functions.fused_engram_gate(*pairs[index], query_norm, key_norm, eps, CLAMP)


def whole_kv(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``kv [T, (H + 1) * D]`` that ``key [T, H, D]`` and ``value [T, D]`` are views of."""
    tokens, branches, width = key.shape
    if value.data_ptr() != key.data_ptr() + branches * width * key.element_size():
        raise ValueError("whole_kv: value must lie right behind the keys of its token")
    return key.as_strided((tokens, (branches + 1) * width), (key.stride(0), 1))


def _vllm_hash_launch(kernels, token_ids, plan: HashPlan):
    """``launch(index)``, and the ids ``[T, L, C]`` int32 that it writes."""
    device, tokens = token_ids[0].device, len(token_ids[0])
    layers, longest = plan.multipliers.shape
    heads = plan.primes.shape[1] // (longest - 1)
    ids = torch.full((tokens, layers, plan.primes.shape[1]), -1, dtype=torch.int32, device=device)
    positions = torch.arange(tokens, device=device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    dead = torch.zeros(tokens, dtype=torch.bool, device=device)
    lookback = torch.full((1, longest - 1), -1, dtype=torch.int32, device=device)
    lookback_dead = torch.zeros(1, longest - 1, dtype=torch.bool, device=device)

    def launch(index):
        kernels._hash_ids_kernel[(triton.cdiv(tokens, 32), layers)](
            token_ids[index],
            plan.token_map,
            dead,
            positions,
            None,
            starts,
            plan.multipliers,
            plan.primes,
            plan.offsets,
            None,
            lookback,
            lookback_dead,
            ids,
            tokens,
            0,
            plan.pad,
            input_stride=1,
            mask_stride=1,
            position_stride=1,
            table_stride=0,
            table_col_stride=0,
            query_stride=1,
            num_query_rows=1,
            num_table_rows=0,
            max_blocks=0,
            cache_block_size=64,
            MAX_NGRAM=longest,
            num_heads=heads,
            BLOCK_T=32,
            BLOCK_H=triton.next_power_of_2(heads),
            dead_id=-1,
            lookback_depth=longest - 1,
            lookback_row_stride=lookback.stride(0),
            lookback_col_stride=lookback.stride(1),
            lookback_mask_row_stride=lookback_dead.stride(0),
            lookback_mask_col_stride=lookback_dead.stride(1),
            num_warps=4,
        )

    return launch, ids


def _vllm_lookup_launch(kernels, table: EngramTable, device: torch.device):
    """``launch(ids [T, C], out [T, C, R])``; ids may be strided."""
    _check_format(table)
    weight = device_view(table.weight, device).view(torch.float8_e4m3fn)
    scale = device_view(table.scale, device).view(torch.uint8)
    most = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

    def launch(ids, out):
        tokens, columns = ids.shape
        grid = min(triton.cdiv(tokens * columns, 16), most)
        kernels._engram_lookup_kernel[(grid,)](
            weight,
            scale,
            ids,
            ids,
            out,
            0,
            table.rows,
            tokens * columns,
            *ids.stride(),
            HEAD_START=0,
            LOCAL_HEADS=columns,
            TOTAL_HEADS=columns,
            DIM=table.width,
            QUANT_BLOCK=SCALE_GROUP,
            BLOCK_R=16,
            GRID=grid,
            SORTED=False,
            PACKED=False,
            OUT_STRIDE=out.stride(0),
            PEER_ROWS=0,
        )

    return launch


def _rows_like(table: EngramTable, row_ids: torch.Tensor) -> torch.Tensor:
    """NaN ``[..., R]``: what a peer does not write cannot pass a check."""
    shape = (*row_ids.shape, table.width)
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device=row_ids.device)


def _check_format(table: EngramTable) -> None:
    if table.format.scaling != "group":
        raise ValueError(f"peers read e4m3 rows with a ue8m0 scale per {SCALE_GROUP}, got {table.format}")
