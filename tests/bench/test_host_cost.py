"""What a call costs the host: how many launches it makes, and its own work beside theirs."""

import sys
from collections import Counter
from pathlib import Path

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.ops.host_cost import calls, host_costs, launches_of, launching_nothing

#: Launches, as many as docs and README say (gate_conv_residual takes one more where there is a state), and the most
#: calls of functions that a call makes beside them: 7, 17, 31, 5, 25, -15, 160 and 162 now.
STEP = ["copy_tokens_kernel", "hash_lookup_kernel", "gate_residual_kernel", "gate_residual_kernel"]
CALLS = {
    "ngram_hash": (["ngram_hash_kernel"], 20),
    "lookup": (["lookup_kernel"], 30),
    "hash_lookup": (["hash_lookup_kernel"], 50),  # of all layers
    "ngram_hash as a registered op": (["ngram_hash_kernel"], 90),
    "lookup as a registered op": (["lookup_kernel"], 60),
    "hash_lookup as a registered op": (["hash_lookup_kernel"], 110),
    "gate_residual": (["gate_residual_kernel"], 20),
    "gate_residual as a registered op": (["gate_residual_kernel"], 60),
    "gate_conv_residual": (["gate_scale_kernel", "conv_residual_kernel"], 20),
    "a step of decode, two layers": ([*STEP, "commit_history_kernel"], 240),
    "a step of verification, 3 drafts": ([*STEP, "commit_history_kernel"], 240),
}


def calls_of_functions(call):
    """How often a call calls which functions, of Python and of C: what it costs, whatever else the machine does."""
    count = Counter()

    def watch(frame, event, argument):
        if event == "call":
            count[f"{frame.f_code.co_name} of {Path(frame.f_code.co_filename).name}"] += 1
        elif event == "c_call":
            count[f"{argument.__qualname__} in {frame.f_code.co_name}"] += 1

    call()  # what a first call prepares is not counted
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def test_launches_of_calls_and_their_own_work():
    """Own work beside that of the bare launches, counted in calls of functions: no time is compared."""
    active, run, made, own = driver._active, JITFunction.run, {}, {}
    with launching_nothing(), torch.no_grad():
        for name, call in calls().items():
            launches = launches_of(call)
            made[name] = [kernel.__name__ for kernel, *_ in launches]

            def bare(launches=launches):
                for kernel, grid, args, kwargs in launches:
                    kernel[grid](*args, **kwargs)

            counts = calls_of_functions(call), calls_of_functions(bare)
            own[name] = counts[0].total() - counts[1].total(), counts[0] - counts[1]
    assert made == {name: kernels for name, (kernels, _) in CALLS.items()}
    assert not {name: functions for name, (count, functions) in own.items() if count > CALLS[name][1]}
    assert driver._active is active and JITFunction.run is run


def test_costs_are_measured():
    costs = {cost.name: cost for cost in host_costs(rounds=2)}
    assert {name: cost.launches for name, cost in costs.items()} == {name: len(CALLS[name][0]) for name in CALLS}
    assert all(cost.call > 0 and cost.bare > 0 for cost in costs.values())
