"""Kernels for Engram, the conditional memory of DeepSeek (arXiv 2601.07372)."""

from .cache.ngram import NgramCache
from .geometry.config import EngramConfig
from .geometry.plan import HashPlan
from .geometry.token_map import build_token_map
from .launching.dependent import set_dependent_launch
from .nn.engram import Engram
from .nn.replacement import export_state, replace_engram
from .nn.training import load_training, save_training
from .nn.warmup import warmup
from .ops.gate import gate_residual
from .ops.gate_conv import gate_conv_residual
from .ops.gate_kernels.gradients import split_kv
from .ops.hash_rows import hash_lookup
from .ops.hashing import ngram_hash
from .ops.rows import lookup
from .ranks.sharded import ShardedTable
from .serving.prefetch import Prefetcher
from .serving.state import EngramState
from .tables.engram import EngramTable
from .training.optimizers import RowAdagrad, RowAdam, RowSinkhorn

#: The version, in one place: pyproject.toml reads it from the text of this file, and so without torch.
__version__ = "0.1.0"

__all__ = [
    "Engram",
    "EngramConfig",
    "EngramState",
    "EngramTable",
    "HashPlan",
    "NgramCache",
    "Prefetcher",
    "RowAdagrad",
    "RowAdam",
    "RowSinkhorn",
    "ShardedTable",
    "build_token_map",
    "export_state",
    "gate_conv_residual",
    "gate_residual",
    "hash_lookup",
    "load_training",
    "lookup",
    "ngram_hash",
    "replace_engram",
    "save_training",
    "set_dependent_launch",
    "split_kv",
    "warmup",
]
