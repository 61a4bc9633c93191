"""A user's program, which type checkers read in their strictest mode: a line is an error where it says so."""

from typing import Literal, assert_type

import torch
from torch import Tensor, nn

import engram_kernels
from engram_kernels import (
    Engram,
    EngramConfig,
    EngramState,
    EngramTable,
    HashPlan,
    NgramCache,
    Prefetcher,
    RowAdam,
    RowSinkhorn,
    ShardedTable,
    build_token_map,
    gate_conv_residual,
    gate_residual,
    hash_lookup,
    lookup,
)

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
    module.rows([1, 2, 3])  # error
    out, (value, scale) = module(hidden, token_ids, conv_state=module.new_conv_state(1))
    assert_type(scale, Tensor)
    module(hidden, token_ids, conv_state=True)  # error
    return engram_kernels.gate_residual(out, out, value, scale, scale, eps=None)


def tables(weight: Tensor, path: str, asked: str) -> list[EngramTable]:
    EngramTable.empty(9, 32, "float16", placement="cpu").save_changes(path, 0, format="e4m3", scale=0.5)
    EngramTable.empty(9, 32, "float8", placement="cpu")  # error
    EngramTable.empty(9, 32, "float16", placement="cuda")  # error
    EngramTable.empty(9, 32, "mxfp4", placement="host", scales="device")
    EngramTable.empty(9, 32, "mxfp4", placement="host", scales="host")  # error
    EngramTable.from_tensors(weight, placement=asked)  # error
    EngramTable.attach("rows", 9, 32, "bf16")  # error
    EngramTable.from_tensors(weight, placement="cpu").save_changes(path, 0, format="fp8")  # error
    found = EngramTable.from_safetensors(path, placement="cpu" if asked == "here" else "staged", mapped=True)
    EngramTable.from_safetensors(path, placement="mapped")  # error
    assert_type(found.requires_row_grad_(), EngramTable)
    return [found]


def rows(table: EngramTable, ids: Tensor, plan: HashPlan, out_format: Literal["values", "storage"], text: str) -> None:
    assert_type(lookup(table, ids), Tensor)
    assert_type(lookup(table, ids, out=ids, out_dtype=torch.float16, order="head"), Tensor)
    assert_type(lookup(table, ids, out_format="storage", order=None), tuple[Tensor, Tensor | None])
    assert_type(lookup(table, ids, out_format=out_format), Tensor | tuple[Tensor, Tensor | None])
    lookup(table, ids, out_format=text)  # error
    lookup(table, ids, order="sorted")  # error
    lookup(table, ids, out_format="storage", out_dtype=torch.float16)  # error
    lookup(table, ids, out_format="storage", out=ids)  # error
    cache = NgramCache(plan, [table], entries=64, ways=4)
    NgramCache(plan, [table], entries=64, ways=3)  # error
    assert_type(hash_lookup(ids, plan, [table], cache=cache, history=ids), Tensor)
    stored = hash_lookup(ids, plan, [table], out_format="storage", programs=8)
    assert_type(stored, tuple[Tensor, Tensor | None])
    assert_type(hash_lookup(ids, plan, (table,), out_format="storage", out=stored), tuple[Tensor, Tensor | None])
    assert_type(hash_lookup(ids, plan, (table,), out_format=out_format), Tensor | tuple[Tensor, Tensor | None])
    hash_lookup(ids, plan, table)  # error
    hash_lookup(ids, plan, [table], order="column")  # error
    hash_lookup(ids, plan, [table], out_format="bytes")  # error
    stored[1].float()  # error


def gates(x: Tensor, state: tuple[Tensor, Tensor] | None, ring: EngramState, slots: Tensor) -> Tensor:
    gate_residual(x, x, x, x, x, eps=1e-6, zero_gate="signed")  # error
    assert_type(gate_conv_residual(x, x, x, x, x, x, x, dilation=3, eps=None, conv_eps=None), Tensor)
    out, (value, scale) = gate_conv_residual(x, x, x, x, x, x, x, dilation=3, eps=0, conv_eps=0, conv_state=(x, x))
    assert_type(value, Tensor)
    mine = ring.layer_slots(1, slots)
    assert mine is not None
    out, mine = gate_conv_residual(x, x, x, x, x, x, x, dilation=3, eps=0, conv_eps=0, conv_state=mine)
    either = gate_conv_residual(x, x, x, x, x, x, x, dilation=3, eps=0, conv_eps=0, conv_state=state)
    assert_type(either, Tensor | tuple[Tensor, tuple[Tensor, Tensor]])
    gate_conv_residual(x, x, x, x, x, x, x, dilation=3, eps=0, conv_eps=0, conv_state=x)  # error
    gate_conv_residual(x, x, x, x, x, x, x, dilation=3, eps=0, conv_eps=0, zero_gate="one")  # error
    return either  # error


def serve(plan: HashPlan, table: EngramTable, model: nn.Module, group: ShardedTable, module: Engram) -> None:
    ahead = Prefetcher(
        plan, [table], 8, order="address", layers=config.layers, projections=[module.project], kv_width=9
    )
    assert_type(ahead, Prefetcher[Tensor])
    assert_type(ahead.start(torch.arange(4)).rows(1), Tensor)
    assert_type(ahead.rows("layer"), Tensor)
    assert_type(Prefetcher(plan, [group, group], 8).rows(0), Tensor)
    stored = Prefetcher(plan, [table], 8, out_format="storage")
    assert_type(stored.rows(0), tuple[Tensor, Tensor | None])
    assert_type(stored.start(torch.arange(4)).rows(0), tuple[Tensor, Tensor | None])
    module(torch.ones(4), rows=stored.rows(0))  # error
    engram_kernels.warmup([module], 8, prefetcher=stored)
    Prefetcher(plan, [table], 8, order="sorted")  # error
    Prefetcher(plan, [table], out_format="values")  # error
    Prefetcher(plan, [table], 8, out_format="storage", out_dtype=torch.float16)  # error
    Prefetcher(plan, [table], 8, out_format="storage", projections=[module.project], kv_width=9)  # error
    engram_kernels.replace_engram(model, placement="staged").undo()
    engram_kernels.replace_engram(model, placement="disk")  # error
    assert_type(engram_kernels.ngram_hash(torch.arange(4), plan), Tensor)
    assert_type(group.lookup(torch.arange(4)), Tensor)
    rows, scales = group.lookup(torch.arange(4), out_format="storage")
    group.lookup(torch.arange(4), out_format="bytes")  # error


def train(table: EngramTable, tokenizer: object) -> float:
    assert_type(build_token_map(tokenizer), Tensor)
    optimizer = RowAdam([table], lr=1e-3, reduce="mean", state_placement="host")
    RowAdam([table], reduce="average")  # error
    RowAdam([table], state_placement="staged")  # error
    RowSinkhorn([table], reduce="mean")  # error
    assert_type(optimizer.step(lambda: 0.5), float)
    ShardedTable(config, 1, placement="host", split="rows", reduce="sum")
    ShardedTable(config, 1, placement="host", split="heads")  # error
    return optimizer.step()  # error
