"""Kernels compiled before the first request: Triton compiles a variant when it is first launched, in seconds.

A variant depends on the model, on which arguments are given, and in steps on the number of tokens: tiles of the hash
and of the convolution, rows hashed at once, the read order, and whether each layer is looked up by a launch of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engram_kernels.geometry.kinds import Dtype, Flag, Instance, Many, Optional, Whole, takes
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.ops.conv_kernels.residual import conv_config
from engram_kernels.ops.hash_kernels.row_ids import hash_config
from engram_kernels.ops.row_kernels.hashed import hash_rows_config
from engram_kernels.ops.row_kernels.order import choose_order
from engram_kernels.serving.prefetch import Prefetcher
from engram_kernels.serving.state import EngramState
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.view import view_tables

from .engram import Engram


def variant_lengths(engrams: Sequence[Engram], max_tokens: int, prefetcher: Prefetcher[Any] | None) -> list[int]:
    """Numbers of tokens that take every variant between 1 and ``max_tokens``, which is the last."""
    config, table = engrams[0].config, engrams[0].table

    def variant(tokens: int) -> tuple:
        if prefetcher is None:
            view = view_tables((table,), engrams[0].wkv.weight.device)
            num_rows = tokens * config.columns
            lookup = choose_order(None, view, num_rows), hash_rows_config(view, num_rows, None)[1]
        else:
            lookup = prefetcher.launches(tokens)
        conv = conv_config(tokens, config.hidden_size, config.branches) if config.conv_kernel else None
        heads = config.columns // (config.max_ngram - 1)
        return lookup, conv, hash_config(tokens, heads, len(config.layers))

    first = {}
    for tokens in range(1, max_tokens + 1):
        first.setdefault(variant(tokens), tokens)
    return sorted({*first.values(), max_tokens})


@takes(
    engrams=Many(),
    max_tokens=Whole(1),
    prefetcher=Optional(Instance(Prefetcher)),
    state=Optional(Instance(EngramState)),
    dead=Flag(),
    id_dtype=Dtype(torch.int32, torch.int64),
)
def warmup(
    engrams: Sequence[Engram],
    max_tokens: int,
    *,
    prefetcher: Prefetcher[Any] | None = None,
    state: EngramState | None = None,
    dead: bool = False,
    id_dtype: torch.dtype = torch.int64,
) -> None:
    """Compile every kernel variant that steps of 1 to ``max_tokens`` packed tokens launch, by launching each once.

    engrams: the model's modules, of one config, where they will run.
    prefetcher: the one that will look rows up, and project them where it has projections; None is forward passes from
    token ids.
    state: the one whose steps they will take, commits of both kinds, reset and restore included; its slots are neither
    read nor written.
    dead: whether steps come with dead tokens; False compiles for those without. id_dtype: of token ids.

    All tokens are padding: no table is read. Call it before memory is measured or a graph captured: the longest step
    has then been made once, and afterwards nothing is compiled and no memory asked of the driver. On a CPU nothing
    is to be done. ValueError where modules, prefetcher and state do not fit each other.
    """
    where = "warmup"
    engrams = tuple(engrams)
    if not engrams or not all(isinstance(engram, Engram) for engram in engrams):
        raise TypeError(f"{where}: engrams must be Engram modules, got {[type(x).__name__ for x in engrams]}")
    if prefetcher is not None and max_tokens > prefetcher.max_tokens:
        raise ValueError(f"{where}: max_tokens must be at most prefetcher's {prefetcher.max_tokens}, got {max_tokens}")
    if prefetcher is None and not isinstance(engrams[0].table, EngramTable):
        kind = type(engrams[0].table).__name__
        raise TypeError(f"{where}: engrams must have an EngramTable where there is no prefetcher, got {kind}")
    weight = engrams[0].wkv.weight
    if not is_kernel_device(weight) or weight.dtype == torch.float64:
        return
    with torch.no_grad():
        for tokens in variant_lengths(engrams, max_tokens, prefetcher):
            _step(engrams, tokens, prefetcher, state, dead, id_dtype)
        if state is not None:
            slots = torch.full((1,), -1, dtype=torch.int32, device=weight.device)
            state.reset(slots)
            states = state.conv_states(slots) or None
            ids = torch.zeros(1, dtype=id_dtype, device=weight.device)
            state.restore(slots, ids, conv_states=states)


def _step(engrams, tokens: int, prefetcher, state, dead: bool, id_dtype: torch.dtype) -> None:
    """One step of ``tokens`` tokens, all of them padding."""
    weight, config = engrams[0].wkv.weight, engrams[0].config
    ids = torch.zeros(tokens, dtype=id_dtype, device=weight.device)
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device=weight.device)
    options = dict(cu_seqlens=cu_seqlens, dead=ids != 0 if dead else None)
    hidden = weight.new_zeros(tokens, config.branches, config.hidden_size)
    step = None
    if state is not None:
        slots = torch.full((1,), -1, dtype=torch.int32, device=weight.device)
        step = state.begin(ids, slots, **options)
        options = step.options
    if prefetcher is not None:
        prefetcher.start(ids, **options)
        kind = "kv" if prefetcher.projects else "rows"
    for engram in engrams:
        inputs = {}
        if prefetcher is not None:
            inputs = {kind: getattr(prefetcher, kind)(engram.layer)}
        if step is not None:
            engram(hidden, **inputs, state=step)
        elif inputs:
            engram(hidden, **inputs, **dict(options, history=None))
        else:
            engram(hidden, ids, **options)
    if prefetcher is not None:
        prefetcher.release()
    if step is not None:
        step.commit()
        state.begin(ids, slots, cu_seqlens=cu_seqlens, dead=options["dead"]).commit(torch.zeros_like(slots))
