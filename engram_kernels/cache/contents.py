"""What an n-gram cache has seen and holds: statistics, a warm start from text, and hot keys in a file.

A file has keys and stamps alone: rows are read back from the tables, so that what is loaded is never out of date.
"""

import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engram_kernels.checkpoints.opening import open_regular
from engram_kernels.checkpoints.writing import (
    check_disk,
    check_target,
    new_file,
    partial_path,
    remove_abandoned,
    write_all,
)
from engram_kernels.launching.checks import check_tensor
from engram_kernels.ops.hash_rows import hash_lookup
from engram_kernels.ops.rows import lookup
from engram_kernels.reference.cache.simulator import set_of, unscramble

from .store import CacheStore

_FORMAT = 2
#: Arrays of a file in their order: the kinds that numpy calls them, and their dimensions.
_ARRAYS = {
    "format": ("iu", 0),
    "plan": ("U", 0),
    "token_map": ("U", 0),
    "clock": ("i", 1),
    "group": ("i", 1),
    "key": ("i", 1),
    "stamp": ("i", 1),
}
_PARSER = NotImplementedError, SyntaxError, RecursionError, MemoryError, TypeError, OverflowError, struct.error
_LATEST = 1 << 62  # of clocks: half of what int64 counts to is left
_SLOTS_AT_ONCE = 1 << 20
_WARM_TOKENS = 2048


@dataclass(frozen=True)
class CacheStats:
    """Counts by ``[layer][order - 2]``, of the calls that went through the cache.

    asked: tokens with an n-gram. hits: of these, found. read: distinct missed n-grams of each call, which is what was
    read from the tables. inserted: of these, kept. evicted: entries that made room. used: entries in use now.
    """

    asked: list[list[int]]
    hits: list[list[int]]
    read: list[list[int]]
    inserted: list[list[int]]
    evicted: list[list[int]]
    used: list[list[int]]
    entries: int  #: of each order in each layer
    entry_bytes: int

    @property
    def misses(self) -> list[list[int]]:
        """Tokens with an n-gram that was not found."""
        return _combined(self.asked, self.hits)

    @property
    def bytes_saved(self) -> list[list[int]]:
        """Bytes that were not read from the tables: of hits, and of n-grams asked for again in a call."""
        return [[count * self.entry_bytes for count in layer] for layer in _combined(self.asked, self.read)]

    def __str__(self) -> str:
        lines = [
            f"{'layer':>5} {'order':>5} {'asked':>12} {'hits':>7} {'read':>7} {'evicted':>12} {'used':>7} {'saved':>12}"
        ]
        for layer, per_order in enumerate(self.asked):
            for index, asked in enumerate(per_order):
                hits, read = (counts[layer][index] / max(asked, 1) for counts in (self.hits, self.read))
                used = self.used[layer][index] / self.entries
                lines.append(
                    f"{layer:>5} {index + 2:>5} {asked:>12,} {hits:>7.1%} {read:>7.1%} "
                    f"{self.evicted[layer][index]:>12,} {used:>7.1%} {self.bytes_saved[layer][index] / 1e9:>9.3f} GB"
                )
        return "\n".join(lines)


def _combined(counts, others) -> list[list[int]]:
    return [[a - b for a, b in zip(*layers, strict=True)] for layers in zip(counts, others, strict=True)]


def read_stats(cache: CacheStore) -> CacheStats:
    """The counts as they are now; waits for the device."""
    with cache.in_order() as state:
        counts = torch.cat([state.counts, (state.stamps > 0).sum(dim=(1, 2))[None]])
    per_layer = counts.unflatten(1, (len(cache.tables), -1)).tolist()
    return CacheStats(*per_layer, entries=cache.entries, entry_bytes=cache.entry_bytes)


def warm_up(cache: CacheStore, token_ids: torch.Tensor, progress: Callable[[int, int], object] | None) -> None:
    """Look ``token_ids`` up, 2,048 at a time, for what stays in the cache; counts are put back afterwards."""
    where = "NgramCache.warm"
    check_tensor(where, "token_ids", token_ids, dtypes=(torch.int32, torch.int64), device=cache.plan.device)
    if token_ids.dim() not in (1, 2):
        raise ValueError(f"{where}: token_ids must have shape [T] or [B, S], got {list(token_ids.shape)}")
    with cache.in_order() as state:
        counts = state.counts.clone()
    min_tokens, cache.min_tokens = cache.min_tokens, 0
    try:
        done = 0
        for sequence in token_ids.view(-1, token_ids.shape[-1]) if token_ids.numel() else ():
            before = sequence.new_full((cache.plan.max_ngram - 1,), -1)
            for chunk in sequence.split(_WARM_TOKENS):
                hash_lookup(chunk, cache.plan, cache.tables, history=before[None], cache=cache)
                before = torch.cat([before, chunk])[1 - cache.plan.max_ngram :]
                done += len(chunk)
                if progress is not None:
                    progress(done, token_ids.numel())
    finally:
        cache.min_tokens = min_tokens
        with cache.in_order() as state:
            state.counts.copy_(counts)


def save_keys(cache: CacheStore, path: str | os.PathLike) -> Path:
    """Write the keys in use to ``path``, whole or not at all."""
    where = "NgramCache.save"
    path = _path_of(path, where)
    check_target(path, where)
    if path.exists():
        _read_arrays(path, where)  # another kind of file is not replaced
    with cache.in_order() as state:
        keys, stamps, clock = (tensor.cpu().numpy() for tensor in (state.keys, state.stamps, state.clock))
    group, _, _ = held = np.nonzero(stamps)
    arrays = dict(format=_FORMAT, plan=_digest(cache.plan), token_map=cache.plan.token_map_digest or "")
    arrays |= dict(clock=clock, group=group, key=keys[held], stamp=stamps[held])
    remove_abandoned(path)
    content = io.BytesIO()
    np.savez(content, **arrays)
    check_disk(path.parent, len(content.getbuffer()), where)
    with new_file(path, partial_path(path)) as fd:
        write_all(fd, content.getbuffer(), 0)
    return path


def load_keys(cache: CacheStore, path: str | os.PathLike) -> None:
    """Hold the keys of a file, the most recently used ones where there are more than fit; rows come from the tables."""
    where = "NgramCache.load"
    path = _path_of(path, where)
    version, plan, token_map, clock, group, key, stamp = _read_arrays(path, where)
    if int(version) != _FORMAT:
        raise ValueError(f"{where}: {path} must be of format {_FORMAT}, got {int(version)}")
    if str(token_map) != (cache.plan.token_map_digest or ""):
        raise ValueError(
            f"{where}: {path} must hold keys of the cache's own token map; is the tokenizer of another revision?"
        )
    if str(plan) != _digest(cache.plan):
        raise ValueError(f"{where}: {path} must hold keys of the cache's own plan, got those of another")
    _check_entries(f"{where}: {path}", cache, int(clock[0]), group, key, stamp)
    with cache.in_order() as state:
        shape = state.keys.shape
        # Within each set the latest first; what comes after W others does not fit.
        place = group * cache.sets + set_of(key, cache.sets)
        order = np.lexsort((key, -stamp, place))
        place, key, stamp = place[order], key[order], stamp[order]
        way = np.arange(len(place)) - np.searchsorted(place, place)
        fits = way < cache.ways
        slot = place[fits] * cache.ways + way[fits]
        keys, stamps = np.zeros((2, state.keys.numel()), dtype=np.int64)
        keys[slot], stamps[slot] = key[fits], stamp[fits]
        # Emptied first: should reading fail, nothing is held rather than half of it.
        state.stamps.zero_()
        state.keys.copy_(torch.from_numpy(keys.reshape(shape)))
        _read_entries(cache, state, keys, stamps)
        state.clock.fill_(max(int(clock[0]), state.lag))
        state.stamps.copy_(torch.from_numpy(stamps.reshape(shape)))


def _path_of(path, where: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{where}: path must be a file, got {type(path).__name__}")
    return Path(path)


def _read_arrays(path: Path, where: str) -> list[np.ndarray]:
    """The arrays of a file that save_keys wrote, in the order of _ARRAYS; ValueError where it is anything else.

    Sizes are checked before memory is taken: an array's own header may tell of any.
    """
    with open_regular(path, where) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return [_read_array(archive, name, *kind) for name, kind in _ARRAYS.items()]
        # What a damaged archive raises: numpy reads headers by Python's parser.
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error, *_PARSER) as error:
            raise ValueError(f"{where}: {path} must be a file that NgramCache.save wrote, got {error}"[:500]) from None


def _read_array(archive: zipfile.ZipFile, name: str, kinds: str, dims: int) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"an array {name!r} that is packed")
    content = io.BytesIO(archive.read(info))  # as long as it is in the file, and of the right checksum
    np.lib.format.read_magic(content)
    shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    left = len(content.getbuffer()) - content.tell()
    if dtype.kind not in kinds or len(shape) != dims or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"an array {name!r} of {dtype} {list(shape)} in {left:,} bytes")
    return np.frombuffer(content.getbuffer()[content.tell() :], dtype).reshape(shape)


def _check_entries(what: str, cache: CacheStore, clock: int, group, key, stamp) -> None:
    """Raise ValueError where entries could not have come from a cache of this plan."""
    groups = cache.state.keys.shape[0]
    if not len(group) == len(key) == len(stamp):
        raise ValueError(
            f"{what} must have a group and a stamp for each key, got {len(group)}, {len(key)}, {len(stamp)}"
        )
    if not 0 <= clock <= _LATEST:
        raise ValueError(f"{what} must have a clock of 0 to 2^62, got {clock}")
    for name, values, least, most in (("groups", group, 0, groups - 1), ("stamps", stamp, 1, clock)):
        outside = (values < least) | (values > most)
        if outside.any():
            raise ValueError(f"{what} must have {name} of {least} to {most}, got {values[outside][0]}")
    if len(np.unique(np.stack([group, key]), axis=1).T) != len(key):
        raise ValueError(f"{what} has a key twice")


def _read_entries(cache: CacheStore, state, keys: np.ndarray, stamps: np.ndarray) -> None:
    """Rows of all keys in use, from the tables to their entries."""
    if not state.rows.numel():
        return
    plan, heads, width = cache.plan, cache.heads, cache.tables[0].width
    mixes = torch.from_numpy(unscramble(keys)).view(state.keys.shape[0], -1)
    used = torch.from_numpy(stamps > 0).view_as(mixes)
    for group in range(len(mixes)):
        layer, index = divmod(group, plan.max_ngram - 1)
        table, columns = cache.tables[layer], slice(index * heads, (index + 1) * heads)
        primes, offsets = plan.primes[layer, columns], plan.offsets[layer, columns]
        for begin in range(0, mixes.shape[1], _SLOTS_AT_ONCE):
            some = slice(begin, begin + _SLOTS_AT_ONCE)
            mix, use = (part[group, some, None].to(plan.device) for part in (mixes, used))
            ids = torch.where(use, torch.remainder(mix, primes) + offsets, -1)
            first = (group * mixes.shape[1] + begin) * heads
            rows, scales = (
                part if part is None else part[first : first + ids.numel()].view(*ids.shape, -1)
                for part in (state.rows, state.scales)
            )
            lookup(
                table,
                ids,
                out=(rows.view(table.format.dtype).view(*ids.shape, table.format.row_items(width)), scales),
                out_format="storage",
            )


def _digest(plan) -> str:
    """What keys mean: two plans with the same digest have the same mixes."""
    digest = hashlib.sha256(repr((plan.pad, plan.eos, tuple(plan.multipliers.shape))).encode())
    for tensor in (plan.multipliers, plan.token_map):
        digest.update(b"none" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
