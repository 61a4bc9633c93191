"""A pytest plugin (``-p tests.support.gpu.gsan``): device memory from the allocator of Triton's sanitizer, which checks
every access of a kernel to it. Triton has it since 3.9; registered host memory is not its own, so tests of that stay
out. To be loaded before anything is allocated.
"""

import torch
import triton
from triton.experimental import gsan


def pytest_configure(config):
    torch.cuda.memory.change_current_allocator(gsan.get_allocator())
    triton.knobs.compilation.instrumentation_mode = "gsan"
