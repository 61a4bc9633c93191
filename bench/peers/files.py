"""Functions out of a single source file of another package, without importing that package."""

import ast
import builtins
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import triton
import triton.language as tl

#: Modules that such a file may import; anything else it imports is left out.
ALLOWED = ("__future__", "math", "torch", "triton", "types", "typing")


class MissingPeer(LookupError):
    """A file or a function of a peer that is not there; its message is one line."""


def load_functions(path: Path, names: Iterable[str], asserts: bool = True) -> SimpleNamespace:
    """Functions of a source file, by name, with the functions and assignments of that file that they refer to.

    asserts: False leaves out the statements of that name.

    Definitions are compiled in place, line numbers kept, so that Triton finds a kernel's source.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise MissingPeer(f"{path} is not there") from None
    except SyntaxError as error:
        raise MissingPeer(f"{path} cannot be read: {error.msg}, line {error.lineno}") from None
    defined = {name: node for node in tree.body for name in _defines(node)}
    missing = sorted(set(names) - defined.keys())
    if missing:
        raise MissingPeer(f"{path} has no {', '.join(missing)}")
    module = ModuleType(f"bench_peer_{path.stem}_{abs(hash(str(path)))}")
    module.__file__ = str(path)
    # What vLLM's files take from vllm.triton_utils and vllm.platforms.
    module.__dict__.update(triton=triton, tl=tl, current_platform=SimpleNamespace(is_rocm=_is_rocm))
    _run_imports(tree, module)
    wanted, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name in defined and defined[name] not in wanted:
            wanted.add(defined[name])
            todo += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
        elif name not in defined and name not in module.__dict__ and name not in _known(wanted):
            raise MissingPeer(f"{path} needs {name}, which it imports from elsewhere")
    body = [node for node in tree.body if node in wanted]
    sys.modules[module.__name__] = module  # inspect and Triton look functions up by their module
    if not asserts:
        body = [_WithoutAsserts().visit(node) for node in body]
    exec(compile(ast.Module(body, type_ignores=[]), str(path), "exec"), module.__dict__)
    return SimpleNamespace(**{name: getattr(module, name) for name in names})


class _WithoutAsserts(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.copy_location(ast.Pass(), node)


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _run_imports(tree: ast.Module, module: ModuleType) -> None:
    """The imports at the top level of a file that are ALLOWED."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            roots = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = [(node.module or "").split(".")[0]]
        else:
            continue
        if all(root in ALLOWED for root in roots):
            exec(compile(ast.Module([node], type_ignores=[]), module.__file__, "exec"), module.__dict__)


def _known(nodes: Iterable[ast.stmt]) -> set[str]:
    """Names that need no definition in the file: builtins, and what the functions themselves bind."""
    bound = set(dir(builtins))
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
    return bound


def _is_rocm() -> bool:
    return torch.version.hip is not None
