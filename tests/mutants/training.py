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

MUTANTS = (
    *mutants("row_gradient_kernel", "tables/gradient", ("row_gradient/27b",), ROW_GRADIENT),
    *mutants("row_adagrad_kernel", "training/optimizers", ("row_adagrad/27b",), UPDATE, ADAGRAD),
    *mutants("row_adam_kernel", "training/optimizers", ("row_adam/27b",), UPDATE, ADAM),
)
