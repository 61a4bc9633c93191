"""Write the package as a kernel of the Hugging Face Hub, build/hub, which the library ``kernels`` loads.

python -m tests.reports.hub

The layout is that of a kernel in Python alone, as kernels 0.17 reads it: build/torch-<backend>/ is the package itself,
with metadata.json beside its __init__.py. The loader imports it under the id in there, so imports of other rooms are
made relative. The id ends in a hash of the files, and ops are registered under it (``NAMESPACE`` in
engram_kernels/ops/call.py): two builds that differ live beside each other in a process, and beside the package.
"""

import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, HUB = ROOT / "engram_kernels", ROOT / "build" / "hub"
NAME = "engram-kernels"
#: Of the interface: the Hub's number for what may still change.
VERSION = 0
#: Each is a folder with the same files. A build of torch for CUDA or ROCm takes its own, which has the CPU's path too.
BACKENDS = ("cpu", "cuda", "rocm")
#: No part of a kernel: the command line with its data, which is started by the package's name, and what tests share.
LEFT_OUT = ("commands", "testing", "__main__.py", "py.typed")
_CARD = """---
library_name: kernels
license: apache-2.0
---

# {name}

{about}.

It needs Python 3.11 or later, torch 2.11 or later, Triton 3.6 to 3.9, numpy and sympy; the loader installs nothing.

```python
from kernels import get_kernel

engram = get_kernel("OWNER/NAME", version={version}, trust_remote_code=True)  # this repository
rows = engram.hash_lookup(token_ids, plan, tables)
```

## Public names

{names}
"""


def relative(source: str, place: Path) -> str:
    """The source of ``place``, a file of the package, with relative imports of it; ValueError where one cannot be."""
    lines = source.encode().splitlines(keepends=True)  # columns of a tree are bytes
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] == PACKAGE.name for name in node.names):
            raise ValueError(f"{place}:{node.lineno}: an import of the whole package cannot be made relative")
        if not isinstance(node, ast.ImportFrom) or node.level or node.module.split(".")[0] != PACKAGE.name:
            continue
        line, start = lines[node.lineno - 1], node.col_offset
        head = re.match(rb"from\s+engram_kernels\.?", line[start:])
        if head is None:
            raise ValueError(f"{place}:{node.lineno}: expected 'from {PACKAGE.name}' in one line")
        dots = b"." * len(place.parts)
        room = line[start + head.end() :]
        lines[node.lineno - 1] = line[:start] + b"from " + dots + room
    return b"".join(lines).decode()


def _files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _write_variant(variant: Path, package: Path, backend: str) -> None:
    def ignore(folder, names):
        return [name for name in names if name == "__pycache__" or (Path(folder) == package and name in LEFT_OUT)]

    shutil.copytree(package, variant, ignore=ignore)  # the link to the reference becomes plain files
    for path in variant.rglob("*.py"):
        path.write_text(relative(path.read_text(), path.relative_to(variant)))
    files = _files(variant)
    whole = hashlib.sha256()
    for name, content in files.items():
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    digests = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()}
    metadata = {
        "name": NAME,
        "id": f"_{PACKAGE.name}_{backend}_{whole.hexdigest()[:12]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],  # the loader knows few names, and none of ours
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _public_names(package: Path) -> list[str]:
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package}/__init__.py has no __all__")


def build(hub: Path = HUB, package: Path = PACKAGE) -> None:
    """The kernel's repository in ``hub``, in the place of what was there."""
    shutil.rmtree(hub, ignore_errors=True)
    for backend in BACKENDS:
        _write_variant(hub / "build" / f"torch-{backend}", package, backend)
    about = ast.get_docstring(ast.parse((package / "__init__.py").read_text())).partition(".\n")[0]
    names = "\n".join(f"- `{name}`" for name in _public_names(package))
    (hub / "README.md").write_text(_CARD.format(name=NAME, about=about, version=VERSION, names=names))
    shutil.copy(ROOT / "LICENSE", hub)


if __name__ == "__main__":
    build()
    print(f"{HUB.relative_to(ROOT)}: {', '.join(sorted(path.name for path in (HUB / 'build').iterdir()))}")
