"""What type checkers make of the public names: programs as users write them, by mypy --strict and by pyright.

``program.py`` has every overload and every option of few names, right and wrong: errors are on the lines that are one,
and on no others. In ``serving.py``, ``training.py`` and the examples there are none. Examples that are not read name
what torch or transformers do not declare: names that torch's types do not export (``torch._scaled_mm``,
``dist.FileStore``), and transformers' models.
"""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_overloads

import pytest

import engram_kernels
from engram_kernels.geometry.kinds import Kind, OneOf
from engram_kernels.nn.call import EngramCall
from tests.reports.arguments import kinds_of, parameters, public_functions
from tests.support.patience import HANG

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
PROGRAMS = [HERE / f"{name}.py" for name in ("program", "serving", "training")]
NOT_READ = {"gemma_per_layer", "tensor_parallel", "train_ranks", "train_transformers", "transformers_qwen"}
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem not in NOT_READ)
CHECKERS = {
    "mypy": (("mypy", "--config-file", str(HERE / "mypy.ini")), r"^(\S+?):(\d+): error: "),
    "pyright": (("pyright", "--pythonpath", sys.executable), r"^\s*(\S+?):(\d+):\d+ - error: "),
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_programs(checker):
    """One process for all of them: most of its time is torch's own types."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    (module, *options), pattern = CHECKERS[checker]
    paths = [*PROGRAMS, *EXAMPLES]
    command = [sys.executable, "-m", module, *options, *(str(path.relative_to(ROOT)) for path in paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    found = {(Path(file).name, int(line)) for file, line in re.findall(pattern, done.stdout, re.M)}
    marked = {
        (path.name, number)
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if line.endswith("# error")
    }
    assert len(marked) > 30 and len(paths) == 7 and found == marked, done.stdout + done.stderr


def choices(kind: Kind | None) -> set | None:
    """The names that a parameter of this kind takes, None where they are no closed set."""
    if isinstance(kind, OneOf):
        return set(kind.choices)
    inner = [getattr(kind, "kind", None), *getattr(kind, "kinds", ()), getattr(kind, "values", None)]
    return next((found for each in inner if isinstance(each, Kind) and (found := choices(each))), None)


def literals(annotation) -> set:
    """The names of all Literals in an annotation."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(literals, get_args(annotation)))


@pytest.mark.parametrize("name, function", list(public_functions()))
def test_annotations_are_what_a_running_program_takes(name, function):
    """One of some names is a Literal of exactly these, and nothing is without a type."""
    kinds, given = kinds_of(function), parameters(function)
    for parameter, it in given.items():
        assert it.annotation is not it.empty, parameter
        assert literals(it.annotation) == (choices(kinds.get(parameter)) or set()), parameter
    if not inspect.isclass(function):
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty


def test_what_is_read_from_objects_has_a_type():
    for value in (value for value in map(vars(engram_kernels).get, engram_kernels.__all__) if inspect.isclass(value)):
        for member, it in ((member, inspect.getattr_static(value, member)) for member in dir(value)):
            function = it.fget if isinstance(it, property) else getattr(it, "func", None)  # a cached property's
            if function and function.__module__.startswith("engram_kernels") and not member.startswith("_"):
                assert "return" in function.__annotations__, f"{value.__name__}.{member}"


def test_overloads_are_what_runs():
    """Each has the parameters and defaults of the function; together they take the names that it takes."""
    functions = {name: function for name, function in public_functions() if overloads(function)}
    assert functions.keys() >= {"lookup", "hash_lookup", "gate_conv_residual", "Prefetcher", "ShardedTable.lookup"}
    for name, function in functions.items():
        ours = inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters
        found = [inspect.signature(each).parameters for each in overloads(function)]
        for each in found:
            assert list(each) == list(ours), name
            defaults = {p.name: p.default for p in each.values() if p.default is not p.empty}
            assert defaults.items() <= {p.name: p.default for p in ours.values()}.items(), name
        for parameter in ours:
            asked = set().union(*(literals(each[parameter].annotation) for each in found))
            assert asked == literals(ours[parameter].annotation), (name, parameter)


def overloads(function) -> list:
    return get_overloads(inspect.unwrap(function.__init__ if inspect.isclass(function) else function))


def test_the_call_of_a_module_is_its_forward():
    """torch declares a module's call as anything, so that nn/call.py says what it is."""
    ours = inspect.signature(engram_kernels.Engram.forward).parameters
    # Nothing runs, so that all that is known of it are its overloads.
    call = SimpleNamespace(__module__=EngramCall.__module__, __qualname__="EngramCall.__call__")
    assert [list(inspect.signature(each).parameters) for each in get_overloads(call)] == [list(ours)] * 2
