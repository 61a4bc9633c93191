"""Peers' kernels out of a folder: the loader on a small package, the adapters with stand-ins for the kernels."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.ops import bench_gate_backward
from bench.peers import adapters as peers
from bench.peers import inputs as peer_inputs
from bench.peers import sglang as sglang_peer
from bench.peers import vllm as vllm_peer
from bench.peers.files import MissingPeer, load_functions
from bench.running import suite
from bench.running.cases import Case, load_cases
from engram_kernels import reference
from tests.support.patience import HANG

from .toys import FakeTimer, ample

ROOT = Path(__file__).parents[2]
#: Like the real ones: imports that exist nowhere, tl from elsewhere, a constant that the platform decides, a helper.
SOURCE = """
from typing import Optional
import heavy_engine
from heavy_engine.triton_utils import tl, triton
from heavy_engine.platforms import current_platform

logger = heavy_engine.init_logger(__name__)
STEP = 2
ON_ROCM = tl.constexpr(current_platform.is_rocm())


@triton.jit
def twice(x):
    return x * STEP_


STEP_ = tl.constexpr(STEP)


@triton.jit(do_not_specialize=["count"])
def double_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr, FLAG: tl.constexpr if ON_ROCM else None):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, twice(tl.load(x_ptr + offs, mask=offs < count, other=0)), mask=offs < count)


def double(x, out: Optional[object] = None):
    double_kernel[(triton.cdiv(len(x), 4),)](x, out, len(x), BLOCK=4, FLAG=0)
    return out


class Engine(heavy_engine.Base):
    pass


def needs_more(x):
    return heavy_engine.run(x)
"""
RUN = """
import sys
import torch
from pathlib import Path
from bench.peers.files import load_functions
double = load_functions(Path(sys.argv[1]), ["double"]).double
x = torch.arange(7, dtype=torch.int32)
assert double(x, torch.full_like(x, -1)).tolist() == [0, 2, 4, 6, 8, 10, 12]
print("ran")
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "engine.py"
    path.write_text(SOURCE)
    return path


def test_a_kernel_runs_without_its_package(source):
    environment = dict(TRITON_INTERPRET="1", PATH="/usr/bin:/bin", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", RUN, str(source)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)
    assert ran.stdout == "ran\n", ran.stderr


def test_only_what_is_needed_is_defined(source):
    loaded = load_functions(source, ["double"])
    names = loaded.double.__globals__
    assert {"double_kernel", "twice", "STEP", "ON_ROCM"} <= names.keys()
    assert not {"Engine", "logger", "heavy_engine", "needs_more"} & names.keys()
    assert "heavy_engine" not in sys.modules
    assert loaded.double.__code__.co_filename == str(source)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("engine.py", None, "is not there"),
        ("engine.py", "def other(): pass", "has no double$"),
        ("engine.py", "def double(:", "cannot be read: .*, line 1"),
        ("engine.py", "from engine_core import run\ndef double(x): return run(x)", "needs run, which it imports"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(MissingPeer, match=message):
        load_functions(tmp_path / name, ["double"])


def test_a_missing_peer_is_one_line(tmp_path):
    gate = tmp_path / "sglang" / list(sglang_peer.FILES)[-1]
    gate.parent.mkdir(parents=True)
    gate.write_text("raise RuntimeError")
    said = []
    found = peers.Peers(tmp_path, said.append)
    assert found.describe() == {} and found.hash([], None) == {} and found.describe() == {}
    assert [line.split(" is left out: ")[0] for line in said] == ["peer vllm", "peer sglang", "peer tilekernels"]
    assert all("\n" not in line and line.endswith(("is not there", "'tile_kernels'")) for line in said), said


def test_versions_come_from_the_wheels(tmp_path):
    path = tmp_path / "vllm" / next(iter(vllm_peer.FILES))
    path.parent.mkdir(parents=True)
    path.write_text("def _hash_ids_kernel(): pass\ndef _engram_lookup_kernel(): pass\n")
    with path.open("a") as file:
        file.write("def _fused_engram_post_wkv_kernel(): pass\n")
    said = []
    assert peers.Peers(tmp_path, said.append).describe() == {"vllm": "unknown"} and len(said) == 2
    (tmp_path / "vllm-0.33.0.dist-info").mkdir()
    assert peers.Peers(tmp_path, said.append).describe() == {"vllm": "0.33.0"}


class Kernel:
    """Stands for a Triton kernel: ``run(grid, *arguments, **options)``."""

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.run(grid, *arguments, **options)


@pytest.fixture
def stand_ins(bench):
    """Peers whose functions are the reference behind the peers' signatures, and which check the arguments' shapes."""
    plan, table = bench.plan("v41", "host"), bench.table("v41", "host")
    split = lambda kv, hidden: (kv[:, : -hidden.shape[-1]].view(hidden.shape), kv[:, -hidden.shape[-1] :])  # noqa: E731

    def hash_kernel(
        grid, ids, token_map, dead, positions, blocks, starts, multipliers, primes, offsets, *rest, **options
    ):
        out, tokens = rest[3], rest[4]
        assert grid == (-(-tokens // 32), 2) and (options["num_heads"], options["MAX_NGRAM"]) == (8, 4)
        assert starts.tolist() == [0, len(ids)] and positions.tolist() == list(range(tokens))
        out.copy_(reference.ngram_hash(ids, plan))

    def lookup_kernel(grid, weight, scale, ids, dst, out, first, last, rows, stride_t, stride_h, **options):
        assert weight.shape == (last, options["DIM"]) == table.weight.shape and scale.shape == table.scale.shape
        assert rows == ids.numel() and (stride_t, stride_h) == ids.stride() and grid == (options["GRID"],)
        out.copy_(reference.lookup(table, ids))

    def gate_kernel(grid, hidden, kv, query_norm, key_norm, mask, out, tokens, *rest, DIM, HC_MULT, **options):
        *strides, eps, clamp = rest
        assert grid == (tokens * HC_MULT,) and len(strides) == 13 and options["BLOCK_SIZE"] >= DIM
        out.copy_(reference.gate_residual(hidden, *split(kv, hidden), query_norm, key_norm, eps=eps, clamp=clamp))

    def engram_hash_ids(ids, positions, *, mode, history, row=None, starts=None, **options):
        assert ids.dtype == torch.int64 and options["primes"].shape == (2, 3, 8) and history.shape == (1, 3)
        assert (row is None and len(ids) == 1) if mode == 0 else len(row) == len(ids)
        return reference.ngram_hash(ids, plan), None

    def engram_gather(weight, scale, ids, out, width, group, row_hi, sort_ids):
        assert (weight, scale) == (table.weight.data_ptr(), table.scale.data_ptr()) and ids.is_contiguous()
        out.copy_(reference.lookup(table, ids))

    def fused_engram_gate(hidden, kv, query_norm, key_norm, eps, clamp):
        return reference.gate_residual(hidden, *split(kv, hidden), query_norm, key_norm, eps=eps, clamp=clamp)

    def engram_gate_fwd(
        hidden_states,
        kv,
        weight_fused,
        eps,
        clamp_value,
        save_for_backward=True,
        image_token_mask=None,
        inplace=False,
    ):
        """Parameters as in TileKernels 2.1.0. The norms' product alone is known: the gate is that of both in one."""
        tokens, branches, width = hidden_states.shape
        assert kv.shape == (tokens, branches + 1, width) and kv.is_contiguous() and weight_fused.dtype == torch.float32
        assert image_token_mask is None and not inplace
        parts = kv[:, :-1], kv[:, -1], weight_fused, torch.ones_like(weight_fused)
        out = reference.gate_residual(hidden_states, *parts, eps=eps, clamp=clamp_value)
        return (out, *("dot", "gate", "rstd_x", "rstd_k")) if save_for_backward else (out, None, None, None, None)

    def engram_gate_bwd(
        grad_out,
        hidden_states,
        kv,
        weight_fused,
        dot,
        gate_score,
        rstd_x,
        rstd_k,
        clamp_value,
        image_token_mask=None,
    ):
        assert (dot, gate_score, rstd_x, rstd_k) == ("dot", "gate", "rstd_x", "rstd_k") and image_token_mask is None
        leaves = [x.detach().requires_grad_() for x in (hidden_states, kv, weight_fused)]
        hidden, both, weight = leaves
        parts = both[:, :-1], both[:, -1], weight, torch.ones_like(weight)
        out = reference.gate_residual(hidden, *parts, eps=bench.config("v41").eps, clamp=clamp_value)
        of_hidden, of_kv, product = torch.autograd.grad(out, leaves, grad_out)
        assert of_kv.shape == kv.shape
        return of_hidden, of_kv, product[None]

    def grad_w_reduce(parts, query_norm, key_norm, grad_query_norm, grad_key_norm):
        grad_query_norm += parts.sum(0) * key_norm
        grad_key_norm += parts.sum(0) * query_norm

    found = peers.Peers(Path("nowhere"))
    kernels = dict(_hash_ids_kernel=hash_kernel, _engram_lookup_kernel=lookup_kernel)
    kernels["_fused_engram_post_wkv_kernel"] = gate_kernel
    found.vllm = SimpleNamespace(**{name: Kernel(run) for name, run in kernels.items()})
    found.sglang = SimpleNamespace(
        engram_hash_ids=engram_hash_ids, engram_gather=engram_gather, fused_engram_gate=fused_engram_gate
    )
    found.tilekernels = SimpleNamespace(
        engram_gate_fwd=engram_gate_fwd, engram_gate_bwd=engram_gate_bwd, grad_w_reduce=grad_w_reduce
    )
    bench.peers = found
    yield found
    bench.peers = None


WITH_PEERS = [
    case
    for case in load_cases()
    if case.tokens in (1, 8) and case.variant in ("", "uniform", "host/uniform") and case.op != "gate_conv_residual"
]


@pytest.mark.parametrize("case", WITH_PEERS, ids=lambda case: case.name)
def test_peers_are_baselines_of_v41(case, bench, stand_ins):
    record = suite.run_case(case, bench, FakeTimer(), ample(), most_baselines=1)
    assert record["status"] == "ok"
    of_ops = {"gate_residual": ["vllm", "sglang", "tilekernels"]}
    wanted = of_ops.get(case.op, ["vllm", "sglang"]) if case.model == "v41" else []
    assert [name for name in record["baselines"] if name in peers.NAMES] == wanted
    assert len(record["baselines"]) == len(wanted) + 1, "peers do not count among the others"
    assert not any("failed" in entry for entry in record["baselines"].values()), record["baselines"]


@pytest.mark.parametrize("variant", bench_gate_backward.VARIANTS)
def test_gradients_of_a_peer(variant, bench, stand_ins):
    """Checked as ours are."""

    def run():
        case = Case("gate_residual_backward", "v41", variant, 3, 0, prepare)
        return suite.run_case(case, bench, FakeTimer(), ample(), most_baselines=0)["baselines"]["tilekernels"]

    prepare = partial(bench_gate_backward.prepare, "v41", variant, 3, False)
    assert "failed" not in (entry := run()), entry
    stand_ins.tilekernels.grad_w_reduce = lambda *arguments: None
    assert "off the reference" in run()["failed"]


@pytest.fixture
def packed(bench):
    """Requests of several lengths, two of them new, one after two tokens; the plan, ids with dead ones, and row ids."""
    plan = bench.plan("v41", "host")
    cu = torch.tensor([0, 1, 17, 20, 29, 41, 43, 57, 64], dtype=torch.int32)
    history = torch.randint(100, 100_000, (8, 3), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    history[[0, 3]] = -1
    history[4, 0] = -1
    ids = bench.token_ids("uniform", "v41", 64, 3)
    ids[ids == 77] += 1
    ids[[4, 5, 6, 30, 31, 50]] = 77
    requests = peer_inputs.Requests(cu, history, dead_id=77)
    return plan, ids, requests, reference.ngram_hash(ids, plan, cu_seqlens=cu, history=history, dead=ids == 77)


def test_positions_follow_from_history(packed):
    *_, requests, _ = packed
    starts = requests.positions()[requests.cu_seqlens[:-1].long()]
    assert starts.tolist() == [0, 3, 3, 0, 2, 3, 3, 3]
    assert requests.positions()[17:20].tolist() == [3, 4, 5] and requests.dead(torch.tensor([77, 7])).tolist() == [1, 0]


def test_vllm_gets_packed_requests(packed):
    plan, ids, requests, expected = packed

    def kernel(grid, ids, token_map, dead, positions, blocks, starts, *rest, **options):
        history, out, pad = rest[4].flip(1), rest[6], rest[9]
        assert (options["num_query_rows"], options["lookback_depth"], pad) == (8, 3, plan.pad)
        assert torch.equal(positions, requests.positions()) and not rest[5].any()
        out.copy_(reference.ngram_hash(ids, plan, cu_seqlens=starts, history=history, dead=dead))

    kernels = SimpleNamespace(_hash_ids_kernel=Kernel(kernel))
    assert torch.equal(vllm_peer.hash(kernels, [ids], plan, requests)(0), expected)


def test_sglang_extends_packed_requests(packed):
    plan, ids, requests, expected = packed

    def extend(ids, positions, *, history, commit_history, req_slots, starts, lengths, num_real, **options):
        assert commit_history.data_ptr() != history.data_ptr() and req_slots.tolist() == list(range(8))
        assert options["history_via_slots"] and options["out_cache_loc"] is None and num_real == len(ids)
        known = torch.where(torch.arange(3, 0, -1) <= positions[starts.long()][:, None], history, -1)
        cu = torch.cat([starts, starts[-1:] + lengths[-1:]])
        dead = ids == options["image_token_id"]
        return reference.ngram_hash(ids.int(), plan, cu_seqlens=cu, history=known, dead=dead)

    functions = SimpleNamespace(engram_hash_extend_and_commit=extend)
    assert torch.equal(sglang_peer.hash(functions, [ids], plan, requests)(0), expected)


def test_sglang_decodes_and_commits(bench):
    plan = bench.plan("v41", "host")
    ids = bench.token_ids("uniform", "v41", 4, 3)
    history = torch.arange(100, 112, dtype=torch.int32).view(4, 3)
    requests = peer_inputs.Requests(torch.arange(5, dtype=torch.int32), history)

    def decode(ids, positions, *, history, req_slots, out_cache_loc, **options):
        assert out_cache_loc.all() and (positions >= 3).all() and "image_token_id" not in options
        out = reference.ngram_hash(ids.int(), plan, cu_seqlens=torch.arange(5, dtype=torch.int32), history=history)
        history += 1  # a commit must not reach the next call
        return out

    call = sglang_peer.hash(SimpleNamespace(engram_hash_ids_and_commit=decode), [ids], plan, requests)
    expected = reference.ngram_hash(ids, plan, cu_seqlens=requests.cu_seqlens, history=history)
    assert torch.equal(call(0), expected) and torch.equal(call(0), expected) and history[0, 0] == 100


def test_launchers_run_without_their_asserts(tmp_path):
    path = tmp_path / "engine.py"
    path.write_text("def run(x):\n    if x:\n        assert x.is_cuda\n    assert False, 'of a GPU'\n    return x\n")
    with pytest.raises(AssertionError):
        load_functions(path, ["run"]).run(0)
    assert load_functions(path, ["run"], asserts=False).run(3) == 3


def test_a_wrong_peer_has_no_time(bench, stand_ins):
    stand_ins.vllm._engram_lookup_kernel = Kernel(lambda *arguments, **options: None)
    stand_ins.vllm._fused_engram_post_wkv_kernel = Kernel(lambda *arguments, **options: None)
    for op in ("lookup", "gate_residual"):
        case = next(case for case in WITH_PEERS if (case.op, case.model) == (op, "v41"))
        entry = suite.run_case(case, bench, FakeTimer(), ample(), most_baselines=0)["baselines"]["vllm"]
        assert list(entry) == ["failed"] and "reference" in entry["failed"]


def test_key_and_value_of_two_tensors_are_refused():
    with pytest.raises(ValueError, match="right behind"):
        peer_inputs.whole_kv(torch.zeros(2, 4, 8), torch.zeros(2, 8))
