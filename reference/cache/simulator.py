"""The hot n-gram cache as it works, batch by batch, without the rows: what it holds, hits and evicts after any stream.

    key = scramble(mix)                                      (a bijection of 64 bits; 0 stands for no n-gram)
    set = (((key >> 32) + 2^31) * S) >> 32                   (rises with key, as signed numbers)

G groups, one for each layer and order (layer * (N - 1) + order - 2), of S sets of W ways. A way holds a key and a
stamp, 0 where it is empty. The clock counts tokens, from LAG * S * W. A call with T tokens:

 1. The clock goes on by T. Every key is compared with what its set holds before the call. What is found is a hit, and
    its stamp is the clock.
 2. Of what is not found, each distinct key is read from the host once.
 3. The distinct missed keys of a set, ascending, take the ways with its lowest stamps, of equals the lower way first,
    and get the stamp clock - LAG * S * W. None takes a way that was hit in this call; what finds no way is not kept.

So a key that was hit outlives by LAG * S * W tokens one that was read once, as most n-grams of a text are, and no
longer: a cache follows its text. All of it is integers, and nothing depends on which n-gram of a call comes first, so
that kernels do exactly the same. NumPy, and fast enough for texts of millions of tokens.
"""

import math

import numpy as np

from ..ops.hashing import ngram_mixes

#: Measured on texts (bench/NOTES.md): with none (least recently used) there are fewer hits in prose and code, with a
#: longer one in text that changes or repeats what it said last.
LAG = 8
WAYS = 8  # entries of a set, by the same notes
TAG_BYTES = 16  # an entry's key and stamp

_SALT = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15: negative, so that no mix of a plan that has none maps to key 0
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def scramble(mix: np.ndarray) -> np.ndarray:
    """Keys, int64, of mixes: SplitMix64's finalizer (Steele, Lea, Flood 2014), which spreads them over all sets."""
    word = (np.asarray(mix, dtype=np.int64) ^ np.int64(_SALT)).view(np.uint64)
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return word.view(np.int64)


def scramble_tensor(mix):
    """As :func:`scramble`, of an int64 tensor, on its device."""
    word = mix ^ _SALT
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        shifted = (word >> shift) & ((1 << (64 - shift)) - 1)  # torch's shift of int64 keeps the sign
        word = (word ^ shifted) * (factor - (1 << 64) if factor >= 1 << 63 else factor)
    return word


def unscramble(key: np.ndarray) -> np.ndarray:
    """The mixes of keys: the inverse of :func:`scramble`."""
    word = np.asarray(key, dtype=np.int64).view(np.uint64)
    for shift, factor in zip(_SHIFTS[::-1], (1, *_FACTORS[::-1]), strict=True):
        word = word * np.uint64(pow(factor, -1, 2**64))
        # w = v ^ (v >> shift) gives v by shifting again, as often as the shift fits into 64 bits.
        word = word ^ (word >> np.uint64(shift)) ^ (word >> np.uint64(2 * shift))
    return word.view(np.int64) ^ np.int64(_SALT)


def set_of(key: np.ndarray, sets: int) -> np.ndarray:
    """The set, 0 <= set < ``sets`` < 2^31, that each key belongs to."""
    return (((key >> 32) + 2**31) * sets) >> 32


def ngram_keys(token_ids, plan, *, cu_seqlens=None, history=None, dead=None) -> np.ndarray:
    """Keys int64 ``[G, T]`` of the n-grams that end at each token; 0 for padding and n-grams with an invalid id."""
    mixes, absent = ngram_mixes(token_ids, plan, cu_seqlens, history, dead)
    keys = np.where(absent[:, None, 1:].cpu().numpy(), 0, scramble(mixes[..., 1:].cpu().numpy()))
    return np.ascontiguousarray(keys.reshape(len(keys), math.prod(keys.shape[1:])).T)


class CacheSimulator:
    """The state of a cache of ``groups`` x ``sets`` x ``ways`` entries, and counts of what happened, per group.

    keys, stamps: int64 ``[G, S, W]``. Counts int64 ``[G]``: ``asked`` tokens with an n-gram, ``hits`` of these,
    ``read`` distinct missed keys of each call, which are reads of the host, ``inserted`` of these, ``evicted`` keys.
    """

    def __init__(self, groups: int, sets: int, ways: int):
        self.keys = np.zeros((groups, sets, ways), dtype=np.int64)
        self.stamps = np.zeros((groups, sets, ways), dtype=np.int64)
        self.lag = self.clock = LAG * sets * ways
        self.asked, self.hits, self.read, self.inserted, self.evicted = np.zeros((5, groups), dtype=np.int64)

    def look_up_tokens(self, token_ids, plan, **options) -> np.ndarray:
        """:meth:`look_up` of the n-grams of ``token_ids``; options as of :func:`ngram_keys`."""
        return self.look_up(ngram_keys(token_ids, plan, **options))

    def look_up(self, keys: np.ndarray) -> np.ndarray:
        """One call with keys ``[G, T]``; bool ``[G, T]``, which of them were hits."""
        self.clock += keys.shape[1]
        found = np.zeros(keys.shape, dtype=bool)
        for group, of_group in enumerate(keys):
            distinct, occurrences = np.unique(of_group, return_inverse=True)
            is_hit = self.find(group, distinct) >= 0
            found[group] = is_hit[occurrences]
            self.keep(group, distinct[~is_hit & (distinct != 0)])
            self.asked[group] += np.count_nonzero(of_group)
            self.hits[group] += np.count_nonzero(found[group])
        return found

    def find(self, group: int, keys: np.ndarray) -> np.ndarray:
        """Where each of ``keys [n]`` is kept, as set * W + way; -1 where it is not. What is found is a hit."""
        sets = set_of(keys, self.keys.shape[1])
        same = (self.keys[group, sets] == keys[:, None]) & (self.stamps[group, sets] > 0)
        is_hit, ways = same.any(axis=1), same.argmax(axis=1)  # key 0 is never kept
        self.stamps[group, sets[is_hit], ways[is_hit]] = self.clock
        return np.where(is_hit, sets * self.keys.shape[2] + ways, -1)

    def keep(self, group: int, missed: np.ndarray) -> np.ndarray:
        """Keep ``missed [n]``, distinct and ascending; where, as set * W + way, or -1 for what found no way."""
        sets = set_of(missed, self.keys.shape[1])
        rank = np.arange(len(missed)) - np.searchsorted(sets, sets)  # among the missed keys of its set
        stamps = self.stamps[group, sets]
        victims = np.argsort(stamps, axis=1, kind="stable")
        fits = rank < np.count_nonzero(stamps < self.clock, axis=1)
        missed_in, sets, ways = missed[fits], sets[fits], victims[fits, rank[fits]]
        self.evicted[group] += np.count_nonzero(self.stamps[group, sets, ways])
        self.keys[group, sets, ways] = missed_in
        self.stamps[group, sets, ways] = self.clock - self.lag
        self.read[group] += len(missed)
        self.inserted[group] += len(missed_in)
        kept = np.full(len(missed), -1)
        kept[fits] = sets * self.keys.shape[2] + ways
        return kept
