"""Kernels for Engram, the conditional memory of DeepSeek (arXiv 2601.07372)."""

from .config import EngramConfig
from .gate import gate_residual
from .gate_conv import gate_conv_residual
from .hash_rows import hash_lookup
from .hashing import ngram_hash
from .module import Engram
from .ngram_cache import NgramCache
from .plan import HashPlan
from .prefetch import Prefetcher
from .replacement import replace_engram
from .row_optimizers import RowAdagrad, RowAdam
from .rows import lookup
from .sharded_table import ShardedTable
from .state import EngramState
from .table import EngramTable
from .token_map import build_token_map
from .variants import warmup
from .version import __version__ as __version__

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
    "ShardedTable",
    "build_token_map",
    "gate_conv_residual",
    "gate_residual",
    "hash_lookup",
    "lookup",
    "ngram_hash",
    "replace_engram",
    "warmup",
]
