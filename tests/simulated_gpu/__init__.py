"""torch's real CUDA build over a GPU that is not there: the gpu lane, streams and captures included, on a CPU.

    make test-simulated-gpu                                     the gpu lane's tests
    python -m tests.simulated_gpu tests/gpu/test_prefetch.py    some of them, in an environment with such a torch

What ``libraries/`` holds stands in for CUDA's runtime and driver under torch: memory of the GPU is the host's, and what
CUDA's documentation says of streams, events, captures and registered memory is enforced. Triton compiles as for an
sm_90, Inductor's kernels too, and the PTX runs in the executor of ``tests/machine``; torch's operators run on the CPU.

**Time is virtual.** A stream has a clock, which each piece of work moves on: an operator, launch or copy by one unit, a
copy over the link by its bytes, a sleep by its cycles. Work runs when the host waits for it, in the order of its ends.
So what no event orders comes out wrong where a GPU could get it wrong: a reader that does not wait reads what was there
before, and memory that is freed too early is written by who gets it next.

What a kernel may touch is what a GPU would let it, and less: blocks of torch's allocator that are in use at the launch,
as large as they were asked for, and host memory that is pinned or registered.

Not there: several GPUs, NCCL, caches and weak memory order, kernels that overlap or race, most sparse operators, the
numbers that CUDA's generators draw, and times that mean anything. A test that passes here has not run on a GPU.
"""
