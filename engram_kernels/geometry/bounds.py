"""Bounds of a geometry's numbers, so that a typing error in a config is an error at once and not an hour of work."""

from .kinds import Whole

#: Fields of EngramConfig that are whole numbers. What is published lies far within.
BOUNDS = {
    "max_ngram": Whole(2, 64),
    "heads": Whole(1, 1024),
    "row_width": Whole(1, 2**31),
    "hidden_size": Whole(1, 2**31),
    "branches": Whole(1, 1024),
    "raw_vocab_size": Whole(1, 2**31),
    "row_multiple": Whole(1, 2**31),
    "conv_kernel": Whole(0, 1024),
    "layers": Whole(0, 2**31),
    "table_sizes": Whole(2),
    "vocab_size": Whole(),
    "pad_id": Whole(),
    "eos_id": Whole(),
    "seed": Whole(),
}
#: Hash columns of all layers together, each of which has a prime to be found: 48 in DeepSeek-V4.1.
MAX_COLUMNS = 4096
