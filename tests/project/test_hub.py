"""The package as a kernel of the Hugging Face Hub: tests/reports/hub.py writes it, the library ``kernels`` loads it.

One process does all that imports: torch takes seconds. It is the interpreter's, where a copy of the package may be told
that CPU tensors take no kernels.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reports import hub
from tests.support.patience import HANG

SCRIPT = """
import importlib, json, re, sys
from pathlib import Path

import torch
from kernels import get_local_kernel
from kernels._rust import Digest, Metadata

import reference

class Hidden:
    def find_spec(name, path, target=None):
        if name.partition(".")[0] == "engram_kernels":
            raise ImportError(name + " is imported by the kernel")

sys.meta_path.insert(0, Hidden)
folder, changed = map(Path, sys.argv[1:])
metadata = Metadata.read_from_file(folder / "build/torch-cpu/metadata.json")
metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder / "build/torch-cpu"))
ids = [json.loads((f / "build/torch-cpu/metadata.json").read_text())["id"] for f in (folder, changed)]

def modules(kernel):
    files = sorted(Path(kernel.__file__).parent.rglob("*.py"))
    names = [".".join(file.relative_to(files[0].parent).with_suffix("").parts) for file in files]
    names = [name.removesuffix("__init__").rstrip(".") for name in names]
    return [importlib.import_module("." + name, kernel.__name__) for name in names if name]

def geometry(kernel):
    config = kernel.EngramConfig(layers=(1, 3), max_ngram=3, heads=2, row_width=32, table_sizes=(50, 60),
                                 hidden_size=24, branches=4, raw_vocab_size=100)
    return kernel.HashPlan.build(config, torch.arange(100, dtype=torch.int32))

torch.manual_seed(0)
token_ids = torch.randint(0, 100, (7,))
hidden, key, value = torch.randn(7, 4, 24), torch.randn(7, 4, 24), torch.randn(7, 24)
norms = torch.rand(4, 24) + 0.5, torch.rand(4, 24) + 0.5
weights = [torch.randn(rows, 32) for rows in geometry(get_local_kernel(folder, backend="cpu")).rows_per_layer]

def results(kernel):
    plan = geometry(kernel)
    tables = [kernel.EngramTable.from_tensors(weight, placement="cpu") for weight in weights]
    gate = kernel.gate_residual(hidden, key, value, *norms, eps=1e-6)
    return [kernel.hash_lookup(token_ids, plan, tables), gate, plan, tables]

def on_kernels(kernel, chosen):
    importlib.import_module(".launching.device", kernel.__name__).CPU_TAKES_KERNELS = chosen

# The reference of the checkout, which the copy does not hold, on what the copy made.
kernel = get_local_kernel(folder, backend="cpu")
assert kernel.__name__ == ids[0] and len(modules(kernel)) > 100
on_kernels(kernel, False)
*found, plan, tables = results(kernel)
expected = [reference.hash_lookup(token_ids, plan, tables)]
expected += [reference.gate_residual(hidden, key, value, *norms, eps=1e-6)]
assert expected[0].ne(0).any()
for each, right in zip(found, expected, strict=True):
    assert torch.equal(each, right)

on_kernels(kernel, True)
for room in ("hash_rows", "gate"):  # kernels take no step through it
    importlib.import_module(".ops." + room, kernel.__name__).reference = None
rows, gate, *_ = by_kernels = results(kernel)
assert torch.equal(rows, expected[0])
torch.testing.assert_close(gate, expected[1], rtol=1e-5, atol=1e-5)

graphs = []
def keep(graph, inputs):
    graphs.append(str(graph.code))
    return graph
compiled = torch.compile(kernel.gate_residual, backend=keep, fullgraph=True)
assert torch.equal(compiled(hidden, key, value, *norms, eps=1e-6), gate)
assert len(graphs) == 1 and "torch.ops." + ids[0] + ".gate_residual" in graphs[0], graphs

# The page's block, where a build of torch for a GPU takes another variant.
page = (Path(reference.__file__).parents[1] / "docs/hub.md").read_text()
space = {}
exec(re.search(r"^```python\\n(.*?)^```$", page, re.S | re.M)[1], space)
assert space["rows"].shape == (1, 6, 8, 32)

# Beside it another version, and the package.
other = get_local_kernel(changed, backend="cpu")
assert other.__name__ == ids[1] and other is not kernel
assert not [name for name in sys.modules if name.partition(".")[0] == "engram_kernels"]
sys.meta_path.remove(Hidden)
import engram_kernels

for each in (other, engram_kernels):
    for one, same in zip(results(each)[:2], by_kernels, strict=False):
        assert torch.equal(one, same)
spaces = [getattr(torch.ops, name).gate_residual.default for name in (*ids, "engram")]
assert len(set(spaces)) == 3
assert engram_kernels.__all__ == kernel.__all__ and all(getattr(kernel, name) for name in kernel.__all__)
assert kernel.hash_lookup is not engram_kernels.hash_lookup
print("all", len(spaces))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The kernel, and one of a package that differs in a line that computes nothing."""
    folder = tmp_path_factory.mktemp("hub")
    package = folder / "engram_kernels"
    shutil.copytree(hub.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "commands"))
    text = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(text.replace('__version__ = "', '__version__ = "1!'))
    hub.build(folder / "build" / "hub")
    hub.build(folder / "changed", package)
    return folder / "build" / "hub", folder / "changed"


def test_the_kernel_loads_beside_another_and_the_package(built):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env.update(PYTHONPATH=str(hub.ROOT), TRITON_INTERPRET="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", SCRIPT, *map(str, built)]
    done = subprocess.run(command, env=env, cwd=built[0].parents[1], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and done.stdout == "all 3\n", done.stdout + done.stderr


def test_every_variant_is_the_package_as_plain_files(built):
    variants = sorted((built[0] / "build").iterdir())
    assert [path.name for path in variants] == [f"torch-{backend}" for backend in hub.BACKENDS]
    ids = [json.loads((path / "metadata.json").read_text())["id"] for path in variants]
    assert len(set(ids)) == len(ids) and all(each.isidentifier() for each in ids)
    kept = [path for path in hub.PACKAGE.iterdir() if path.name not in (*hub.LEFT_OUT, "__pycache__")]
    for variant in variants:
        names = {path.name for path in variant.iterdir()} - {"__pycache__"}  # of the process that loads
        assert names == {path.name for path in kept} | {"metadata.json"}
        assert not [path for path in (variant, *variant.rglob("*")) if path.is_symlink()]
        for path in variant.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                absolute = isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("engram")
                assert not absolute, f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("source", "place", "expected"),
    [
        ("from engram_kernels import reference\n", "ops/gate.py", "from .. import reference\n"),
        ("from engram_kernels.ops.rows import lookup\n", "a.py", "from .ops.rows import lookup\n"),
        ("from engram_kernels.ops.x import y\n", "ops/room/__init__.py", "from ...ops.x import y\n"),
        ("é = 'é'; from engram_kernels.a import (\n    b,\n)\n", "c/d.py", "é = 'é'; from ..a import (\n    b,\n)\n"),
        ("def f():\n    from engram_kernels.a import b\n", "c/d.py", "def f():\n    from ..a import b\n"),
        ("# from engram_kernels.a import b\nfrom engram_kernelsx import c\n", "d.py", None),
        ("from .a import b\nx = 'from engram_kernels.a import b'\n", "d.py", None),
    ],
)
def test_imports_are_made_relative(source, place, expected):
    assert hub.relative(source, Path(place)) == (source if expected is None else expected)


@pytest.mark.parametrize("source", ["import engram_kernels.ops\n", "from \\\n    engram_kernels import x\n"])
def test_what_cannot_be_made_relative_is_told(source):
    with pytest.raises(ValueError, match="ops/x.py:1: "):
        hub.relative(source, Path("ops/x.py"))
