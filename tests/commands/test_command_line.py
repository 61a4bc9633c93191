"""The program as a whole: what help and mistakes cost, the list of commands, exit codes, and models by their files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engram_kernels import EngramConfig
from engram_kernels.__main__ import main
from engram_kernels.commands import size
from engram_kernels.commands.arguments import EXIT_CODES
from engram_kernels.commands.presets import PRESETS
from tests.support.checkpoints import V41, V41_FIELDS, save_config
from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
COMMANDS = ("demo", "info", "size", "cache", "table")
PROGRAMS = [
    [],
    *([name] for name in COMMANDS),
    *(["table", name] for name in ("inspect", "verify", "convert", "shared")),
]
LIGHT = """
import contextlib, io, json, sys
from engram_kernels.__main__ import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, out.getvalue(), errors.getvalue()]))
print(json.dumps([name for name in ("torch", "triton", "numpy", "sympy", "safetensors") if name in sys.modules]))
"""


def without_imports(*lines):
    """(exit code, output, errors) of each command, of a process which must not have imported anything heavy."""
    command = [sys.executable, "-c", LIGHT, json.dumps(lines)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=True)
    *found, imported = map(json.loads, done.stdout.splitlines())
    assert imported == []
    return found


def test_help_imports_nothing_heavy():
    for code, text, errors in without_imports(*(words + ["--help"] for words in PROGRAMS), ["--version"]):
        assert code == 0 and errors == ""
        assert text.startswith("engram_kernels 0.") or EXIT_CODES in text


def test_mistakes_in_arguments_import_nothing_heavy():
    """One line each, and nothing on stdout."""
    lines = {
        ("tabel",): "invalid choice: 'tabel'",
        ("size", "--hit-rate", "2"): "argument --hit-rate: expected a number from 0 to 1, got '2'",
        ("size", "--config", "gpt"): "argument --config: expected one of deepseek_v41_flash, ",
        ("size", "--config", "/"): "a config.json or a folder with one, got '/'",
        ("cache", "--text", "/nope"): "argument --text: no such file: /nope",
        ("cache", "--text", "/", "--entries", str(2**31)): "expected a whole number from 1 to 2147483647, got",
        ("cache", "--text", "/", "--plot", "/no/where/x.png"): "argument --plot: no folder /no/where for /no/where/x",
        ("cache",): "the following arguments are required: --text",
        ("demo", "--tokens", "0"): "expected a whole number of at least 1, got '0'",
        ("info", "more"): "unrecognized arguments: more",
        ("table", "verify", "/nope"): "argument FILE: no such file: /nope",
        ("table", "inspect"): "the following arguments are required: FILE",
        ("table", "convert", "/", "--out", "x", "--format", "int8"): "invalid choice: 'int8'",
    }
    for (words, message), (code, text, errors) in zip(lines.items(), without_imports(*lines), strict=True):
        assert code == 2 and text == "" and errors.count("\n") == 1, words
        assert errors.startswith("engram-kernels") and message in errors, errors


def test_without_a_command_they_are_listed_in_one_line_each():
    (code, text, errors), (table_code, table_text, _) = without_imports([], ["table"])
    assert (code, table_code, errors) == (0, 0, "")
    assert re.findall(r"^    (\w+) {3,}\w.*$", text, re.M) == [*COMMANDS]
    assert re.findall(r"^    (\w+) {3,}\w.*$", table_text, re.M) == ["inspect", "verify", "convert", "shared"]
    assert len(re.findall(r"^    ", text, re.M)) == len(COMMANDS)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (RuntimeError("unforeseen"), 3, "RuntimeError: unforeseen\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left on device"), 2, "engram-kernels size: [Errno 28] No space left on device\n"),
    ],
)
def test_exit_codes_of_what_goes_wrong(monkeypatch, capfd, error, code, message):
    """An error of the program is no failed check."""

    def fail(arguments):
        raise error

    monkeypatch.setattr(size, "run", fail)
    monkeypatch.setattr("engram_kernels.__main__._drop_output", lambda: None)
    assert main(["size"]) == code
    text, errors = capfd.readouterr()
    assert text == "" and errors.endswith(message) and ("Traceback" in errors) == (code == 3)


def test_a_full_disk_takes_help_as_any_output():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "engram_kernels"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANG)
    assert done.returncode == 2 and done.stderr == "engram-kernels: [Errno 28] No space left on device\n"


def test_models_by_their_config(tmp_path, capsys):
    """The file, or a folder with it, wherever a preset is taken; what is wrong with it is one line."""
    save_config(tmp_path, **V41_FIELDS)
    for path in (tmp_path, tmp_path / "config.json"):
        assert main(["size", "--config", str(path), "--ranks", "2", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["config"] == str(tmp_path / "config.json")
        assert [layer["rows"] for layer in facts["layers"]] == list(V41.rows_per_layer)
    (tmp_path / "config.json").write_text("[" * 10**5)
    assert main(["size", "--config", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"engram-kernels size: --config {tmp_path / 'config.json'}: ")


def test_presets_are_those_of_the_config():
    made = [name for name, value in vars(EngramConfig).items() if isinstance(value, classmethod)]
    assert sorted(PRESETS) == sorted(set(made) - {"from_hf"})
