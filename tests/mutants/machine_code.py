"""Mutants that Triton's interpreter cannot show: it has no warps and no vectors, and sees only what results show."""

from .change import mutants

HISTORY_ORDER = """\
barrier dropped @ serving/history -k equals_reference
- tl.debug_barrier()  # every thread has read
+ tl.static_assert(BLOCK_N >= DEPTH)  # every thread has read
"""

ADAGRAD_ORDER = """\
barrier dropped @ training/update -k equals_reference
- tl.debug_barrier()  # every warp has loaded the sums
+ tl.static_assert(BLOCK_R >= WIDTH)  # every warp has loaded the sums
"""

ADAM_ORDER = """\
barrier dropped @ training/update -k equals_reference
- tl.debug_barrier()  # every warp has loaded the steps
+ tl.static_assert(BLOCK_R >= WIDTH)  # every warp has loaded the steps
"""

MOVES_ORDER = """\
barrier dropped: moves @ training/sinkhorn -k equals_reference
- tl.debug_barrier()  # of narrow rows every thread has loaded a copy
+ tl.static_assert(BLOCK_R >= WIDTH)  # of narrow rows every thread has loaded a copy
"""

MOMENTUM_ORDER = """\
barrier dropped: momentum @ training/sinkhorn -k equals_reference
- tl.debug_barrier()  # of narrow rows every warp has loaded the momentum
+ tl.static_assert(BLOCK_R >= WIDTH)  # of narrow rows every warp has loaded the momentum
"""

NO_ROW = """\
mask dropped: no row @ training/sinkhorn -k no_row
- mask=row >= 0, other=0)
+ mask=row >= -1, other=0)
"""

GATE_ALIGNMENT = """\
alignment wrong @ ops/gate_kernels/branch -k rows_of_the_gate
- if ALIGNED:
+ if ALIGNED is not None:
"""

# What is read is not used, and what is written is written again: no result shows it.
BEFORE_THE_FIRST = """\
mask dropped: before the first key @ ops/row_kernels/order -k test_kernel
- before = tl.load(keys_ptr + index - 1, mask=mask_row & (index > 0), other=0)
+ before = tl.load(keys_ptr + index - 1, mask=mask_row, other=0)
"""

BEHIND_THE_LAST = """\
mask dropped: values behind the end @ ops/conv_kernels/state -k test_kernel and 12-1-100
- HIDDEN_SIZE + offs_d, value, mask=mask_d)
+ HIDDEN_SIZE + offs_d, value, mask=offs_d >= 0)
"""

NO_WAIT = """\
wait dropped @ launching/dependent{}
-     grid_wait()
-     grid_trigger()
+     grid_trigger()
"""


def _not_following(where):
    return f"""\
wait dropped: and the trigger @ {where}
-     follow_predecessor()
+     tl.static_assert(True)
"""


RESIDUAL_WAIT = _not_following("ops/conv_kernels/residual -k test_kernel")
SCALE_WAIT = _not_following("ops/conv_kernels/scale -k test_kernel")
PROBE_WAIT = _not_following("cache/probe -k test_kernel")
ADAM_WAIT = """\
wait dropped: and the trigger @ training/update -k adam
-     steps_ptr = tl.multiple_of(steps_address.to(tl.int64).to(tl.pointer_type(tl.int32)), 4)
-     follow_predecessor()
+     steps_ptr = tl.multiple_of(steps_address.to(tl.int64).to(tl.pointer_type(tl.int32)), 4)
"""

_MACHINE = dict(lane="machine")
MUTANTS = (
    *mutants("commit_history_kernel", "serving/history", ("history/27b-packed",), HISTORY_ORDER, **_MACHINE),
    *mutants("row_adagrad_kernel", "training/optimizers", ("row_adagrad/27b",), ADAGRAD_ORDER, **_MACHINE),
    *mutants("row_adam_kernel", "training/optimizers", ("row_adam/27b",), ADAM_ORDER, **_MACHINE),
    *mutants("row_moves_kernel", "training/sinkhorn", ("row_sinkhorn/27b",), MOVES_ORDER, NO_ROW, **_MACHINE),
    *mutants("row_momentum_kernel", "training/sinkhorn", ("row_sinkhorn/27b",), MOMENTUM_ORDER, **_MACHINE),
    *mutants("gate_residual_kernel", "ops/row_kernels/alignment", ("gate/v41",), GATE_ALIGNMENT, **_MACHINE),
    *mutants(
        "copy_duplicates_kernel", "ops/row_kernels/order", ("lookup/v41-storage-address",), BEFORE_THE_FIRST, **_MACHINE
    ),
    *mutants("advance_state_kernel", "ops/gate_conv", ("gate_conv/27b-packed-state",), BEHIND_THE_LAST, **_MACHINE),
    *mutants("gate_residual_kernel", "ops/gate", ("gate/v41",), NO_WAIT.format(" -k test_kernel"), **_MACHINE),
    *mutants(
        "conv_residual_kernel",
        "ops/gate_conv",
        ("gate_conv/27b-packed-state",),
        RESIDUAL_WAIT,
        **_MACHINE,
    ),
    *mutants(
        "gate_scale_kernel",
        "ops/gate_conv",
        ("gate_conv/27b-packed-state",),
        SCALE_WAIT,
        **_MACHINE,
    ),
    *mutants(
        "probe_cache_kernel",
        "cache/lookup",
        ("cached_lookup/v41",),
        PROBE_WAIT,
        **_MACHINE,
    ),
    *mutants("row_adam_kernel", "training/optimizers", ("row_adam/27b",), ADAM_WAIT, **_MACHINE),
)
