"""Write docs/api/, a page for each part of the public surface: signatures and docstrings, as the code has them.

python -m tests.reports.api
"""

import dataclasses
import inspect
import re
import types
import typing
from functools import cache
from pathlib import Path

from engram_kernels.serving.started import Started
from engram_kernels.serving.state import EngramStep

from .arguments import public_functions

FOLDER = Path(__file__).parents[2] / "docs" / "api"
PAGES = {
    "geometry": ("EngramConfig", "HashPlan", "build_token_map"),
    "ops": (
        "ngram_hash", "lookup", "hash_lookup", "gate_residual", "gate_conv_residual", "split_kv",
        "set_dependent_launch", "set_ranges",
    ),
    "tables": ("EngramTable", "ShardedTable", "NgramCache"),
    "modules": ("Engram", "replace_engram", "export_state"),
    "serving": ("Prefetcher", "EngramState", "warmup", "MetricsCollector"),
    "training": ("RowAdagrad", "RowAdam", "RowSinkhorn", "save_training", "load_training"),
}  # fmt: skip
#: Classes of what methods return, with the page that they stand on.
RETURNED = {Started: "serving", EngramStep: "serving"}
WRITTEN = "`python -m tests.reports.api` writes this page from the code."
INDEX = """# Public names

Each page has signatures, shapes, dtypes and errors, from the docstrings. What users import is in `engram_kernels`; a
deeper path may change without notice. [arguments.md](../arguments.md) has what every argument takes,
[glossary.md](../glossary.md) the letters.

Where a result depends on arguments, further signatures say how; `...` are the arguments of the first.

Token ids are `[T]` with `cu_seqlens [B + 1]`, or `[B, S]` with each row a sequence. The same functions in
`engram_kernels.reference` are the specification, in plain PyTorch.

**Errors.** Bad arguments raise `ValueError` (a wrong value, shape, dtype or device) or `TypeError` (a wrong type).
They name the function, the argument, what was expected and what came:

```text
lookup: row_ids must be a tensor of int32 or int64, got float32 [4] on cpu
hash_lookup: tables[1] must have at least 384016682 rows, got 384006168
EngramConfig.from_hf: config has no field 'engram_head_dim'
```

This holds for every function here; docstrings name what they raise besides. Nothing is copied silently: a tensor that
would need a copy is an error. A token id outside the vocabulary raises on a CPU; a kernel, which cannot raise, gives
its columns the row id -1, and -1 (or any id outside the table) reads as a row of zeros without touching memory.

"""


@cache
def entries() -> dict[str, tuple[str, object]]:
    """Name -> (page, value) of everything that has an entry, in the order of the pages."""
    functions = dict(public_functions())
    found, seen = {}, set()
    for page, names in PAGES.items():
        for name in names:
            found[name] = page, functions[name]
            for each, it in functions.items():
                own = inspect.unwrap(getattr(it, "__func__", it))
                if each.startswith(f"{name}.") and own not in seen:  # what classes share stands with the first of them
                    seen.add(own)
                    found[each] = page, it
    for value, page in RETURNED.items():
        found[value.__name__] = page, value
        methods = {
            name: it
            for name, it in vars(value).items()
            if inspect.isfunction(it) and not name.startswith(("_", "read_"))
        }
        found |= {f"{value.__name__}.{name}": (page, it) for name, it in methods.items()}
    return found


def anchor(name: str) -> str:
    return name.lower().replace(".", "")


def shown(annotation) -> str:
    """A type as it is written; one that others decide as all that it may be, and modules' names are left out."""
    if isinstance(annotation, typing.TypeVar):
        return " | ".join(map(shown, annotation.__constraints__)) or annotation.__name__
    if annotation is None or annotation is type(None) or isinstance(annotation, str):
        return str(annotation).replace("<class 'NoneType'>", "None")
    if isinstance(annotation, list):  # parameters of a callable
        return f"[{', '.join(map(shown, annotation))}]"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(shown, args))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    own = [each for each in args if not isinstance(each, typing.TypeVar) and each is not typing.Any]
    text = inspect.formatannotation(annotation if origin is None or annotation is typing.Any else origin)
    text = re.sub(r"\b(?:engram_kernels|collections|typing|pathlib|os|torch\.\w+)(?:\.\w+)*\.(\w+)", r"\1", text)
    return f"{text}[{', '.join('...' if each is ... else shown(each) for each in args)}]" if own else text


def parameter(given: inspect.Parameter) -> str:
    """``name: type = default``."""
    stars = {given.VAR_POSITIONAL: "*", given.VAR_KEYWORD: "**"}.get(given.kind, "")
    kind = "" if given.annotation is given.empty else f": {shown(given.annotation)}"
    default = "" if given.default is given.empty else f"{' = ' if kind else '='}{given.default!r}"
    return stars + given.name + kind + default


def signature(name: str, function) -> str:
    """``name(parameters) -> result``, one parameter a line where one line has no room, and what overloads say."""
    given = inspect.signature(function)
    parts = [parameter(each) for each in given.parameters.values() if each.name != "self"]
    kinds = [each.kind for each in given.parameters.values() if each.name != "self"]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = given.return_annotation
    returns = "" if inspect.isclass(function) or result is given.empty else f" -> {shown(result)}"
    return "\n\n".join([laid_out(name, parts, returns), *overloads(name, function)])


def laid_out(name: str, parts: list[str], returns: str) -> str:
    text = f"{name}({', '.join(parts)}){returns}"
    return text if len(text) <= 100 else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def overloads(name: str, function) -> list[str]:
    """For each of them the parameters that differ from the function's own, and the result."""
    texts, it = [], inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    ours = inspect.signature(it).parameters
    for each in typing.get_overloads(it):
        differ = [
            f"{p.name}: {shown(p.annotation)}"
            for p in inspect.signature(each).parameters.values()
            if p.annotation != ours[p.name].annotation and p.name != "self"
        ]
        result = typing.get_type_hints(each)["self" if inspect.isclass(function) else "return"]
        texts.append(laid_out(name, ["...", *differ], f" -> {shown(result)}"))
    return texts


def linked(text: str, owner: str, here: str) -> str:
    """Roles of Sphinx as links to where the name stands."""

    def link(found: re.Match) -> str:
        role, name = found[1], found[2]
        full = next((each for each in candidates(role, name, owner) if each in entries()), None)
        if full is None:
            return f"`{name}`"
        page = entries()[full][0]
        return f"[`{name}`]({'' if page == here else page + '.md'}#{anchor(full)})"

    return re.sub(r":(\w+):`~?([\w.]+)`", link, text)


def candidates(role: str, name: str, owner: str) -> tuple[str, ...]:
    """What a role of Sphinx in the docstring of ``owner`` may mean: a function is none of the class's methods."""
    return (name,) if role == "func" else (f"{owner}.{name}", name)


def prose(doc: str, names: set[str]) -> str:
    """A docstring as Markdown: ``name: ...`` is an item where it is a parameter, and what is indented is code."""
    out: list[str] = []
    for line in inspect.cleandoc(doc).splitlines():
        head = re.match(r"([\w, ]+): ", line)
        item = head and set(re.findall(r"\w+", head[1])) <= names
        ended = bool(out) and re.search(r"[.:)]$", out[-1])
        if line.startswith("    "):
            if out and out[-1] and not out[-1].startswith("    "):
                out.append("")
            out.append(line)
        elif item:
            if out and out[-1] and not out[-1].startswith(("- ", "  ")):
                out.append("")
            out.append(f"- **{head[1]}**: {line[head.end() :]}")
        elif out and out[-1].startswith(("- ", "  ")) and line and not (ended and line[0].isupper()):
            out.append(f"  {line}")
        else:
            if out and out[-1] and (ended or out[-1].startswith(("- ", "  "))) and line:
                out.append("")
            out.append(line)
    return "\n".join(out)


def entry(name: str, value, here: str, level: str) -> str:
    """Heading, signature and docstring of one function or class, with the fields and properties of a class."""
    owner, parts = name.split(".")[0], [f"{level} {name}"]
    parts.append(f"```text\n{signature(name, value)}\n```")
    names = set(inspect.signature(value).parameters)
    if dataclasses.is_dataclass(value):
        names |= {field.name for field in dataclasses.fields(value)}
    parts.append(linked(prose(value.__doc__, names), owner, here))
    if inspect.isclass(value):
        fields = re.findall(r"^    (\w+): .*?#: (.*)$", inspect.getsource(value), re.M)
        parts += ["\n".join(f"- **{field}**: {linked(text, owner, here)}" for field, text in fields)] if fields else []
        members = ((member, inspect.getattr_static(value, member)) for member in sorted(dir(value)))
        read = [(member, it) for member, it in members if not member.startswith("_") and _is_read(it)]
        lines = [f"- **{member}**: {linked(' '.join(it.__doc__.split()), owner, here)}" for member, it in read]
        parts += ["Read from it:", "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def _is_read(member) -> bool:
    return (isinstance(member, property) or hasattr(member, "attrname")) and bool(member.__doc__)


def summary(value) -> str:
    """The first sentence of a docstring, or what is before its first semicolon."""
    return re.split(r"(?<=[.;])\s", inspect.cleandoc(value.__doc__))[0].rstrip(".;")


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    texts, listed = {}, [INDEX]
    for page, names in PAGES.items():
        parts = [f"# {page.capitalize()}\n\n{WRITTEN}\n"]
        own = {name: value for name, (where, value) in entries().items() if where == page}
        parts += [entry(name, value, page, "###" if "." in name else "##") for name, value in own.items()]
        texts[f"{page}.md"] = "\n".join(parts)
        listed.append(f"## {page.capitalize()}\n\n| name | what it is |\n|---|---|\n")
        lines = ((name, " ".join(linked(summary(own[name]), name, "").split())) for name in names)
        listed += [f"| [`{name}`]({page}.md#{anchor(name)}) | {text} |\n" for name, text in lines] + ["\n"]
    texts["index.md"] = "".join(listed) + WRITTEN + "\n"
    return texts


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text)
