"""Every block of every document runs, page by page in one namespace, or says above it what it needs.

A page's Python blocks are run in order, as someone would who reads it from the top, on a CPU. Shell blocks that are not
marked are commands of this package, and run in this process too: one process per block would take longer than all of
this.
"""

import os
import re
import shlex
from typing import NamedTuple

import pytest
import torch

from bench.__main__ import main as bench
from engram_kernels.__main__ import main as command_line
from tests.reports.site import documents
from tests.support.documents import ROOT, Document

#: What a marker ``*(needs ...)*`` above a block may say.
NEEDS = {
    "a GPU",
    "a download",
    "a clean checkout",
    "several processes",
    "a repository",  # of the Hub, with the right to write to it
    "the kernel in build/hub",  # tests/project/test_hub.py runs it with one that it builds
    "the engine's tensors",  # tests/project/test_engines.py runs these with stand-ins
    "the other library's tensors",  # and tests/project/test_migrate.py these
}
FENCE = re.compile(r"^(?:\*\(needs ([^)]+)\)\*\n\n)?```([^\n]*)\n(.*?)^```$", re.S | re.M)
PAGES = [str(path) for path in documents() if path.parts[:2] != ("docs", "api")]


class Block(NamedTuple):
    needs: str | None
    language: str
    code: str


def blocks_of(text: str) -> list[Block]:
    return [Block(needs or None, language, code) for needs, language, code in FENCE.findall(text)]


def run_command(line: str, folder, monkeypatch) -> None:
    """``python -m engram_kernels ...`` or ``engram-kernels ...``, in this process.

    Of a user's module, in the page's folder: ``python -m bench ...`` and ``pytest ...``.
    """
    if found := re.match(r"python -m bench |pytest ", line):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        words = shlex.split(line[found.end() :])
        if found[0] == "pytest ":
            apart = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", str(folder))
            assert pytest.main([*apart, "-p", "engram_kernels.testing.plugin", *words]) == 0, line
        else:
            assert bench(words) == 0, line
        return
    found = re.match(r"(?:python -m engram_kernels|engram-kernels)(?: |$)", line)
    if found is None:
        raise ValueError(f"a block with {line!r} needs a marker")
    assert command_line(shlex.split(line[found.end() :], comments=True)) == 0, line


def run_page(page: str, text: str, folder, monkeypatch) -> dict:
    """The names after all of a page's Python blocks."""
    space: dict = {}
    for block in blocks_of(text):
        where = f"{page}: {block.code.splitlines()[0]}"
        assert block.language in ("python", "sh", "text"), where
        assert block.needs is None or block.needs in NEEDS, f"{where} needs {block.needs}"
        if block.language == "python":
            code = compile(block.code, page, "exec")
            monkeypatch.chdir(folder)
            if file := re.match(r"# (\w+\.py)\n", block.code):  # a module that the page's commands name
                (folder / file[1]).write_text(block.code)
            if block.needs is None:
                exec(code, space)
        elif block.language == "sh" and block.needs is None:
            monkeypatch.chdir(ROOT)
            for line in block.code.splitlines():
                run_command(line, folder, monkeypatch)
    return space


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(Document(page).text)])
def test_blocks_run(page, tmp_path, monkeypatch):
    torch.manual_seed(0)
    if "from transformers" in Document(page).text:
        pytest.importorskip("transformers")
    run_page(page, Document(page).text, tmp_path, monkeypatch)


def test_most_blocks_run():
    """A marker is for what cannot run here; commands in words alone would be run by no one."""
    blocks = [block for page in PAGES for block in blocks_of(Document(page).text) if block.language != "text"]
    assert sum(block.needs is None for block in blocks) >= 28
    for page in PAGES:
        texts = [block.code for block in blocks_of(Document(page).text) if block.language == "text"]
        assert not [code for code in texts if re.match(r"(python|make|pip|engram-kernels|from|import) ", code)], page


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nlookup(table)\n```\n", NameError),
        ("```\npython -m engram_kernels\n```\n", AssertionError),
        ("```sh\nmake test\n```\n", ValueError),
        ("*(needs luck)*\n\n```python\nx = 1\n```\n", AssertionError),
        ("*(needs a GPU)*\n\n```python\nx = = 1\n```\n", SyntaxError),
    ],
)
def test_what_does_not_run_is_found(text, error, tmp_path, monkeypatch):
    with pytest.raises(error):
        run_page("a page", text, tmp_path, monkeypatch)
