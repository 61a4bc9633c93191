"""A user's training of one Engram layer: dense weights by torch, rows by their own optimizer, both saved and loaded."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from engram_kernels import Engram, EngramConfig, EngramTable, RowAdam, load_training, save_training


class Model(nn.Module):
    def __init__(self, config: EngramConfig, token_map: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.raw_vocab_size, config.hidden_size)
        self.engram = Engram.build(config, config.layers[0], token_map, placement="host", trainable=True)
        self.head = nn.Linear(config.hidden_size, config.raw_vocab_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        hidden = self.engram(self.embedding(token_ids).unsqueeze(-2), token_ids)
        logits: Tensor = self.head(hidden.mean(-2))
        return logits


def train(model: Model, batches: Iterator[Tensor], folder: Path) -> EngramTable:
    table = model.engram.table
    assert isinstance(table, EngramTable)
    dense = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = RowAdam(table, lr=1e-3, betas=(0.9, 0.99), state_placement="device")
    first, _ = load_training(folder, model, [rows], [dense]) if folder.exists() else (0, None)
    for step, token_ids in enumerate(batches, start=first):
        logits = model(token_ids)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        dense.zero_grad()
        rows.zero_grad()
        torch.autograd.backward(loss)  # torch declares no types for loss.backward()
        dense.step()
        rows.step()
        if step % 1000 == 0:
            save_training(folder, model, [rows], [dense], step=step + 1)
    return table
