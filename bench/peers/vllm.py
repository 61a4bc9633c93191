"""vLLM's kernels as baselines, launched as its modules launch them (release 0.33.0).

    models/deepseek_v41/common/engram.py    _hash_ids_kernel, _engram_lookup_kernel, _fused_engram_post_wkv_kernel

Outputs are allocated once, like ours.
"""

import torch
import triton

from bench.ops.baselines import device_view
from engram_kernels import EngramTable, HashPlan

from .inputs import CLAMP, SCALE_GROUP, Requests, check_format, rows_like, whole_kv

#: File in the package -> names that are taken from it.
FILES = {
    "models/deepseek_v41/common/engram.py": (
        "_hash_ids_kernel",
        "_engram_lookup_kernel",
        "_fused_engram_post_wkv_kernel",
    )
}


def hash(kernels, token_ids, plan: HashPlan, requests: Requests | None = None):
    """As NgramHashState.forward without a slot cache: one sequence from its start, no token dead, or ``requests``."""
    launch, ids = _hash_launch(kernels, token_ids, plan, requests)

    def call(index):
        launch(index)
        return ids

    return call


def lookup(kernels, table: EngramTable, row_ids, programs: int | None = None):
    """As ParallelEngramEmbedding.lookup with all heads on one rank, and unsorted as it is for huge pages.

    programs: of its persistent grid at most; None for one on each multiprocessor.
    """
    out = rows_like(table, row_ids[0])
    launch = _lookup_launch(kernels, table, row_ids[0].device, programs)

    def call(index):
        launch(row_ids[index], out)
        return out

    return call


def hash_lookup(kernels, token_ids, plan: HashPlan, tables, programs: int | None = None):
    """Hash, then a lookup for each layer, row ids in memory between them."""
    hash_ids, ids = _hash_launch(kernels, token_ids, plan)
    out = torch.stack([rows_like(table, ids[:, layer]) for layer, table in enumerate(tables)])
    lookups = [_lookup_launch(kernels, table, ids.device, programs) for table in tables]

    def call(index):
        hash_ids(index)
        for layer, lookup in enumerate(lookups):
            lookup(ids[:, layer], out[layer])
        return out

    return call


def gate(kernels, inputs, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float):
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


def _hash_launch(kernels, token_ids, plan: HashPlan, requests: Requests | None = None):
    """``launch(index)``, and the ids ``[T, L, C]`` int32 that it writes."""
    device, tokens = token_ids[0].device, len(token_ids[0])
    layers, longest = plan.multipliers.shape
    heads = plan.primes.shape[1] // (longest - 1)
    requests = requests or Requests.one(tokens, longest, device)
    ids = torch.full((tokens, layers, plan.primes.shape[1]), -1, dtype=torch.int32, device=device)
    dead = [requests.dead(each) for each in token_ids]
    dead = [torch.zeros(tokens, dtype=torch.bool, device=device) if each is None else each for each in dead]
    positions = requests.positions()
    lookback = requests.history.flip(1).contiguous()  # newest first
    lookback_dead = torch.zeros_like(lookback, dtype=torch.bool)

    def launch(index):
        kernels._hash_ids_kernel[(triton.cdiv(tokens, 32), layers)](
            token_ids[index],
            plan.token_map,
            dead[index],
            positions,
            None,
            requests.cu_seqlens,
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
            num_query_rows=len(lookback),
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


def _lookup_launch(kernels, table: EngramTable, device: torch.device, programs: int | None):
    """``launch(ids [T, C], out [T, C, R])``; ids may be strided."""
    check_format(table)
    weight = device_view(table.weight, device).view(torch.float8_e4m3fn)
    scale = device_view(table.scale, device).view(torch.uint8)
    if programs is None:
        programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

    def launch(ids, out):
        tokens, columns = ids.shape
        grid = min(triton.cdiv(tokens * columns, 16), programs)
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
