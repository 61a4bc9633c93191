"""What a call costs the host: how many launches it makes, and its time beside theirs."""

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.host_cost import calls, host_costs, launches_of, launching_nothing

# As many as docs and README say; gate_conv_residual takes one more where there is a state.
LAUNCHES = {
    "ngram_hash": ["ngram_hash_kernel"],
    "lookup": ["lookup_kernel"],
    "hash_lookup": ["hash_lookup_kernel"],  # of all layers
    "gate_residual": ["gate_residual_kernel"],
    "gate_residual as a registered op": ["gate_residual_kernel"],
    "gate_conv_residual": ["gate_scale_kernel", "conv_residual_kernel"],
}


def test_launches_of_a_call():
    before, run = driver._active, JITFunction.run
    with launching_nothing(), torch.no_grad():
        made = {name: [kernel.__name__ for kernel, *_ in launches_of(call)] for name, call in calls().items()}
    assert made == LAUNCHES
    assert driver._active is before and JITFunction.run is run


def test_calls_stay_cheap():
    """Measured 1.3 to 1.5 of their bare launches; a machine may be busy with others."""
    costs = {cost.name: cost for cost in host_costs(rounds=40)}
    assert set(costs) == set(LAUNCHES)
    limits = dict.fromkeys(LAUNCHES, 2) | {"gate_residual as a registered op": 4}
    slow = {name: f"{cost.ratio:.2f}" for name, cost in costs.items() if cost.ratio > limits[name]}
    assert not slow
    eager, op = costs["gate_residual"], costs["gate_residual as a registered op"]
    assert eager.call < op.call  # what the bypass is for
