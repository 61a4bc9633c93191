"""A user's program, which type checkers read in their strictest mode: a line is an error where it says so."""

from typing import assert_type

import torch
from torch import Tensor, nn

import engram_kernels
from engram_kernels import Engram, EngramConfig, EngramTable, HashPlan, Prefetcher, RowAdam, ShardedTable

config = EngramConfig.qwen38_flash_next()
engram_kernels.look_up(config)  # error
EngramConfig.qwen_flash()  # error


def sizes(window: str) -> EngramConfig:
    shape = EngramConfig((1,), 3, 8, 32, (100, 100), 64, 4, 1000, format="bfloat16", zero_gate="sign")
    EngramConfig((1,), 3, 8, 32, (100, 100), 64, 4, 1000, format="float8")  # error
    EngramConfig((1,), 3, 8, 32, (100, 100), 64, 4, 1000, zero_gate="positive")  # error
    EngramConfig((1,), 3, 8, 32, (100, 100), 64, 4, 1000, window=window)  # error
    return shape


def layer(hidden: Tensor, token_ids: Tensor, table: EngramTable) -> Tensor:
    plan = HashPlan.build(config, torch.arange(1000))
    module = Engram(config, 1, plan, table)
    Engram.build(config, 1, placement="host")
    Engram.build(config, 1, placement="gpu")  # error
    assert_type(module(hidden, token_ids), Tensor)
    assert_type(module(hidden, rows=module.rows(token_ids)), Tensor)
    out, (value, scale) = module(hidden, token_ids, conv_state=module.new_conv_state(1))
    assert_type(scale, Tensor)
    module(hidden, token_ids, conv_state=True)  # error
    return engram_kernels.gate_residual(out, out, value, scale, scale, eps=None)


def serve(plan: HashPlan, table: EngramTable, model: nn.Module, group: ShardedTable) -> None:
    Prefetcher(plan, [table], 8, order="address", out_format="storage")
    Prefetcher(plan, [table], 8, order="sorted")  # error
    Prefetcher(plan, [table], out_format="values")  # error
    RowAdam([table], lr=1e-3, reduce="mean", state_placement=None)
    RowAdam([table], reduce="average")  # error
    engram_kernels.replace_engram(model, placement="staged").undo()
    engram_kernels.replace_engram(model, placement="disk")  # error
    assert_type(engram_kernels.ngram_hash(torch.arange(4), plan), Tensor)
    assert_type(group.lookup(torch.arange(4)), Tensor)
    rows, scales = group.lookup(torch.arange(4), out_format="storage")
    group.lookup(torch.arange(4), out_format="bytes")  # error
