"""Kernels for Engram, the conditional memory of DeepSeek (arXiv 2601.07372).

``import engram_kernels`` by itself imports neither torch nor Triton, so that the command line answers at once. The
first use of a public name or of a room, ``from engram_kernels import lookup`` included, imports all of them and
registers the ops of ``torch.ops.engram``.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from .cache.ngram import NgramCache
    from .geometry.config import EngramConfig
    from .geometry.plan import HashPlan
    from .geometry.token_map import build_token_map
    from .launching.dependent import set_dependent_launch
    from .launching.ranges import set_ranges
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
    from .serving.prometheus import MetricsCollector
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
    "MetricsCollector",
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
    "set_ranges",
    "split_kv",
    "warmup",
]

#: Where the public names are: what is imported above, for a running program.
_PLACES = {
    ".cache.ngram": ("NgramCache",),
    ".geometry.config": ("EngramConfig",),
    ".geometry.plan": ("HashPlan",),
    ".geometry.token_map": ("build_token_map",),
    ".launching.dependent": ("set_dependent_launch",),
    ".launching.ranges": ("set_ranges",),
    ".nn.engram": ("Engram",),
    ".nn.replacement": ("export_state", "replace_engram"),
    ".nn.training": ("load_training", "save_training"),
    ".nn.warmup": ("warmup",),
    ".ops.gate": ("gate_residual",),
    ".ops.gate_conv": ("gate_conv_residual",),
    ".ops.gate_kernels.gradients": ("split_kv",),
    ".ops.hash_rows": ("hash_lookup",),
    ".ops.hashing": ("ngram_hash",),
    ".ops.rows": ("lookup",),
    ".ranks.sharded": ("ShardedTable",),
    ".serving.prefetch": ("Prefetcher",),
    ".serving.prometheus": ("MetricsCollector",),
    ".serving.state": ("EngramState",),
    ".tables.engram": ("EngramTable",),
    ".training.optimizers": ("RowAdagrad", "RowAdam", "RowSinkhorn"),
}
_ROOMS = {place.split(".")[1] for place in _PLACES} | {"checkpoints"}

if not typing.TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name):
        if name == "reference":  # which ops import while they are imported here
            return importlib.import_module(".reference", __name__)
        if name not in __all__ and name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for place, names in _PLACES.items():
            module = importlib.import_module(place, __name__)
            globals().update((each, getattr(module, each)) for each in names)
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__, *_ROOMS, "reference"})
