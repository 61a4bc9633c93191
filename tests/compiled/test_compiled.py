"""All kernels of the compile lane are known to the executor: each of their instructions is translated."""

import pytest

from tests import machine
from tests.reports import compile_cases
from tests.reports.offline import TARGETS, compiling_for

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_every_instruction_of_every_case_is_known(target):
    names = set()
    for case in compile_cases.CASES.values():
        with compiling_for(target) as compiled:
            case()
        for kernel, _, warps in compiled:
            parsed = machine.Kernel(kernel.asm["ptx"])
            assert (parsed.name, parsed.threads) == (kernel.metadata.name, 32 * warps)
            assert all(len(parsed.steps(block.index)) == len(block.instructions) for block in parsed.program.blocks)
            names.add(parsed.name)
    assert len(names) > 20
