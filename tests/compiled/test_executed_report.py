"""What is executed: the committed report, recounted in part, the documents made of it, and the check of results."""

import subprocess
import sys

import pytest
import torch
import triton

from bench.peers import vllm as vllm_peer
from engram_kernels import EngramConfig, EngramTable, HashPlan, hash_lookup, reference
from tests.project.test_layout import ROOT
from tests.reports import compile_report, executed_report, peers_report
from tests.reports.executed_jobs import Job, jobs, packed_requests

STALE = "kernels execute other instructions than the report says: make compile-report"


def recount(family, count):
    """The first jobs of a family, as the report counts them."""
    found = {}
    with executed_report.counting_machine() as machine:
        for job in jobs(families=[family]):
            found[job.name] = executed_report.count(machine, job, job.ours)
            if len(found) == count:
                return found


@pytest.mark.compile
@pytest.mark.parametrize("family, count", [("hash", 3), ("lookup", 1), ("history", 2)])
def test_the_report_is_what_is_executed(family, count):
    report = executed_report.load()
    if triton.__version__ not in report:
        pytest.skip(f"the report has no Triton {triton.__version__}")
    for name, entry in recount(family, count).items():
        assert entry == report[triton.__version__].get(name), f"{name}: {STALE}"


@pytest.mark.compile
def test_another_target_prints_a_table():
    """Its machine code differs, and is understood too. In a process of its own: Triton keeps what it compiled."""
    command = [sys.executable, "-m", "tests.reports.executed_report", "lookup", "--target", "sm_80"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = [
        [cell.strip() for cell in line.split("|")] for line in ran.stdout.splitlines() if line.startswith("| lookup")
    ]
    assert len(rows) == 6 and all(row[-2] == "equal" for row in rows), ran.stdout  # a doubt would stand behind it
    one_step, several = (float(row[3].strip("*")) for row in rows[:2])
    assert one_step > several > 10, "four programs share their set-up among more rows"


def test_the_report_covers_the_oldest_and_the_newest_triton():
    report = executed_report.load()
    assert {"3.6", "3.9"} == {version.rsplit(".", 1)[0] for version in report}
    first, second = report.values()
    assert list(first) == list(second) and len(first) >= 25
    launched = {launch["kernel"] for entry in first.values() for launch in entry["launches"]}
    assert len(launched) >= 15, "jobs launch most kernels of the package"


def test_no_count_is_in_doubt():
    reports = (executed_report.load(), peers_report.executed_report.load(peers_report.JSON))
    entries = [entry for report in reports for found in report.values() for entry in found.values()]
    entries = [each for entry in entries for each in ([entry] if "launches" in entry else entry.values())]
    assert len(entries) > 60
    assert not [launch["doubts"] for entry in entries for launch in entry["launches"] if launch["doubts"]]


def test_documents_are_made_of_the_reports():
    executed = executed_report.load()
    text = (ROOT / "docs" / "compile_report.md").read_text()
    assert text == compile_report.markdown(compile_report.load(), executed), "make compile-report"
    peers = executed_report.load(peers_report.JSON)
    assert peers_report.MARKDOWN.read_text() == peers_report.markdown(executed, peers), "make compile-report"


def test_a_report_reads_as_it_was_written(tmp_path):
    report = {"3.9.0": {"b": {"x": [1]}, "a": {"x": [2]}}, "3.10.0": {"a": {}}}
    executed_report.save(tmp_path / "report.json", report)
    again = executed_report.load(tmp_path / "report.json")
    assert again == report and list(again["3.9.0"]) == ["b", "a"]
    assert (tmp_path / "report.json").read_text().count("\n") == 9, "a job a line"
    assert executed_report.newest_first(report) == ["3.10.0", "3.9.0"]


@pytest.mark.parametrize(
    "value, text", [(16416.0, "16,416"), (96.5, "96.5"), (134.84, "134.8"), (0.04, "0.04"), (0, "0")]
)
def test_numbers_have_three_or_four_digits(value, text):
    assert executed_report.number(value) == text


class TestVerdict:
    exact = torch.arange(2000.0)

    def job(self, **options):
        return Job("a job", "row", 1, [self.exact], lambda: None, **options)

    def test_equal(self):
        assert self.job().verdict(self.exact.clone()) == "equal"
        assert self.job(places=3).verdict([torch.tensor([0.0, 1, 2] + [9.0] * 1997)]) == "equal"

    @pytest.mark.parametrize("differing, wrong", [(0.0, 1), (1e-3, 3)])
    def test_more_differ_than_may(self, differing, wrong):
        found = self.exact.clone()
        found[5 : 5 + wrong] += 2.0**-20
        with pytest.raises(ValueError, match=f"{wrong} of 2000 elements"):
            self.job(differing=differing).verdict(found)

    def test_some_may_differ_by_little(self):
        found = self.exact.clone()
        found[5:7] *= 1 + 2.0**-20
        assert self.job(differing=1e-3).verdict(found) == "2 of 2000 differ in the last bits"
        found[5] += 1
        with pytest.raises(AssertionError, match="a job: "):
            self.job(differing=1e-3).verdict(found)

    def test_nan_is_not_close(self):
        found = self.exact.clone()
        found[7] = float("nan")
        with pytest.raises(AssertionError):
            self.job(differing=1e-3).verdict(found)

    def test_wider_integers_of_a_peer(self):
        job = Job("a job", "row", 1, [torch.tensor([1, 2], dtype=torch.int32)], lambda: None)
        assert job.verdict(torch.tensor([1, 2])) == "equal"


#: A peer's lookup, of the parameters that vLLM's has; FACTOR is 1 where it is right.
LOOKUP = """
from somewhere.else_ import tl, triton


@triton.jit
def _hash_ids_kernel(x):
    pass


@triton.jit
def _fused_engram_post_wkv_kernel(x):
    pass


@triton.jit
def _engram_lookup_kernel(
    weight, scale, ids, dst, out, first, last, rows, stride_t, stride_h,
    HEAD_START: tl.constexpr, LOCAL_HEADS: tl.constexpr, TOTAL_HEADS: tl.constexpr, DIM: tl.constexpr,
    QUANT_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, GRID: tl.constexpr, SORTED: tl.constexpr, PACKED: tl.constexpr,
    OUT_STRIDE: tl.constexpr, PEER_ROWS: tl.constexpr,
):
    offs = tl.arange(0, DIM)
    for row in range(tl.program_id(0), rows, GRID):
        at = tl.load(ids + row // LOCAL_HEADS * stride_t + row % LOCAL_HEADS * stride_h).to(tl.int64)
        exponent = tl.load(scale + at * (DIM // QUANT_BLOCK) + offs // QUANT_BLOCK).to(tl.int32)
        value = tl.load(weight + at * DIM + offs).to(tl.float32) * (exponent << 23).to(tl.float32, bitcast=True)
        tl.store(out + row * DIM + offs, (value * FACTOR).to(tl.bfloat16))
"""


@pytest.fixture
def peer(tmp_path):
    """A folder with a stand-in for vLLM's file."""

    def write(factor):
        path = tmp_path / "vllm" / next(iter(vllm_peer.FILES))
        path.parent.mkdir(parents=True)
        path.write_text(LOOKUP.replace("FACTOR", str(factor)))
        (tmp_path / "vllm-1.2.3.dist-info").mkdir()
        return tmp_path

    return write


@pytest.mark.compile
def test_peers_are_counted_on_the_same_jobs(peer):
    said = []
    found = peers_report.measure(peer(1.0), families=["lookup"], say=said.append)
    assert [list(entries) for entries in found.values()] == [["vLLM 1.2.3"]] * 2
    first, second = (entries["vLLM 1.2.3"] for entries in found.values())
    assert first["result"] == second["result"] == "equal"
    assert first["launches"][0]["programs"] == 24 and second["launches"][0]["programs"] == 4
    assert first["instructions"] > second["instructions"] > 40, "the set-up is shared by more rows"
    assert any("sglang is left out" in line for line in said)
    ours = {job: executed_report.load()["3.9.0"][job] for job in found}
    text = peers_report.markdown({"3.9.0": ours}, {"3.9.0": found})
    assert "| lookup v41, 16 tokens: vLLM | row | **" in text and "vLLM 1.2.3 beside ours" in text


@pytest.mark.compile
def test_a_peer_with_wrong_results_is_not_counted(peer):
    with pytest.raises(ValueError, match="elements differ from the reference"):
        peers_report.measure(peer(2.0), families=["lookup"], say=lambda line: None)


def test_a_folder_without_peers_is_said(tmp_path):
    with pytest.raises(SystemExit, match="holds no peer"):
        peers_report.measure(tmp_path, say=lambda line: None)


def test_packed_requests_are_what_they_say():
    requests = packed_requests(3)
    assert int(requests.cu_seqlens[-1]) == 64 and requests.lengths.tolist() == [1, 16, 3, 9, 12, 2, 14, 7]
    assert (requests.history < 0).sum(1).tolist() == [3, 0, 0, 3, 1, 0, 0, 0]


def _chain(ids, plan, tables, **options):
    """The longest chain of dependent loads ahead of the first store of one hash_lookup."""
    expected = list(reference.hash_lookup(ids, plan, tables, **options))
    name = f"{len(ids)} tokens"
    job = Job(name, "row", ids.numel(), expected, lambda: hash_lookup(ids, plan, tables, order="direct", **options))
    with executed_report.counting_machine() as machine:
        (launch,) = executed_report.count(machine, job, job.ours)["launches"]
    return launch["chain"]


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_rows_of_few_tokens_wait_for_ids_and_their_map_alone(tokens):
    """A row, with its scale beside it, is the third load of V4.1's chain, and the second of a plan without a map.

    Parameters of columns, descriptors and multipliers are on their way meanwhile. History by slot adds one: its ids
    wait for the slot, where a token's own come at once.
    """
    config = EngramConfig.deepseek_v41_flash()
    numbers = torch.full((2, config.max_ngram), 12345), torch.full((2, config.columns), 61)
    token_map = torch.arange(500) % 100
    mapped = HashPlan.from_parts(*numbers, pad=0, token_map=token_map)
    bare = HashPlan.from_parts(*numbers, pad=0, vocab_size=500)
    rows = torch.zeros(mapped.rows_per_layer[0], config.row_width, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((len(rows), config.row_width // 32), 127, dtype=torch.uint8)
    tables = [EngramTable.from_tensors(rows, scales, placement="cpu") for _ in config.layers]
    ids = torch.arange(tokens) + 5
    assert _chain(ids, mapped, tables) == 3 and _chain(ids, bare, tables) == 2
    slots = dict(history=torch.arange(12).view(4, 3), slots=torch.arange(tokens, dtype=torch.int32) % 4)
    assert _chain(ids[:, None], mapped, tables, **slots) == 4
