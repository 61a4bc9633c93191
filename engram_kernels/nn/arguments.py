"""What an Engram module takes: the kinds of its methods' arguments, and how shapes, plan and table have to fit."""

import torch

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import Instance, Optional, Tensor
from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.tokens import ID_DTYPES
from engram_kernels.ops.gate_kernels.arguments import FLOAT_DTYPES
from engram_kernels.ranks.sharded import ShardedTable
from engram_kernels.serving.state import EngramStep
from engram_kernels.tables.engram import EngramTable

_TOKENS = dict(
    cu_seqlens=Optional(Tensor(torch.int32)),
    history=Optional(Tensor(*ID_DTYPES)),
    dead=Optional(Tensor(torch.bool)),
    slots=Optional(Tensor(torch.int32)),
)
ROWS_KINDS = dict(token_ids=Tensor(*ID_DTYPES), **_TOKENS)
PROJECT_KINDS = dict(rows=Tensor(*FLOAT_DTYPES), out=Optional(Tensor(*FLOAT_DTYPES)))
FORWARD_KINDS = dict(
    hidden=Tensor(*FLOAT_DTYPES),
    token_ids=Optional(Tensor(*ID_DTYPES)),
    rows=Optional(Tensor(*FLOAT_DTYPES)),
    kv=Optional(Tensor(*FLOAT_DTYPES)),
    **_TOKENS,
    conv_state=Optional(Instance(tuple)),
    state=Optional(Instance(EngramStep)),
)


def check_row_shape(where: str, config: EngramConfig, rows: torch.Tensor) -> None:
    """Raise ValueError unless these are rows of the config's columns."""
    if tuple(rows.shape[-2:]) != (config.columns, config.row_width):
        expected = f"C = {config.columns} and R = {config.row_width}"
        raise ValueError(f"{where}: rows must have shape [..., C, R], {expected}, got {list(rows.shape)}")


def check_hidden(where: str, config: EngramConfig, hidden: torch.Tensor, tokens: tuple[int, ...]) -> None:
    """Raise ValueError unless ``hidden`` has these tokens, ``(T,)`` or ``(B, S)``, and the config's sizes."""
    branches, hidden_size = config.branches, config.hidden_size
    if tuple(hidden.shape) != (*tokens, branches, hidden_size):
        bare = branches == 1 and tuple(hidden.shape) == (*tokens, hidden_size)
        raise ValueError(
            f"{where}: hidden must have shape [T, H, D] or [B, S, H, D], got {list(hidden.shape)}; for these "
            f"tokens, H = {branches} and D = {hidden_size} that is {[*tokens, branches, hidden_size]}"
            + ("; hidden.unsqueeze(-2) has it" if bare else "")
        )


def check_rows_of_layer(config: EngramConfig, layer: int, plan: HashPlan, table: EngramTable | ShardedTable) -> None:
    """Raise ValueError where the plan or the table is another layer's: they would fit, and mean other n-grams.

    A plan of a model's own primes, which are not the config's, knows by itself how many rows there are.
    """
    primes = tuple(plan.primes[0].tolist())
    number = dict(zip(config.primes, config.layers, strict=True)).get(primes)
    if number not in (layer, None):
        raise ValueError(f"Engram: plan must be of layer {layer}, got that of layer {number}")
    if isinstance(table, ShardedTable) and table.layer != layer:
        raise ValueError(f"Engram: table must be of layer {layer}, got that of layer {table.layer}")
    rows = plan.rows_per_layer[0] if number is None else config.rows_per_layer[config.layers.index(layer)]
    if table.rows != rows:
        raise ValueError(f"Engram: table must have the {rows:,} rows of layer {layer}, got {table.rows:,}")
    if table.token_map not in (None, plan.token_map_digest):
        raise ValueError(
            f"Engram: table was made with token map {table.token_map[:12]}, and the plan has "
            f"{(plan.token_map_digest or 'none')[:12]}: is its tokenizer of another revision?"
        )
