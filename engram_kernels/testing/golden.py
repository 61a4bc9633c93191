"""Golden data, computed outside this project; ``data/`` holds it, and nothing here computes it anew.

deepseek_demo            the paper's demo, layers 1 and 15: ids, hashes, tables, weights, hidden states and outputs
                         in float64, from running github.com/deepseek-ai/Engram
deepseek_v41_hash        packed ids of real text with history and dead tokens, and their row ids
deepseek_v4_token_map    raw id -> compressed id of the V4-series tokenizer
qwen_ple_hash            ids, primes, multipliers and row ids of Qwen3.8-Flash-Next, and the same ids under
                         multipliers whose products wrap
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from engram_kernels import EngramConfig, HashPlan

DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of ``data/<name>.npz`` as tensors."""
    with np.load(DATA / f"{name}.npz") as data:
        return {key: torch.from_numpy(value) for key, value in data.items()}


def v41_token_map() -> torch.Tensor:
    """Raw id -> compressed id of the V4-series tokenizer, int32 ``[129,280]``."""
    return golden("deepseek_v4_token_map")["token_map"].int()


@cache
def v41_plan() -> HashPlan:
    """The hash of DeepSeek-V4.1-Flash, both layers."""
    return HashPlan.build(EngramConfig.deepseek_v41_flash(), v41_token_map())


def demo_layer(layer: int) -> dict[str, torch.Tensor]:
    """The demo's layer 1 or 15: its weights by their names, beside ``token_ids`` and ``hidden``."""
    data = golden("deepseek_demo")
    own = {key.split("_", 1)[1]: part for key, part in data.items() if key.startswith(f"layer{layer}_")}
    return own | {key: data[key] for key in ("token_ids", "token_map", "hidden")}


def demo_plan(layer: int) -> HashPlan:
    """The demo's hash of one layer."""
    data = demo_layer(layer)
    primes = torch.cat([data["offsets"], torch.tensor([len(data["table"])])]).diff()
    parts = data["multipliers"][None], primes[None]
    return HashPlan.from_parts(*parts, pad=int(data["token_map"][2]), token_map=data["token_map"])


def demo_kv(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key ``[B, S, H, D]`` and value ``[B, S, D]`` of one layer: its rows through its own weights, float64."""
    data = demo_layer(layer)
    rows = data["table"][data["hash_without_offsets"] + data["offsets"]].flatten(-2)
    key = torch.einsum("bsi,hoi->bsho", rows, data["key_weight"]) + data["key_bias"]
    return key, rows @ data["value_weight"].T + data["value_bias"]


def qwen_wrapping_plan() -> HashPlan:
    """Qwen3.8-Flash-Next's hash with multipliers so large that products wrap and mixes are negative."""
    data = golden("qwen_ple_hash")
    eos = int(data["eos"])
    parts = data["overflow_multipliers"][None], data["primes"].reshape(1, -1)
    return HashPlan.from_parts(*parts, pad=eos, eos=eos, vocab_size=248_320)
