"""What a call costs the host: how many launches it makes, and its time beside theirs."""

import sys

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

# Calls of functions that a call makes beside its launches: 19, 25, 37, 24, 80 (of torch's dispatcher) and 29 now.
LIMITS = dict(zip(LAUNCHES, (36, 40, 56, 38, 160, 46), strict=True))


def test_launches_of_a_call():
    before, run = driver._active, JITFunction.run
    with launching_nothing(), torch.no_grad():
        made = {name: [kernel.__name__ for kernel, *_ in launches_of(call)] for name, call in calls().items()}
    assert made == LAUNCHES
    assert driver._active is before and JITFunction.run is run


def calls_of_functions(call):
    """How many functions, of Python and of C, a call calls: what it costs, whatever else the machine does."""
    count = 0

    def watch(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    call()  # what a first call prepares is not counted
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def test_calls_stay_cheap():
    """Their own work, beside that of their bare launches, counted in calls of functions: no time is compared."""
    with launching_nothing(), torch.no_grad():
        own = {}
        for name, call in calls().items():
            launches = launches_of(call)

            def bare(launches=launches):
                for kernel, grid, args, kwargs in launches:
                    kernel[grid](*args, **kwargs)

            own[name] = calls_of_functions(call) - calls_of_functions(bare)
    assert set(own) == set(LAUNCHES)
    assert not {name: count for name, count in own.items() if count > LIMITS[name]}
    assert own["gate_residual"] < own["gate_residual as a registered op"]  # what the bypass is for


def test_costs_are_measured():
    costs = {cost.name: cost for cost in host_costs(rounds=2)}
    assert {name: cost.launches for name, cost in costs.items()} == {n: len(made) for n, made in LAUNCHES.items()}
    assert all(cost.call > 0 and cost.bare > 0 for cost in costs.values())
