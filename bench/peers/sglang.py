"""SGLang's functions as baselines, called as they are (release 0.5.23).

    kernels/ops/embeddings/engram_hash.py      engram_hash_ids, and the two that serving calls
    kernels/ops/embeddings/engram_gather.py    engram_gather
    kernels/ops/embeddings/engram_gate.py      fused_engram_gate

Hash and gate allocate their outputs in every call, as they do there.
"""

import torch

from engram_kernels import EngramTable, HashPlan

from .inputs import CLAMP, SCALE_GROUP, Requests, check_format, rows_like, whole_kv

_FOLDER = "kernels/ops/embeddings"
#: File in the package -> names that are taken from it.
FILES = {
    f"{_FOLDER}/engram_hash.py": (
        "engram_hash_ids",
        "engram_hash_extend_and_commit",
        "engram_hash_ids_and_commit",
    ),
    f"{_FOLDER}/engram_gather.py": ("engram_gather",),
    f"{_FOLDER}/engram_gate.py": ("fused_engram_gate",),
}
#: A shift of the ids of images that no token id reaches.
_NO_SHIFT = 1 << 30


def hash(functions, token_ids, plan: HashPlan, requests: Requests | None = None):
    """engram_hash_ids, history not written back: mode 0, decode, for one token; mode 2, extend, for more.

    With ``requests`` what a server calls, which also writes the history: the decode of one token each, or the extend.
    """
    device, tokens = token_ids[0].device, len(token_ids[0])
    layers, longest = plan.multipliers.shape
    ids = [each.long() for each in token_ids]  # its own type
    options = dict(
        token_map=plan.token_map.long(),
        multipliers=plan.multipliers,
        primes=plan.primes.view(layers, longest - 1, -1),
        offsets=plan.offsets,
        pad_id=plan.pad,
    )
    if requests is not None:
        return _serving_hash(functions, ids, options, requests)
    run: dict = dict(mode=0)
    if tokens > 1:
        zeros = dict(dtype=torch.int32, device=device)
        run = dict(mode=2, row=torch.zeros(tokens, **zeros), starts=torch.zeros(1, **zeros))
    options |= dict(history=torch.zeros(1, longest - 1, dtype=torch.int32, device=device), **run)
    positions = torch.arange(tokens, device=device)
    return lambda index: functions.engram_hash_ids(ids[index], positions, **options)[0]


def _serving_hash(functions, ids, options, requests: Requests):
    batch, tokens = len(requests.history), len(ids[0])
    positions = requests.positions()
    before = requests.history.clamp(min=0)  # what lies ahead of a request's start is known by its positions
    options = options | dict(req_slots=torch.arange(batch, device=positions.device))
    if requests.dead_id is not None:
        options |= dict(image_token_id=requests.dead_id, mm_pad_shift=_NO_SHIFT)
    if tokens == batch:
        places = torch.ones(tokens, dtype=torch.int64, device=positions.device)  # 0 is padding
        history = before.clone()  # which it moves on by the tokens
        options |= dict(history=history, out_cache_loc=places)

        def decode(index):
            history.copy_(before)
            return functions.engram_hash_ids_and_commit(ids[index], positions, **options)

        return decode
    options |= dict(
        history=before,
        commit_history=before.clone(),
        starts=requests.cu_seqlens[:-1].clone(),
        lengths=requests.lengths,
        num_real=tokens,
        history_via_slots=True,
        out_cache_loc=None,
    )
    return lambda index: functions.engram_hash_extend_and_commit(ids[index], positions, **options)


def lookup(functions, table: EngramTable, row_ids, out: torch.Tensor | None = None):
    """engram_gather; in address order from the host, as it does over PCIe."""
    check_format(table)
    out = rows_like(table, row_ids[0]) if out is None else out
    options = dict(row_hi=table.rows, sort_ids=table.placement == "host")

    def call(index):
        addresses = table.weight.data_ptr(), table.scale.data_ptr()
        flat = row_ids[index].view(-1), out.view(-1, table.width)
        functions.engram_gather(*addresses, *flat, table.width, SCALE_GROUP, **options)
        return out

    return call


def hash_lookup(functions, token_ids, plan: HashPlan, tables):
    """Hash of all layers, then engram_gather for each of them."""
    device, columns = token_ids[0].device, plan.primes.shape[1]
    row_ids = torch.empty(len(tables), len(token_ids[0]), columns, dtype=torch.int64, device=device)
    hash_ids = hash(functions, token_ids, plan)
    out = torch.stack([rows_like(table, ids) for table, ids in zip(tables, row_ids, strict=True)])
    parts = zip(tables, row_ids, out, strict=True)
    gathers = [lookup(functions, table, [ids], rows) for table, ids, rows in parts]

    def call(index):
        row_ids.copy_(hash_ids(index).transpose(0, 1))  # it reads contiguous ids
        for gather in gathers:
            gather(0)
        return out

    return call


def gate(functions, inputs, query_norm: torch.Tensor, key_norm: torch.Tensor, eps: float):
    pairs = [(hidden, whole_kv(key, value)) for hidden, key, value in inputs]
    return lambda index: functions.fused_engram_gate(*pairs[index], query_norm, key_norm, eps, CLAMP)
