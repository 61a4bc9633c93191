"""float32 of what a kernel loads."""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """``x`` in float32. A bfloat16 is the upper half of its float32: one instruction moves its bits there.

    Triton's own conversion takes out each half of a register first, 1.5 instructions an element (sm_90).
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)
