"""The compile lane: every kernel, from its launcher's real arguments, for four GPUs without having one.

Gates: no instruction that the executor does not know, no load and store that only luck orders, no spills, 16-byte
loads, no float64 arithmetic, no 64-bit division in a hash that is proved non-negative, registers and shared memory
below the ceilings written beside each kernel, a bound on variants, and the committed report.
"""

import importlib
from dataclasses import asdict

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from tests import machine
from tests.conftest import package_kernels
from tests.machine.gpu import BENIGN
from tests.machine.parsing.dependence import triggers, unwaited
from tests.reports import compile_cases, compile_report
from tests.reports.aliases import unordered
from tests.reports.offline import DEPENDENT, TARGETS, compiling_for, machine_code

pytestmark = pytest.mark.compile
CASE_TARGETS = [(case, target) for target in TARGETS for case in compile_cases.CASES]


def ceilings(kernel):
    """(registers, bytes of shared memory) by target, from the module that defines the kernel."""
    return importlib.import_module(package_kernels()[kernel].fn.__module__).CEILINGS[kernel]


@pytest.mark.parametrize(("case", "target"), CASE_TARGETS)
def test_machine_code(case, target):
    compiled = compile_report.compiled_for(case, target)
    assert compiled
    for kernel, _, warps in compiled:
        name = kernel.metadata.name
        if target.startswith("sm_"):
            check_known(kernel, warps)
        harmless = {known.memory.rstrip(":") for known in BENIGN if known.kernel == name}
        found = [race for race in unordered(kernel.asm["ttgir"]) if race[0] not in harmless]
        assert found == [], f"{name} lacks a barrier"
        check_dependence(kernel, target)
    kernels = [machine_code(entry) for entry in compiled]
    for code in kernels:
        registers, shared = ceilings(code.kernel)[target]
        assert code.spills == 0, f"{code.kernel} spills"
        assert code.float64 == 0, f"{code.kernel} computes in float64"
        assert code.registers <= registers, f"{code.kernel}: {code.registers} registers, ceiling {registers}"
        assert code.shared_bytes <= shared, f"{code.kernel}: {code.shared_bytes} B shared, ceiling {shared}"
        if "overflow" not in case:
            assert code.divisions == 0, f"{code.kernel} calls a 64-bit division"
        check_load_width(case, target, code)
    # The committed report tells the truth. A change on purpose: make compile-report.
    report = compile_report.load()
    if triton.__version__ in report:
        assert [asdict(code) for code in kernels] == report[triton.__version__][target][case]


def check_known(kernel, warps):
    """The executor translates each of its instructions."""
    parsed = machine.Kernel(kernel.asm["ptx"])
    assert (parsed.name, parsed.threads) == (kernel.metadata.name, 32 * warps)
    assert all(len(parsed.steps(block.index)) == len(block.instructions) for block in parsed.program.blocks)


def check_dependence(kernel, target):
    """Where launches are dependent a kernel waits ahead of all that it reads and writes, and triggers once."""
    text, name = kernel.asm.get("ptx") or kernel.asm["amdgcn"], kernel.metadata.name
    assert getattr(kernel.metadata, "launch_pdl", False) == (target in DEPENDENT), name
    if target in DEPENDENT:
        assert unwaited(text) == [], f"{name} does not wait"
        assert triggers(text) == 1, f"{name} does not trigger"
    else:
        assert "griddepcontrol" not in text, name


def check_load_width(case, target, code):
    """Rows and hidden states come 16 bytes at a time; single bytes are dead tokens, masks and scales, never rows.

    Of rows that become bfloat16 a thread reads what it stores as 16 bytes, 8 of e4m3 and 4 of e2m1; what it stores
    tells then. Copies of e2m1 rows take half the loads.
    """
    packed = "fp4" in case
    # Four loads of 16 bytes a thread read a step's rows on NVIDIA, two on AMD's wider warps; a gate's hidden state, key
    # and norms take as many.
    # The convolution reads the values of four taps, a hidden state and a norm; its state values alone.
    fewest = {"lookup_kernel": 4, "hash_lookup_kernel": 4, "gate_residual_kernel": 4, "gate_scale_kernel": 4}
    fewest |= {
        "conv_residual_kernel": 5 if case.endswith("few") else 6,
        "advance_state_kernel": 2,
        "store_conv_kernel": 1,
    }
    fewest |= {"gate_backward_kernel": 8, "conv_backward_kernel": 8, "norm_gradient_kernel": 2}
    dequantised = code.kernel in ("lookup_kernel", "hash_lookup_kernel") and "storage" not in case
    dequantised = dequantised and any(model in case for model in ("v41", "qwen"))
    fewest |= {} if "storage" in case else {"copy_duplicates_kernel": 4}  # which also copies scales, of 8 bytes
    wide, narrow = code.loads.get("16", 0), code.loads.get("1", 0)
    wanted = fewest.get(code.kernel, 0) // (2 if target == "gfx942" else 1)
    if packed and "storage" in case:
        wanted //= 2
    if dequantised:
        wide, wanted = code.loads.get("4" if packed else "8", 0), 2 * wanted
        # Of a chunk of 256 elements Qwen's rows have 160; what is masked for all of a warp may be left out.
        most, wanted = wanted, wanted * 5 // 8 if "qwen" in case else wanted
        stores = code.stores.get("16", 0)
        fits = code.stores.keys() == {"16"} and wanted <= stores <= most
        assert fits, f"{code.kernel}: {wanted} to {most} stores of 16 bytes, got {code.stores}"
    conv_kernels = ("conv_residual_kernel", "advance_state_kernel", "store_conv_kernel", "conv_backward_kernel")
    if code.kernel in conv_kernels:  # what their tiles leave a thread, of warps of 64 and of few tokens
        wide += sum(code.loads.get(width, 0) for width in "84"[: (target == "gfx942") + case.endswith("few")])
    width = (4 if packed else 8) if dequantised else 16
    assert wide >= wanted, f"{code.kernel}: at least {wanted} loads of {width} bytes, got {code.loads}"
    # One for each layout of a mask.
    bytes_read = 12 if any(word in case for word in ("packed", "masked", "slots")) else 0
    bytes_read += (
        4 if any(word in case for word in ("ue8m0-32", "ue8m0-96", "mxfp4-96")) else 0
    )  # one or three scale bytes a row
    decoding = code.kernel in ("lookup_kernel", "hash_lookup_kernel", "probe_cache_kernel") and "storage" not in case
    # 128 scales of a step, two a thread; of nvfp4 twice as many, also where a row of 160 or 32 elements has few.
    bytes_read += 4 if decoding and "nvfp4" in case else 2 if decoding and "v41" in case else 0
    assert narrow <= bytes_read, f"{code.kernel}: at most {bytes_read} loads of one byte, got {code.loads}"


def test_the_report_covers_this_triton_or_says_so():
    """The oldest and the newest supported are in the report, each with every case."""
    report = compile_report.load()
    assert {"3.6", "3.9"} == {version.rsplit(".", 1)[0] for version in report}
    for targets in report.values():
        assert set(targets) == set(TARGETS)
        assert all(set(cases) == set(compile_cases.CASES) for cases in targets.values())


def test_every_kernel_is_compiled():
    """The report lists what the cases launch, and the cases are compared with it."""
    cases = next(iter(compile_report.load().values()))["sm_90"]
    compiled = {code["kernel"] for kernels in cases.values() for code in kernels}
    assert compiled == set(package_kernels())


LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 32, 100, 128, 1000, 2048, 4095, 8192, 16_384)
# What is launched, and the variants of each kernel from 1 to 16,384 tokens: one, another of hashes for few tokens,
# and of the second pass of the convolution one for each height of a tile, two for the highest.
SWEEPS = {
    "models": (
        tuple(compile_cases.CASES[case] for case in ("hash/v41", "lookup/v41", "hash_lookup/v41", "gate/v41")),
        dict(ngram_hash_kernel=2, lookup_kernel=1, hash_lookup_kernel=2, gate_residual_kernel=1),
    ),
    # Three branches: the scalars of T tokens end at a multiple of 16 bytes for every fourth T only.
    "conv": (
        (lambda: compile_cases.conv_case(3, 64, torch.bfloat16, full=True),),
        dict(gate_scale_kernel=1, conv_residual_kernel=5, advance_state_kernel=1),
    ),
    "serving": (
        (
            lambda: compile_cases.conv_slots_case(3, 64, torch.bfloat16),
            lambda: compile_cases.history_case(ring=True),
        ),
        dict(gate_scale_kernel=1, conv_residual_kernel=5, store_conv_kernel=1)
        | dict(copy_tokens_kernel=1, commit_history_kernel=1),
    ),
    "gradients": (
        (lambda: compile_cases.conv_backward_case(3, 64, torch.bfloat16, full=True),),
        dict(conv_backward_kernel=1, conv_gradient_kernel=1, gate_backward_kernel=1, norm_gradient_kernel=1),
    ),
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_variants_over_token_counts(sweep, monkeypatch):
    keys = set()
    run = JITFunction.run

    def watch(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        keys.add((self.fn.__name__, kernel.hash))
        return kernel

    monkeypatch.setattr(JITFunction, "run", watch)
    launches, expected = SWEEPS[sweep]
    with compiling_for("sm_90"):
        for tokens in LENGTHS:
            monkeypatch.setattr(compile_cases, "TOKENS", tokens)
            for launch in launches:
                launch()
    assert {name: sum(kernel == name for kernel, _ in keys) for name, _ in keys} == expected


def test_grids_of_millions_of_tokens(monkeypatch):
    """CUDA takes 2^31 - 1 programs in a grid's first dimension and 65,535 in the others."""
    grids = {}
    with compiling_for("sm_90"), monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *_, grid, **__: grids.update({self.fn.__name__: grid}))
        patch.setattr(compile_cases, "TOKENS", 2**22)
        for case in ("hash/v41", "lookup/27b"):
            compile_cases.CASES[case]()
        compile_cases.gate_case(1, 8, torch.bfloat16)
        compile_cases.conv_case(1, 8, torch.bfloat16, full=True)
        compile_cases.conv_backward_case(1, 8, torch.bfloat16, full=True)
    assert len(grids) >= 10
    assert all(grid[0] < 2**31 and max((0, *grid[1:])) < 2**16 for grid in grids.values()), grids


def test_stub_driver_is_taken_back():
    from triton.runtime import driver

    before, run = driver._active, JITFunction.run
    with pytest.raises(ZeroDivisionError), compiling_for("sm_90"):
        torch.tensor(1 // 0)
    assert driver._active is before and JITFunction.run is run
