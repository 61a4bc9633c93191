"""The values that rows and weights begin with where no checkpoint gives them.

Rows, projection: normal with mean 0 and standard deviation 0.02; its bias and the convolution: 0; norms: 1. This is
what transformers 5.24 does for Qwen4Exp's n-gram layers (``initializer_range``, and a convolution of zeros). The zeros
are the paper's as well (arXiv 2601.07372), for which a new layer's convolution adds nothing; DeepSeek has not published
how its rows begin.
"""

from collections.abc import Callable

import torch
from torch import nn

from engram_kernels.checkpoints.encoding import encode_rows, table_scale
from engram_kernels.checkpoints.parallel import CHUNK, Progress, run_chunks, spans
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import (
    AnyOf,
    Device,
    Function,
    Instance,
    Integers,
    Number,
    OneOf,
    Optional,
    Text,
    Whole,
)
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.geometry.token_map import TOKENIZER, build_token_map
from engram_kernels.reference.training.update import random_bits
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.placement import PLACEMENTS

STD = 0.02
#: What :meth:`Engram.build` takes, of what is decided here.
NEW_KINDS = dict(
    config=Instance(EngramConfig),
    layer=Whole(0),
    tokenizer=Optional(AnyOf(TOKENIZER, Integers(1))),
    placement=OneOf(*PLACEMENTS),
    name=Optional(Text()),
    init=AnyOf(Number(0), Function()),
    seed=Whole(0),
    device=Optional(Device()),
    progress=Optional(Function()),
)
#: Standard deviations that the one scale of format "e4m3" has room for: one value in 10^15 is beyond.
_SIGMAS = 8


def new_rows(
    config: EngramConfig, layer: int, tokenizer, placement: str, name: str | None, device, init: float | Callable
) -> tuple[EngramTable, HashPlan]:
    """(empty table of a layer, plan of the config); arguments are those of :meth:`Engram.build`."""
    if layer not in config.layers:
        raise ValueError(f"Engram.build: layer must be one of the config's, {config.layers}, got {layer}")
    known = tokenizer is None or isinstance(tokenizer, torch.Tensor)
    plan = HashPlan.build(config, tokenizer if known else build_token_map(tokenizer))
    rows, options = plan.rows_per_layer[config.layers.index(layer)], dict(name=name)
    if placement == "device":
        options["device"] = device
    if FORMATS[config.format].table_scale and not callable(init) and init > 0:
        options["scale"] = table_scale(_SIGMAS * init, FORMATS[config.format])
    return EngramTable.empty(rows, config.row_width, config.format, placement=placement, **options), plan


def fill_rows(table: EngramTable, std: float, seed: int, progress: Progress | None = None) -> None:
    """Normal rows, the same for one ``seed`` whatever the placement: a chunk of them has a generator of its own."""
    weight, scale, fmt = table.weight, table.scale, table.format
    rows = CHUNK // (4 * table.width)
    first = int(random_bits(torch.tensor(seed), torch.tensor(0)))

    def fill(chunk: tuple[int, int]) -> int:
        begin, end = chunk
        # torch's generator on a CPU takes 32 bits of a seed: numbers one after the other never meet within a table.
        generator = torch.Generator().manual_seed((first + begin // rows) % 2**32)
        values = torch.empty(end - begin, table.width).normal_(0, std, generator=generator)
        stored, scales = encode_rows(values, fmt, "Engram.build", scale=table.own_scale)
        weight[begin:end].copy_(stored)
        if scales is not None:
            scale[begin:end].copy_(scales)
        return (end - begin) * (table.nbytes // table.rows)

    run_chunks(spans(table.rows, rows), fill, progress=progress, total=table.nbytes)
    table.rows_changed()


@torch.no_grad()
def fill_weights(projection: nn.Linear, std: float, seed: int) -> None:
    """A normal projection without bias, the same for one ``seed`` on every device; all else stays as it is made."""
    generator = torch.Generator().manual_seed(seed)
    projection.weight.copy_(torch.empty(projection.weight.shape).normal_(0, std, generator=generator))
    if projection.bias is not None:
        projection.bias.zero_()
