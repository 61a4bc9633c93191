"""The benchmark of a rank's columns and of stored rows: its cases pass their check, which finds wrong bytes."""

import torch

from bench.cases import Workbench, poison
from bench.ops.bench_tensor_parallel import cases


def test_cases():
    small = [case for case in cases() if case.tokens == 1 and case.variant.startswith("host")]
    assert len(small) == 3
    with Workbench(torch.device("cpu"), 1 << 20, 1 << 20, say=lambda text: None) as bench:
        for case in small:
            prepared = case.prepare(bench)
            result = prepared.calls[1]()
            assert (
                prepared.check(result, 1) is None and prepared.check(prepared.baselines["two_launches"]()(1), 1) is None
            )
            poison(result[1] if isinstance(result, tuple) else result)
            assert "bytes differ from the reference" in prepared.check(result, 1)
