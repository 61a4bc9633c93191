"""Documents whose code is run: blocks by section, and links that must lead somewhere."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch

import engram_kernels

ROOT = Path(__file__).parents[2]


class Document:
    """A Markdown file of the project by its path from the root."""

    def __init__(self, path: str):
        self.path, self.text = path, (ROOT / path).read_text()

    def blocks(self, section: str | None = None) -> list[str]:
        """Python code of one section ``## section``, or of the whole document."""
        part = self.text if section is None else self.text.split(f"\n## {section}\n")[1].split("\n## ")[0]
        return re.findall(r"^```python\n(.*?)^```", part, re.S | re.M)

    def run(self, section: str, number: int = 0, **names) -> SimpleNamespace:
        """The names after running a block of a section, which may use those given and what the package exports."""
        space = {name: getattr(engram_kernels, name) for name in engram_kernels.__all__}
        space |= {"torch": torch, "json": json} | names
        exec(compile(self.blocks(section)[number], self.path, "exec"), space)
        return SimpleNamespace(**{name: value for name, value in space.items() if name.isidentifier()})

    def holds_python_alone(self) -> bool:
        """Whether every fenced block is Python: what tests do not run would go unnoticed otherwise."""
        return len(re.findall(r"^```", self.text, re.M)) == 2 * len(self.blocks())

    def broken_links(self) -> list[str]:
        """Relative targets that do not exist, of links outside code."""
        words = re.sub(r"^```.*?^```|`[^`\n]*`", "code", self.text, flags=re.S | re.M)
        targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", words)
        return [target for target in targets if not (ROOT / self.path).parent.joinpath(target).exists()]
