"""Engram's three steps on a small model: n-grams to rows, rows to key and value, and the gate into the residual stream.

Runs anywhere: with a GPU the kernels read the tables from pinned host memory, without one the PyTorch reference does.
"""

import torch

from engram_kernels import EngramConfig, EngramTable, HashPlan, gate_residual, hash_lookup, split_kv

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = EngramConfig(
    layers=(1, 3),  # the model's layers that have an Engram module
    max_ngram=3,
    heads=4,
    row_width=32,
    table_sizes=(5_000, 5_000),  # bigrams, trigrams; each head gets the next prime
    hidden_size=256,
    branches=4,
    raw_vocab_size=1_000,
    eps=1e-6,
)
# Which token ids count as one: build_token_map(tokenizer) knows that of a real vocabulary. Here each stands for itself.
token_map = torch.arange(config.raw_vocab_size, dtype=torch.int32)
plan = HashPlan.build(config, token_map).to(device)

# One table per layer, here random; a trained model's rows come from its checkpoint.
weights = [torch.randn(rows, config.row_width, dtype=torch.bfloat16) for rows in plan.rows_per_layer]
tables = [EngramTable.from_tensors(w, placement="host" if device.type == "cuda" else "cpu") for w in weights]
for table in tables:
    print(table)

tokens = torch.randint(0, config.raw_vocab_size, (6,), device=device)
rows = hash_lookup(tokens, plan, tables)  # for all layers at once, before the model's first layer needs them
print("rows  ", list(rows.shape), "= layers, tokens, columns, row width")

# The projection of layer 1: key of every branch, then the value, in one matrix product.
D, H = config.hidden_size, config.branches
wkv = torch.randn((H + 1) * D, config.columns * config.row_width, dtype=torch.bfloat16, device=device) / 16
kv = rows[0].flatten(1) @ wkv.T
key, value = split_kv(kv, H, D)  # views

hidden = torch.randn(len(tokens), H, D, dtype=torch.bfloat16, device=device)
norm = torch.ones(H, D, device=device)  # a trained model has one for queries and one for keys
hidden = gate_residual(hidden, key, value, norm, norm, eps=config.eps)
print("hidden", list(hidden.shape), "= tokens, branches, hidden size")
