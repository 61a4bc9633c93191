"""hash_lookup through an n-gram cache on a novel: the same bits as without, hits and contents as the simulator says."""

import pytest
import torch

from bench.running.text import load_token_ids, load_token_map
from engram_kernels import HashPlan
from tests.ops.test_hashing import small_plan

from .test_lookup import Pair


@pytest.mark.kernel
def test_kernel_on_real_text(device):
    """A novel's tokens and the real token map, in chunks that overlap, each with its history."""
    token_map, text = torch.from_numpy(load_token_map()), torch.from_numpy(load_token_ids()).long()
    primes = small_plan(layers=1).primes
    plan = HashPlan.from_parts(torch.tensor([[2**40 + 1, 2**39 + 7, 2**38 + 3]]), primes, pad=3, token_map=token_map)
    pair = Pair(device, plan, 16, "bfloat16", sets=24, ways=4)
    for at in range(50_000, 50_240, 80):
        pair.look_up(text[at : at + 120], history=text[None, at - 2 : at])
    assert pair.simulator.hits.min() > 20 and pair.simulator.evicted.min() > 20
