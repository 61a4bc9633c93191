"""Mutants of rows that are exchanged in place."""

from .change import mutants

EXCHANGE = """\
offset omitted: ids @ tables/editing/exchange
- row = tl.load(ids_ptr + place, mask=taken, other=0)
+ row = place
stride swapped: buffer @ tables/editing/exchange
- rows_ptr + place * WORDS + offs_w
+ rows_ptr + place + offs_w
32-bit product @ tables/editing/exchange -k beyond
- weight_ptr + row * WORDS
+ weight_ptr + row.to(tl.uint32) * WORDS
last tile skipped @ tables/editing/exchange
- cdiv(len(ids), config.block_rows),
+ max(1, len(ids) // config.block_rows),
scale byte off by one @ tables/editing/exchange -k 96
- scales_ptr + place * SCALES + offs_s
+ scales_ptr + place * SCALES + (offs_s + 1) % SCALES
offset omitted: the rows that were there @ tables/editing/exchange
- tl.store(mine, old, mask=mask)
+ tl.store(mine, new, mask=mask)
"""

# A row that is none would be written to, and what a warp has stored would be loaded by another.
EXCHANGE_BOUNDS = """\
mask dropped: rows behind the last @ tables/editing/exchange
- taken = place < num_rows
+ taken = place >= 0
"""
EXCHANGE_ORDER = """\
barrier dropped @ tables/editing/exchange
- tl.debug_barrier()  # every warp has loaded
+ tl.static_assert(BLOCK_W >= WORDS)  # every warp has loaded
"""

_ARGUMENTS = ("exchange_rows_kernel", "tables/editing/exchange", ("exchange_rows/v41",))
MUTANTS = (*mutants(*_ARGUMENTS, EXCHANGE), *mutants(*_ARGUMENTS, EXCHANGE_BOUNDS, EXCHANGE_ORDER, lane="machine"))
