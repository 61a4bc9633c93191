"""The Makefile against fake interpreters: what it runs, when it sets up, and what it says when it cannot.

A fake is a shell script that logs its arguments. `-c` goes to the real Python, after a prologue that takes something
away; `-m venv DIR` makes DIR/bin/python another fake; every other command does nothing. No network, nothing installed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
# A `make` above this test would pass its own variables down, MAKEFLAGS among them.
OURS = {"PYTHON", "VENV", "TORCH", "TRITON", "JOBS", "ARGS", "OUT", "MFLAGS", "TRITON_INTERPRET"}
ENV = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("MAKE")}

NO_VENV = "import sys; sys.modules['ensurepip'] = None"
NO_PIP = "import sys; sys.modules['pip'] = None"
OLD = "import platform, sys; sys.version_info = (3, 10, 13); platform.python_version = lambda: '3.10.13'"
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


class Checkout:
    """The two files that the Makefile reads, in a folder of their own, and a log of what the fakes were asked to do."""

    def __init__(self, folder):
        self.folder = folder
        self.log = folder / "log"
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)

    def fake(self, path, prologue="", inside="", version="Python 3.11.7"):
        """An interpreter at `path`; environments that it makes hold one with the prologue `inside`."""
        if inside is not None:
            self.fake(f"{path}.inside", prologue=inside, inside=None)
        script = self.folder / path
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(
            f"""#!/bin/sh
[ "$1" = --version ] && echo "{version}" && exit
[ "$1" = -c ] && exec "{sys.executable}" -c "{prologue}
$2"
echo "TRITON_INTERPRET=$TRITON_INTERPRET" "$@" >> "{self.log}"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0.inside" "$3/bin/python"; fi
"""
        )
        script.chmod(0o755)
        return f"./{path}"

    def make(self, *words, code=0, env=None):
        """Runs make; returns its output and the commands the fakes got."""
        self.log.write_text("")
        done = subprocess.run(
            ["make", *words], cwd=self.folder, env={**ENV, **(env or {})}, capture_output=True, text=True, timeout=HANG
        )
        assert (done.returncode != 0) == (code != 0), done.stdout + done.stderr
        return done, self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def error_line(done):
    """The one line that is not make's own."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def installs(commands):
    return [c.split(" ", 1)[1] for c in commands if "-m pip" in c or "-m venv" in c]


def test_test_sets_up_then_runs_its_lanes(checkout):
    python = checkout.fake("python")
    _, commands = checkout.make("test", f"PYTHON={python}", "JOBS=3", env={"TRITON_INTERPRET": "1"})
    pip = "-m pip install --disable-pip-version-check"
    oldest = checkout.folder / "build" / "triton-3.6.0"
    assert commands == [
        "TRITON_INTERPRET= -m venv .venv",
        f"TRITON_INTERPRET= {pip} torch>=2.11",
        f"TRITON_INTERPRET= {pip} --quiet triton>=3.6",
        f"TRITON_INTERPRET= {pip} --quiet --editable .[test]",
        "TRITON_INTERPRET= -m tests.reports.site",
        "TRITON_INTERPRET= -m pytest -n 3 --lane cpu --cases few tests",
        "TRITON_INTERPRET=1 -m pytest -n 3 --lane interpret --cases few tests",
        "TRITON_INTERPRET= -m pytest -n 3 --lane compile --cases few tests",
        "TRITON_INTERPRET= -m pytest -n 3 --lane machine --cases few tests",
        "TRITON_INTERPRET= -m tests.mutation --few --jobs 3",
        f"TRITON_INTERPRET= {pip} --quiet --no-deps --target {oldest}.part triton==3.6.0 numpy<2.4",
        "TRITON_INTERPRET= -m pytest -n 3 --lane machine --target sm_80 --cases one tests",
    ]
    assert sorted(p.name for p in checkout.folder.iterdir()) == sorted(
        [".venv", "build", "Makefile", "log", "pyproject.toml", "python", "python.inside"]
    ), "a version bound was taken for a redirection"


def test_lanes_run_alone(checkout):
    python = checkout.fake("python")
    for lane, interpret in (("cpu", ""), ("interpret", "1"), ("compile", ""), ("machine", "")):
        _, commands = checkout.make(f"test-{lane}", f"PYTHON={python}", "VENV=", "ARGS=-k hash")
        assert commands == [f"TRITON_INTERPRET={interpret} -m pytest -n 2 --lane {lane} --cases all tests -k hash"]


def test_all_cases_before_a_release(checkout):
    python = checkout.fake("python")
    _, commands = checkout.make("test", f"PYTHON={python}", "CASES=all")
    assert len([c for c in commands if "--cases all tests" in c]) == 4
    assert "TRITON_INTERPRET= -m tests.mutation --jobs 2" in commands
    _, commands = checkout.make("test-oldest", f"PYTHON={python}")
    assert commands == [
        "TRITON_INTERPRET=1 -m pytest -n 2 --lane interpret -m not graphs --cases one tests",
        "TRITON_INTERPRET= -m pytest -n 2 --lane compile tests",
        "TRITON_INTERPRET= -m pytest -n 2 --lane machine --target sm_80 --cases one tests",
    ]


def test_second_run_installs_nothing(checkout):
    python = checkout.fake("python")
    _, first = checkout.make("test-cpu", f"PYTHON={python}")
    assert len(installs(first)) == 4
    _, second = checkout.make("test-cpu", f"PYTHON={python}")
    assert installs(second) == []
    checkout.make("test-oldest", f"PYTHON={python}")
    plan, _ = checkout.make("-n", "test", f"PYTHON={python}")
    assert "pip" not in plan.stdout
    assert len(re.findall("-m pytest", plan.stdout)) == 5


@pytest.mark.parametrize("change", ["pyproject", "TORCH", "TRITON", "PYTHON", "version"])
def test_stamp_is_keyed(checkout, change):
    python = checkout.fake("python")
    words = ["test-cpu", f"PYTHON={python}"]
    checkout.make(*words)
    changed = list(words)
    if change == "pyproject":
        with (checkout.folder / "pyproject.toml").open("a") as f:
            f.write("# changed\n")
    elif change == "version":
        checkout.fake("python", version="Python 3.11.8")
    elif change == "PYTHON":
        changed[1] = f"PYTHON={checkout.fake('other')}"
    else:
        changed.append(f"{change}={change.lower()}==3.8.0")
    _, commands = checkout.make(*changed)
    assert len(installs(commands)) == 3, "the environment is kept, its packages are brought up to date"
    assert installs(checkout.make(*changed)[1]) == []
    if change in ("TORCH", "TRITON"):
        assert len(installs(checkout.make(*words)[1])) == 3, "the stamp of the first set-up outlived the second"


def test_a_failed_installation_leaves_no_stamp(checkout):
    python = checkout.fake("python")
    checkout.make("test-cpu", f"PYTHON={python}")
    broken = checkout.folder / ".venv" / "bin" / "python"
    sound = broken.read_text()
    broken.write_text(sound + 'case "$*" in *triton*) exit 1 ;; esac\n')
    _, commands = checkout.make("test-cpu", f"PYTHON={python}", "TORCH=torch==2.12.0", code=2)
    assert len(installs(commands)) == 2
    broken.write_text(sound)
    assert len(installs(checkout.make("test-cpu", f"PYTHON={python}")[1])) == 3


def test_each_extra_is_set_up_when_first_needed(checkout):
    python = checkout.fake("python")
    _, commands = checkout.make("demo", f"PYTHON={python}", "ARGS=--help")
    assert installs(commands)[-1].endswith("--editable .[demo]")
    assert commands[-1].endswith("-m engram_kernels demo --help")
    _, commands = checkout.make("bench", f"PYTHON={python}")
    assert installs(commands)[-1].endswith("--editable .[bench]")
    assert commands[-1].endswith("-m bench")
    assert installs(checkout.make("demo", f"PYTHON={python}")[1]) == []


def test_variables_are_words_of_pip(checkout):
    python = checkout.fake("python")
    torch = "torch==2.13.* --index-url https://example.org/whl/cpu"
    (checkout.folder / "torch==2.13.x").touch()  # what the shell would make of the star
    triton = "triton>=3.6,<3.7 numpy<2.4"
    _, commands = checkout.make("test-cpu", f"PYTHON={python}", f"TORCH={torch}", env={"TRITON": triton})
    assert [c.split("version-check ")[1] for c in installs(commands)[1:3]] == [torch, f"--quiet {triton}"]
    log_argv = checkout.folder / ".venv" / "bin" / "python"
    log_argv.write_text(log_argv.read_text().replace('"$@" >>', '"$#" >>'))
    _, commands = checkout.make("test-cpu", f"PYTHON={python}", f"TORCH={torch}")
    assert commands[0] == "TRITON_INTERPRET= 7", "-m pip install --disable-pip-version-check and three words"


def test_empty_venv_uses_the_interpreter_and_installs_nothing(checkout):
    python = checkout.fake("python", prologue=NO_VENV)
    checkout.fake("path/lint-imports", inside=None)
    path = f"{checkout.folder / 'path'}:{os.environ['PATH']}"
    words = ["test", "demo", "bench", "lint", f"PYTHON={python}", "VENV="]
    done, (*commands, last) = checkout.make(*words, env={"PATH": path})
    assert installs(commands) == []
    assert not (checkout.folder / ".venv").exists()
    modules = [c.split("-m ")[1].split()[0] for c in commands]
    assert modules == [*["pytest"] * 4, "tests.mutation", "engram_kernels", "bench", "ruff", "ruff"]
    assert last == "TRITON_INTERPRET= --no-cache", "lint-imports, which is no module"
    assert done.stderr == ""


def test_lint_checks_imports_with_the_environments_own_tool(checkout):
    python = checkout.fake("python")
    checkout.make("test-cpu", f"PYTHON={python}")
    checkout.fake(".venv/bin/lint-imports", inside=None)
    _, commands = checkout.make("lint", f"PYTHON={python}")
    assert [c.split(" ", 1)[1] for c in commands] == ["-m ruff check .", "-m ruff format --check .", "--no-cache"]


def test_gpu_uses_the_active_interpreter(checkout):
    python = checkout.fake("python", prologue=NO_VENV)
    _, commands = checkout.make("gpu", f"PYTHON={python}", env={"TRITON_INTERPRET": "1"})
    assert commands == ["TRITON_INTERPRET= -m tests.gpu --out build/gpu"]
    _, commands = checkout.make("gpu", f"PYTHON={python}", "OUT=there", "ARGS=tests")
    assert commands == ["TRITON_INTERPRET= -m tests.gpu --out there tests"]


@pytest.mark.parametrize("venv", [".venv", ""])
def test_old_python(checkout, venv):
    python = checkout.fake("python", prologue=OLD, version="Python 3.10.13")
    done, commands = checkout.make("test", f"PYTHON={python}", f"VENV={venv}", code=2)
    assert commands == []
    assert error_line(done) == (
        "engram_kernels needs Python 3.11 or later; ./python is 3.10.13. "
        "Install a newer one, or run: make test PYTHON=/path/to/python3.11"
    )


def test_missing_python(checkout):
    done, _ = checkout.make("demo", "PYTHON=./nowhere", code=2)
    assert "./nowhere is missing or does not run. Install" in error_line(done)


def test_no_venv_module(checkout):
    python = checkout.fake("python", prologue=NO_VENV)
    done, commands = checkout.make("demo", f"PYTHON={python}", code=2)
    assert commands == []
    assert error_line(done) == (
        f"engram_kernels: ./python has no venv module. Install it (Debian, Ubuntu: apt install python{MINOR}-venv), "
        "or use an environment that has the dependencies: make demo VENV="
    )


def test_no_pip(checkout):
    python = checkout.fake("python", inside=NO_PIP)
    done, commands = checkout.make("test", f"PYTHON={python}", code=2)
    assert [c for c in commands if "pip" in c] == []
    assert error_line(done) == (
        "engram_kernels: .venv/bin/python has no pip. Install it with: .venv/bin/python -m ensurepip"
    )


def test_environment_of_another_python(checkout):
    checkout.make("test-cpu", f"PYTHON={checkout.fake('python')}")
    other = checkout.fake("other", prologue="import sys; sys.version_info = (3, 99, 0)", version="Python 3.99.0")
    done, commands = checkout.make("test-cpu", f"PYTHON={other}", code=2)
    assert commands == []
    assert error_line(done) == (
        f"engram_kernels: .venv holds Python {MINOR} and ./other is 3.99. "
        "Remove .venv, or run: make test-cpu VENV=.venv3.99"
    )


def test_help_names_every_target(checkout):
    done, _ = checkout.make()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    hidden = {"check-python", "help", "simulated-gpu"}
    assert len(targets) > 10 and all(f"make {target} " in done.stdout for target in set(targets) - hidden), done.stdout


def test_ci_runs_make_test(checkout):
    shutil.copytree(ROOT / ".ci", checkout.folder / ".ci")
    python = checkout.fake("python")
    for env, torch in (({}, "torch==2.13.0"), ({"TORCH": "torch==2.12.0"}, "torch==2.12.0")):
        checkout.log.write_text("")
        command, env = ["bash", str(checkout.folder / ".ci" / "run")], {**ENV, **env, "PYTHON": python}
        subprocess.run(command, cwd="/", env=env, check=True, capture_output=True, timeout=HANG)
        commands = checkout.log.read_text()
        assert f"check {torch}\n" in commands
        assert commands.count("-m pytest") == 5 and commands.count("-m tests.mutation") == 1
