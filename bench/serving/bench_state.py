"""State by slot in decode: one token of each of T sequences.

``history`` is what a Prefetcher copies of an EngramState's step, and the commit: two launches. ``conv`` is
gate_conv_residual whose window and new entries lie in slots; its baseline ``dense`` gathers a dense state from slots,
convolves, and puts the new state back, and ``given`` is the convolution of a dense state alone.
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.ops.bench_gate import GateInputs, disagreement, norms
from bench.running.cases import Case, Prepared, Workbench, poison, tensor_bytes
from engram_kernels import EngramState, gate_conv_residual, reference
from engram_kernels.launching.tokens import Tokens
from engram_kernels.ops.conv_kernels.slots import ConvSlots
from engram_kernels.reference.ops import conv_slots
from engram_kernels.reference.ops.sequences import slot_history
from engram_kernels.reference.serving import history
from engram_kernels.serving.inputs import TokenBuffers, copying

SEQUENCES, ALL_SEQUENCES = (64, 256), (16, 64, 256, 1024)
PRIORITY = 30


def cases(full: bool = False) -> Iterator[Case]:
    for place, sequences in enumerate(sorted(ALL_SEQUENCES if full else SEQUENCES, reverse=True)):
        for model, variant, prepare in (("v41", "history", prepare_history), ("27b", "conv", prepare_conv)):
            yield Case("state", model, variant, sequences, PRIORITY + place, partial(prepare, sequences))


def prepare_history(sequences: int, bench: Workbench) -> Prepared:
    state = EngramState(bench.config("v41"), 2 * sequences, bench.device)
    slots, ids = _slots(sequences, bench), bench.token_ids("text", "v41", sequences, 0)[:, None]
    depth = bench.config("v41").max_ngram - 1
    buffers = TokenBuffers(sequences, sequences, depth + 1, bench.device)
    for _ in range(depth):  # then no call changes what the next one finds
        state.begin(ids, slots).commit()
    plain = ids.expand(-1, depth).long().contiguous()

    def call() -> torch.Tensor:
        step = state.begin(ids, slots)
        given = Tokens(ids, **step.options)
        copies = buffers.views(given)
        copying(given, copies)(*given)
        step.commit()
        assert copies.history is not None
        return copies.history

    def eager(_) -> torch.Tensor:
        past = slot_history(table, slots)
        history.commit_history(table, None, slots, ids)
        return past

    table = torch.zeros(2 * sequences, depth, dtype=torch.int64, device=bench.device)
    for _ in range(depth):
        eager(0)
    wrong = "history of some sequences is not that of their tokens"
    return Prepared(
        calls=[call, call],
        check=lambda result, _: None if torch.equal(result, plain) else wrong,
        nbytes=2 * tensor_bytes(slots) + 4 * tensor_bytes(plain) + 2 * tensor_bytes(ids) + 8 * ids.numel(),
        baselines={"eager": lambda: eager},
    )


def prepare_conv(sequences: int, bench: Workbench) -> Prepared:
    config = bench.config("27b")
    span = (config.conv_kernel - 1) * config.conv_dilation
    state = EngramState(config, 2 * sequences, bench.device)
    ring = state.layer_slots(config.layers[0], _slots(sequences, bench))
    ring.value.copy_(bench.randn(*ring.value.shape, seed=7))
    ring.scale.copy_(bench.randn(*ring.scale.shape, seed=8).abs())
    ring.cursor.copy_(torch.arange(len(ring.cursor)) % ring.value.shape[1] + ring.value.shape[1])
    kept = ConvSlots(*(part.clone() for part in ring))
    query_norm, key_norm, conv_norm = norms(bench, "27b", 3)
    weight = bench.randn(config.branches, config.hidden_size, config.conv_kernel, seed=99) * 0.5
    weights = [query_norm, key_norm, conv_norm, weight]
    options = dict(dilation=config.conv_dilation, eps=config.eps, conv_eps=config.conv_eps, zero_gate=config.zero_gate)
    options = dict(options, cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32, device=bench.device))
    inputs = [GateInputs.random(bench, "27b", sequences, index) for index in range(4)]
    out = torch.empty_like(inputs[0].hidden)
    poison(out)
    dense = conv_slots.gather_conv(kept, span)
    home = [part.clone() for part in dense]

    def in_slots(each) -> torch.Tensor:
        result, _ = gate_conv_residual(*each.tensors(), *weights, **options, conv_state=ring, out=out)
        return result

    def gathered(index: int) -> torch.Tensor:
        window = conv_slots.gather_conv(kept, span)
        result, new = gate_conv_residual(*inputs[index].tensors(), *weights, **options, conv_state=window, out=out)
        for part, target in zip(new, home, strict=True):
            target.index_copy_(0, order, part)
        return result

    def given(index: int) -> torch.Tensor:
        result, _ = gate_conv_residual(*inputs[index].tensors(), *weights, **options, conv_state=dense, out=out)
        return result

    order = torch.arange(sequences, device=bench.device)

    def check(result: torch.Tensor, index: int) -> str | None:
        tensors = inputs[index].tensors()
        expected, _ = reference.gate_conv_residual(*tensors, *weights, **options, conv_state=dense)
        reach = torch.maximum(tensors[2].float().abs(), dense[0].float().abs().amax(1))
        return disagreement(result, expected, 4 * reach)

    read = tensor_bytes(*inputs[0].tensors(), inputs[0].hidden, inputs[0].value, *weights, out)
    entry = config.hidden_size * 2 + config.branches * 4
    return Prepared(
        calls=[partial(in_slots, each) for each in inputs],
        check=check,
        # Per sequence the K - 1 entries that its taps read, and the one that is written.
        nbytes=read + sequences * config.conv_kernel * entry,
        baselines={"dense": lambda: gathered, "given": lambda: given},
    )


def _slots(sequences: int, bench: Workbench) -> torch.Tensor:
    """Every other of twice as many slots, in no order."""
    generator = torch.Generator().manual_seed(sequences)
    return (2 * torch.randperm(sequences, generator=generator)).int().to(bench.device)
