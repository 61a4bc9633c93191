"""Engram under tensor parallelism: each rank looks up its own columns, as fp8, for its part of the projection.

The projection sums over all columns of a token, so a rank that holds the columns' part of its weight needs their rows
alone, a 1/ranks of what comes over the link. Rows stay in the table's fp8 (``out_format="storage"``), half the bytes of
bfloat16, and torch._scaled_mm multiplies them as they are; on a GPU that takes sm_89 or later. Here the ranks take
turns in one process; with torch.distributed the sum is an all-reduce.
"""

import torch

from engram_kernels import EngramConfig, EngramTable, HashPlan, hash_lookup

RANKS, TOKENS = 4, 48
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = EngramConfig(
    layers=(1, 3),
    max_ngram=3,
    heads=8,
    row_width=64,
    table_sizes=(5_000, 5_000),
    hidden_size=128,
    branches=2,
    raw_vocab_size=1_000,
    format="e4m3",
    eps=1e-6,
)
torch.manual_seed(0)
plan = HashPlan.build(config, torch.arange(config.raw_vocab_size, dtype=torch.int32)).to(device)
weights = [torch.randn(rows, config.row_width).to(torch.float8_e4m3fn) for rows in plan.rows_per_layer]
on_gpu = device.type == "cuda"
tables = [EngramTable.from_tensors(w, 0.125, placement="host" if on_gpu else "cpu") for w in weights]
tokens = torch.randint(0, config.raw_vocab_size, (TOKENS,), device=device)
outputs = (config.branches + 1) * config.hidden_size
wkv = torch.randn(outputs, config.columns * config.row_width, device=device).to(torch.float8_e4m3fn)
wkv_scale = torch.tensor(0.03125, device=device)

whole = hash_lookup(tokens, plan, tables)  # values, of all columns
kv, same = torch.zeros(TOKENS, outputs, device=device), True
for rank in range(RANKS):
    columns = list(range(rank, config.columns, RANKS))  # strided, so that each rank has n-grams of every order
    mine = plan.select(columns=columns)
    rows, scales = hash_lookup(tokens, mine, tables, out_format="storage")  # e4m3 [L, T, C / ranks, R], scale [L]
    same &= torch.equal((rows.float() * scales.view(-1, 1, 1, 1).to(device)).to(whole.dtype), whole[:, :, columns])
    weight = wkv.view(torch.uint8).unflatten(1, (config.columns, -1))[:, columns].flatten(1).view(wkv.dtype)
    left, scale = rows[0].flatten(1), scales[0].to(device)
    kv += torch._scaled_mm(left, weight.T, scale_a=scale, scale_b=wkv_scale, out_dtype=torch.float32)

exact = whole[0].flatten(1).double() @ (wkv.double() * wkv_scale.double()).T
error = float((kv - exact).abs().max() / exact.abs().max())
print(f"{RANKS} ranks of {config.columns // RANKS} columns: rows {'equal' if same else 'DIFFER FROM'} the whole's")
print(f"layer 1's key and value from fp8 rows: largest error {error:.1e} of the largest value")
