"""A user's decoder around two Engram layers, in a step of drafts: rows ahead of the layers, history by slot."""

import torch
from prometheus_client import REGISTRY
from torch import Tensor

from engram_kernels import (
    Engram,
    EngramConfig,
    EngramState,
    EngramTable,
    HashPlan,
    MetricsCollector,
    NgramCache,
    Prefetcher,
    warmup,
)


class Decoder:
    def __init__(self, config: EngramConfig, files: str, token_map: Tensor, slots: int, device: torch.device) -> None:
        self.plan = HashPlan.build(config, token_map).to(device)
        placed = [EngramTable.from_safetensors(files, placement="host", layer=layer) for layer in config.layers]
        self.tables = dict(zip(config.layers, placed, strict=True))
        self.engrams = {layer: Engram(config, layer, self.plan, table) for layer, table in self.tables.items()}
        for module in self.engrams.values():
            module.load_checkpoint(files)
        self.cache = NgramCache(self.plan, placed, bytes=1 << 30)
        self.state = EngramState(config, slots, device)
        self.prefetcher = Prefetcher(self.plan, placed, 512, layers=config.layers, cache=self.cache)
        warmup(list(self.engrams.values()), 512, prefetcher=self.prefetcher, state=self.state)
        REGISTRY.register(MetricsCollector({"tables": self.tables, "prefetcher": self.prefetcher}))

    def step(self, hidden: Tensor, token_ids: Tensor, slots: Tensor, ends: Tensor, accepted: Tensor) -> Tensor:
        step = self.state.begin(token_ids, slots, cu_seqlens=ends)
        self.prefetcher.start(token_ids, **step.options)
        for layer, engram in self.engrams.items():
            hidden = engram(hidden, rows=self.prefetcher.rows(layer), state=step)
        step.commit(accepted)
        return hidden

    def hit_rate(self) -> float:
        counts = self.cache.metrics()
        return counts["hits"] / max(1, counts["asked"])
