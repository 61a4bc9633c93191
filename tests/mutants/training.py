"""Mutants of the row gradient and of the row-wise optimizers."""

from .change import mutants

ROW_GRADIENT = """\
mask dropped: end of a segment @ tables/gradient
- mask = (entry < end)[:, None] & mask_r
+ mask = (entry >= 0)[:, None] & mask_r
mask dropped: end of a row @ tables/gradient -k its_segments_alone
- offs_r, value, mask=mask_r)
+ offs_r, value, mask=offs_r >= 0)
stride swapped @ tables/gradient
- grad_ptr + place[:, None] * WIDTH + offs_r
+ grad_ptr + place[:, None] + offs_r
32-bit product @ tables/gradient -k beyond
- grad_ptr + place[:, None] * WIDTH
+ grad_ptr + place[:, None].to(tl.uint32) * WIDTH
window off by one: where a segment ends @ tables/gradient
- end = tl.load(starts_ptr + segment + 1, mask=segment + 1 < num_segments, other=0)
+ end = tl.load(starts_ptr + segment + 1, mask=segment + 1 < num_segments, other=0) - 1
offset omitted: order @ tables/gradient
- tl.load(order_ptr + entry, mask=entry < end, other=0).to(tl.int64)
+ entry.to(tl.int64)
last tile skipped: entries @ tables/gradient
- range(start, end, BLOCK_N)
+ range(start, end - (end - start) % BLOCK_N, BLOCK_N)
"""

# gradient_rows and move_rows, in both kernels that update.
UPDATE = """\
mask dropped: rows that are not finite @ training/update -k bad_row
- moves = taken & finite
+ moves = taken
mask dropped: count of such rows @ training/update -k bad_row
- mask=taken & ~finite
+ mask=taken & finite
offset omitted: factor @ training/update -k clipping
- other=0) * factor
+ other=0)
stride swapped: gradient @ training/update
- values_ptr + place * WIDTH + offs_r
+ values_ptr + place + offs_r
32-bit product @ training/update -k its_own_rows
- weight_ptr + row * WIDTH
+ weight_ptr + row.to(tl.uint32) * WIDTH
offset omitted: decay @ training/update -k equals_reference
- other=0).to(tl.float32) * keep
+ other=0).to(tl.float32)
offset omitted: rounding @ training/update -k keeps_the_mean
- (bits & 0xFFFF)
+ (bits & 0)
offset omitted: row in the counter @ training/update -k equals_reference
- (step * num_table_rows + row) * WIDTH
+ (step * num_table_rows) * WIDTH
"""

ADAGRAD = """\
last tile skipped @ training/update
- tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
-         row, moves, gradient, square
+ count // BLOCK_ROWS, tl.num_programs(0)):
+         row, moves, gradient, square
eps outside the mean @ training/update -k equals_reference
- tl.sqrt(total) + eps
+ tl.sqrt(total + eps)
offset omitted: mean @ training/update -k equals_reference
- square / WIDTH
+ square
"""

ADAM = """\
last tile skipped @ training/update
- tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
-         row, moves, gradient, _
+ count // BLOCK_ROWS, tl.num_programs(0)):
+         row, moves, gradient, _
window off by one: steps @ training/update -k equals_reference
- tl.load(steps_ptr + row, mask=moves, other=0) + 1
+ tl.load(steps_ptr + row, mask=moves, other=0) + 2
norms swapped: moments @ training/update -k equals_reference
- second += rate_2 * (gradient * gradient - second)
+ second += rate_1 * (gradient * gradient - second)
eps outside the mean @ training/update -k equals_reference
- tl.sqrt(second / one_minus_power(steps, log_beta_2)) + eps
+ tl.sqrt(second / one_minus_power(steps, log_beta_2) + eps)
last tile skipped: terms of the series @ training/update -k long_runs
- tl.where(x > -0.125, series, 1.0 - tl.exp(x))
+ series
"""

MOVES = """\
mask dropped: rows without a gradient @ training/sinkhorn -k no_row
- passed = tl.where(taken > 0, clock - taken, 0)
+ passed = tl.where((taken > 0) | (row >= 0), clock - taken, 0)
window off by one: steps gone by @ training/sinkhorn -k equals_reference
- range(taken + 1, taken
+ range(taken, taken
offset omitted: decay until the step @ training/sinkhorn -k below_the_threshold
- decays_ptr + step - taken + 1)
+ decays_ptr)
offset omitted: slot of the columns @ training/sinkhorn -k equals_reference
- columns_ptr + slot * WIDTH + offs_r
+ columns_ptr + offs_r
offset omitted: decay of the momentum @ training/sinkhorn -k equals_reference
- before * tl.where(passed <= STEPS, left, 0)
+ before
32-bit product @ training/sinkhorn -k beyond
- weight_row = weight_ptr + row * WIDTH + offs_r
-             value
+ weight_row = weight_ptr + row.to(tl.uint32) * WIDTH + offs_r
+             value
"""

MOMENTUM = """\
last tile skipped @ training/sinkhorn -k equals_reference
- tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
-         row, moves
+ count // BLOCK_ROWS, tl.num_programs(0)):
+         row, moves
offset omitted: look ahead @ training/sinkhorn -k equals_reference
- update = keep * after + rate * gradient
+ update = after
mask dropped: norms of rows that are not finite @ training/sinkhorn -k bad_row
- row_norms(update), mask=moves)
+ row_norms(update), mask=place < count)
norms swapped @ training/sinkhorn -k equals_reference
- norms_ptr + place, row_norms(before)
+ norms_ptr + place, row_norms(after)
"""

BALANCE = """\
last tile skipped @ training/sinkhorn -k equals_reference
- tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
-         _, _, scaled
+ count // BLOCK_ROWS, tl.num_programs(0)):
+         _, _, scaled
mask dropped: rows at rest @ training/sinkhorn -k below_the_threshold
- other=-1) > limit
+ other=-1) >= 0
stride swapped: sums of programs @ training/sinkhorn -k equals_reference
- squares_ptr + tl.program_id(0) * WIDTH + offs_r
+ squares_ptr + tl.program_id(0) + offs_r
norms swapped: rows are not normalised @ training/sinkhorn -k equals_reference
- scaled = scaled / (row_norms(scaled) + eps)
+ scaled = scaled + 0.0
"""

BALANCED = """\
last tile skipped @ training/sinkhorn -k equals_reference
- tl.cdiv(count, BLOCK_ROWS), tl.num_programs(0)):
-         place, live, scaled
+ count // BLOCK_ROWS, tl.num_programs(0)):
+         place, live, scaled
mask dropped: rows at rest take no step @ training/sinkhorn -k below_the_threshold
- tl.store(taken_ptr + row, clock + tl.zeros([BLOCK_ROWS, 1], tl.int32), mask=steps)
+ tl.store(taken_ptr + row, clock + tl.zeros([BLOCK_ROWS, 1], tl.int32), mask=live)
norms swapped: columns are balanced last @ training/sinkhorn -k equals_reference
- move * (scaled / (row_norms(scaled) + eps))
+ move * scaled
32-bit product @ training/sinkhorn -k beyond
- weight_row = weight_ptr + row * WIDTH + offs_r
-         value
+ weight_row = weight_ptr + row.to(tl.uint32) * WIDTH + offs_r
+         value
"""

_SINKHORN = ("row_sinkhorn/27b",)
MUTANTS = (
    *mutants("row_gradient_kernel", "tables/gradient", ("row_gradient/27b",), ROW_GRADIENT),
    *mutants("row_adagrad_kernel", "training/optimizers", ("row_adagrad/27b",), UPDATE, ADAGRAD),
    *mutants("row_adam_kernel", "training/optimizers", ("row_adam/27b",), UPDATE, ADAM),
    *mutants("row_moves_kernel", "training/sinkhorn", _SINKHORN, MOVES),
    *mutants("row_momentum_kernel", "training/sinkhorn", _SINKHORN, MOMENTUM),
    *mutants("row_balance_kernel", "training/sinkhorn", _SINKHORN, BALANCE),
    *mutants("row_balanced_kernel", "training/sinkhorn", _SINKHORN, BALANCED),
)
