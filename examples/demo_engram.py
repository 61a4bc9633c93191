"""A stand-in for the module of the demo published with arXiv 2601.07372, written for these examples.

Same attributes and the same call, ``engram(hidden_states=, input_ids=)``; its block adds what it returns. Hashing runs
in numpy on the CPU, rows come from an ``nn.Embedding``: the slow way that the kernels replace.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn


class HashMapping:
    """Row ids before offsets, ``{layer: [B, S, C]}``, from raw ids."""

    def __init__(self, layers, token_map, pad_id, primes, seed):
        self.compressed_tokenizer = SimpleNamespace(lookup_table=np.asarray(token_map))
        self.pad_id = int(token_map[pad_id])  # compressed already
        bound = (2**63 - 1) // (int(max(token_map)) + 1) // 2
        self.vocab_size_across_layers = {layer: primes[i] for i, layer in enumerate(layers)}
        self.layer_multipliers = {
            layer: np.random.default_rng(seed + 10007 * layer).integers(0, bound, len(primes[0]) + 1) * 2 + 1
            for layer in layers
        }

    def hash(self, input_ids):
        ids = self.compressed_tokenizer.lookup_table[np.asarray(input_ids)].astype(np.int64)
        result = {}
        for layer, multipliers in self.layer_multipliers.items():
            shifted = [np.pad(ids, ((0, 0), (k, 0)), constant_values=self.pad_id)[:, : ids.shape[1]] for k in range(9)]
            mix, columns = shifted[0] * multipliers[0], []
            for order, sizes in enumerate(self.vocab_size_across_layers[layer], start=1):
                mix = mix ^ (shifted[order] * multipliers[order])
                columns += [mix % size for size in sizes]
            result[layer] = np.stack(columns, -1)
        return result


class MultiHeadEmbedding(nn.Module):
    def __init__(self, sizes, width):
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, *np.cumsum(sizes)[:-1]]))
        self.embedding = nn.Embedding(sum(sizes), width)

    def forward(self, ids):
        return self.embedding(ids + self.offsets)


class ShortConv(nn.Module):
    def __init__(self, width, kernel_size, dilation, branches):
        super().__init__()
        channels = width * branches
        padding = (kernel_size - 1) * dilation
        self.conv = nn.Conv1d(
            channels, channels, kernel_size, groups=channels, bias=False, padding=padding, dilation=dilation
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(branches))

    def forward(self, x):  # [B, S, H, D]
        normed = torch.cat([norm(x[:, :, h]) for h, norm in enumerate(self.norms)], -1)
        out = self.conv(normed.transpose(1, 2))[..., : x.shape[1]]
        return nn.functional.silu(out).transpose(1, 2).view(x.shape)


class Engram(nn.Module):
    """One layer: ``value + short_conv(value)``, gated, ``[B, S, H, D]``."""

    def __init__(self, layer_id, hash_mapping, row_width, hidden_size, branches, kernel_size=4):
        super().__init__()
        self.layer_id, self.hash_mapping = layer_id, hash_mapping
        sizes = [size for order in hash_mapping.vocab_size_across_layers[layer_id] for size in order]
        self.multi_head_embedding = MultiHeadEmbedding(sizes, row_width)
        width = len(sizes) * row_width
        self.value_proj = nn.Linear(width, hidden_size)
        self.key_projs = nn.ModuleList(nn.Linear(width, hidden_size) for _ in range(branches))
        self.norm1 = nn.ModuleList(nn.RMSNorm(hidden_size) for _ in range(branches))
        self.norm2 = nn.ModuleList(nn.RMSNorm(hidden_size) for _ in range(branches))
        max_ngram = len(hash_mapping.vocab_size_across_layers[layer_id]) + 1
        self.short_conv = ShortConv(hidden_size, kernel_size, max_ngram, branches)

    def forward(self, hidden_states, input_ids):
        ids = torch.from_numpy(self.hash_mapping.hash(input_ids.cpu())[self.layer_id]).to(hidden_states.device)
        rows = self.multi_head_embedding(ids).flatten(-2)
        gates = []
        for h, project in enumerate(self.key_projs):
            key, query = self.norm1[h](project(rows)), self.norm2[h](hidden_states[:, :, h])
            d = (key * query).sum(-1) / hidden_states.shape[-1] ** 0.5
            gates.append((d.abs().clamp_min(1e-6).sqrt() * d.sign()).sigmoid())
        value = torch.stack(gates, -1)[..., None] * self.value_proj(rows)[:, :, None]
        return value + self.short_conv(value)


class Model(nn.Module):
    """Blocks that add an Engram module's output to a residual stream of several branches, around a linear layer."""

    def __init__(self, layers=(1, 3), vocabulary=500, row_width=8, hidden_size=64, branches=4, seed=0):
        super().__init__()
        generator = np.random.default_rng(seed)
        token_map = np.unique(generator.integers(0, 390, vocabulary), return_inverse=True)[1]
        primes = [[[211, 223, 227, 229], [307, 311, 313, 317]], [[233, 239, 241, 251], [331, 337, 347, 349]]]
        mapping = HashMapping(layers, token_map, 2, primes, seed)
        self.embed = nn.Embedding(vocabulary, hidden_size)
        self.branches = branches
        self.engrams = nn.ModuleDict(
            {str(layer): Engram(layer, mapping, row_width, hidden_size, branches) for layer in layers}
        )
        self.mixers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(max(layers) + 1))

    def forward(self, input_ids):
        hidden = self.embed(input_ids)[:, :, None].repeat(1, 1, self.branches, 1)
        for layer, mixer in enumerate(self.mixers):
            if str(layer) in self.engrams:
                hidden = hidden + self.engrams[str(layer)](hidden_states=hidden, input_ids=input_ids)
            hidden = hidden + mixer(hidden).tanh()
        return hidden
