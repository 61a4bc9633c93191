"""Rules of the layout and of kernels that can be read off the source, without running it."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("engram_kernels", "reference", "tests", "bench")
OPS = ("hashing", "rows", "hash_rows", "gate", "gate_conv")
REFERENCE = sorted((ROOT / "reference").rglob("*.py"))
PACKAGE = sorted(
    path for path in (ROOT / "engram_kernels").rglob("*.py") if "reference" not in path.relative_to(ROOT).parts
)
#: Names that Python fixes: no places that a reader chooses among.
FIXED = ("__init__.py", "__main__.py", "py.typed", "__pycache__")
MOST_ENTRIES = 12


@functools.cache
def tree(path):
    return ast.parse(path.read_text(), filename=str(path))


def calls(node):
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]


def name_of(node):
    """``tl.load`` for an attribute chain, ``load`` for a name, else an empty text."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def at(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def is_jit(function):
    names = [name_of(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]
    return any(name.split(".")[-1] == "jit" for name in names)


@functools.cache
def jit_functions():
    return {
        node.name: (path, node)
        for path in PACKAGE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and is_jit(node)
    }


@functools.cache
def launches():
    """Every launch outside kernels: (path, the outermost function around it, the call, the kernel's name)."""
    found = []
    for path in PACKAGE:
        functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
        nested = {id(inner) for outer in functions for inner in ast.walk(outer) if inner is not outer}
        for function in functions:
            if id(function) not in nested and not is_jit(function):
                found += [(path, function, call, launched(call)) for call in calls(function) if launched(call)]
    return found


def launched(call):
    """The kernel that ``kernel[grid](...)``, ``kernel.run(...)`` or ``Launch(kernel, ...)`` launches, else None."""
    if name_of(call.func) in ("Launch", "RowLaunch") and call.args:
        name = name_of(call.args[0])
        return name if name in jit_functions() else None
    by_run = isinstance(call.func, ast.Attribute) and call.func.attr == "run"
    if not by_run and not isinstance(call.func, ast.Subscript):
        return None
    name = name_of(call.func.value).split(".")[-1]
    return name if name in jit_functions() else None


def masked_loads_without_other(node):
    """Loads with a mask (third parameter of none: ``tl.load(pointer, mask, other)``) and no ``other``."""
    found = []
    for call in calls(node):
        if name_of(call.func) not in ("tl.load", "load"):
            continue
        keywords = {keyword.arg for keyword in call.keywords}
        if ("mask" in keywords or len(call.args) > 1) and "other" not in keywords and len(call.args) < 3:
            found.append(call)
    return found


def gives(function, call, name, module=None):
    """Whether ``call`` passes keyword ``name``: directly, or through ``**options`` that the function fills with it.

    It may fill them by a function of ``module``, a tree.
    """
    if any(keyword.arg == name for keyword in call.keywords):
        return True
    spread = [keyword.value for keyword in call.keywords if keyword.arg is None]
    sources = [value for value in spread if not isinstance(value, ast.Name)]
    spread += call.args if name_of(call.func) in ("Launch", "RowLaunch") else []
    named = {value.id for value in spread if isinstance(value, ast.Name)}
    for node in reversed(list(ast.walk(function))):  # what is assigned last may hold what was assigned before
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            if named & {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}:
                sources.append(node.value)
                named |= {inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name)}
    made = {name_of(inner.func) for source in sources for inner in calls(source)}
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)] if module else []
    sources += [node for node in functions if node.name in made]
    for source in sources:
        for inner in ast.walk(source):
            if isinstance(inner, ast.Dict) and any(isinstance(k, ast.Constant) and k.value == name for k in inner.keys):
                return True
            if isinstance(inner, ast.Call) and name_of(inner.func) == "dict":
                if any(keyword.arg == name for keyword in inner.keywords):
                    return True
    return False


def imported_with_the_package():
    """Modules that the use of a public name brings in, which leaves command lines out."""
    package = ROOT / "engram_kernels" / "__init__.py"
    reached, waiting = set(), [package]
    while waiting:
        path = waiting.pop()
        reached.add(path)
        for node in ast.walk(tree(path)) if path == package else tree(path).body:
            if isinstance(node, ast.ImportFrom):
                folder = path.parent if node.level else ROOT
                stems = [(node.module or "").replace(".", "/")]
                stems += [f"{stems[0]}/{alias.name}".strip("/") for alias in node.names]
                modules = [folder / f"{stem}.py" for stem in stems if stem]
                waiting += [module for module in modules if module.is_file() and module not in reached]
    return sorted(reached)


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_are_small_and_named(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: split it by operation"
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path


def rooms():
    """The package and every room in it."""
    return [ROOT / "engram_kernels", *sorted({path.parent for path in PACKAGE} - {ROOT / "engram_kernels"})]


def entries(room):
    """Files and folders; the link to the reference is a folder of the checkout."""
    return sorted(entry.name for entry in room.iterdir() if entry.name not in FIXED and not entry.is_symlink())


def test_a_room_can_be_taken_in_at_a_glance():
    assert len(rooms()) > 12
    for room in rooms():
        assert len(entries(room)) <= MOST_ENTRIES, f"{room.relative_to(ROOT)} has {entries(room)}"


def words(name):
    """Words of a file's name, in the singular."""
    return {word.removesuffix("s") for word in name.removesuffix(".py").split("_")}


def test_the_name_of_a_file_does_not_repeat_that_of_its_room():
    for room in rooms()[1:]:
        for entry in entries(room):
            assert not words(entry) & words(room.name), room.relative_to(ROOT) / entry


def test_imports_run_one_way():
    """The contract in pyproject.toml, imports for type checkers and within functions included."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_file_name_everywhere(op):
    for path in ("engram_kernels/ops/{}", "reference/ops/{}", "tests/ops/test_{}", "bench/ops/bench_{}"):
        assert (ROOT / f"{path.format(op)}.py").is_file(), path


def test_reference_is_a_relative_link():
    link = ROOT / "engram_kernels" / "reference"
    assert link.is_symlink() and link.readlink() == Path("../reference")
    assert link.resolve() == ROOT / "reference"


def test_files_of_the_reference_import_each_other_relatively():
    for path in REFERENCE:
        for node in ast.walk(tree(path)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            roots = {module.split(".")[0] for module in modules}
            assert not roots & {"engram_kernels", "reference", "triton"}, at(path, node)


def test_every_module_says_what_it_is():
    for path in (*PACKAGE, *REFERENCE):
        assert ast.get_docstring(tree(path)), path


def test_kernels_are_called_kernel_and_nothing_else_is():
    launched = {name for *_, name in launches()}
    named = {name for name in jit_functions() if name.endswith("_kernel")}
    assert len(named) >= 5 and launched == named
    for path in PACKAGE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert is_jit(node), at(path, node)


def test_kernels_say_what_a_program_does():
    for name, (path, node) in jit_functions().items():
        document = ast.get_docstring(node)
        assert document, f"{at(path, node)} {name} has no docstring"
        if name.endswith("_kernel"):
            assert "Grid" in document or "grid" in document, f"{at(path, node)} {name} does not name its grid"


def test_masked_loads_have_a_value_for_the_rest():
    assert sum(name_of(call.func) == "tl.load" for path in PACKAGE for call in calls(tree(path))) > 20
    for path in PACKAGE:
        bare = [at(path, call) for call in masked_loads_without_other(tree(path))]
        assert not bare, f"tl.load with a mask and no other=: {bare}"


def test_launches_choose_their_floating_point_contraction():
    assert len(launches()) >= 5
    for path, function, call, name in launches():
        for option in ("enable_fp_fusion", "num_warps"):
            assert gives(function, call, option, tree(path)), f"{at(path, call)} launches {name} without {option}"


COUNTS = {"num_tokens", "num_rows", "num_seqs", "search_steps", "seq_len"}


def test_counts_of_tokens_and_sequences_make_no_variants():
    """Triton compiles a kernel anew for a count of 1 and for multiples of 16, unless it is told not to."""
    seen = set()
    for name, (path, node) in jit_functions().items():
        counts = COUNTS & {argument.arg for argument in node.args.args}
        if name.endswith("_kernel") and counts:
            (decorator,) = node.decorator_list
            keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
            (spared,) = [ast.literal_eval(k.value) for k in keywords if k.arg == "do_not_specialize"] or [[]]
            assert counts <= set(spared), f"{at(path, node)} {name} specializes {counts - set(spared)}"
            seen.add(name)
    assert len(seen) >= 7


def test_nothing_relies_on_assert_or_the_environment():
    for path in (*PACKAGE, *REFERENCE):
        for node in ast.walk(tree(path)):
            assert not isinstance(node, ast.Assert), f"{at(path, node)} is an assert: raise an error that names things"
    for path in imported_with_the_package():
        for node in ast.walk(tree(path)):
            assert name_of(node) not in ("os.environ", "os.getenv"), f"{at(path, node)} reads the environment"


def test_modules_that_come_with_the_package_are_found():
    names = {path.stem for path in imported_with_the_package()}
    assert {"__init__", "config", "host", "checks", *OPS} <= names and "__main__" not in names


@pytest.mark.parametrize(
    "source, bare",
    [
        ("tl.load(p)", 0),
        ("tl.load(p, mask=m, other=0)", 0),
        ("tl.load(p, m, 0)", 0),
        ("tl.load(p, mask=m)", 1),
        ("tl.load(p, m)", 1),
        ("tl.load(tl.load(p, m) + q, mask=m, other=0.0)", 1),
    ],
)
def test_the_check_of_loads_sees_what_it_should(source, bare):
    assert len(masked_loads_without_other(ast.parse(source))) == bare


@pytest.mark.parametrize(
    "body, given",
    [
        ("k[grid](x, enable_fp_fusion=True)", True),
        ("k[grid](x)", False),
        ("k[grid](x, **{'enable_fp_fusion': True})", True),
        ("common = dict(enable_fp_fusion=False)\n    k[grid](x, **common)", True),
        ("common = {'num_warps': 4}\n    common |= {'enable_fp_fusion': True}\n    k[grid](x, **common)", True),
        ("common = dict(enable_fp_fusion=False)\n    k[grid](x, **other)", False),
        ("common = dict(num_warps=4)\n    k[grid](x, **common)", False),
        ("k.run(x, enable_fp_fusion=True)", True),
        ("common = made(x)\n    k.run(x, **common)", True),
        ("common = other(x)\n    k.run(x, **common)", False),
        ("grid, part = made(x)\n    common = dict(part, y=1)\n    k[grid](x, **common)", True),
        ("common = made(x)\n    Launch(k, grid, names, common)", True),
        ("common = other(x)\n    Launch(k, grid, names, common)", False),
    ],
)
def test_the_check_of_launches_sees_what_it_should(body, given):
    text = "def made(x):\n    return dict(enable_fp_fusion=True)\n\ndef other(x):\n    return dict(num_warps=4)\n"
    module = ast.parse(f"{text}\ndef launch(x):\n    {body}\n")
    function = module.body[-1]
    kinds = (ast.Subscript, ast.Attribute)
    (call,) = [call for call in calls(function) if isinstance(call.func, kinds) or name_of(call.func) == "Launch"]
    assert gives(function, call, "enable_fp_fusion", module) is given
