"""The README and the API pages against the package: names, signatures, tables, and links that lead somewhere."""

import importlib.util
import inspect
import re
import subprocess
import sys

import pytest

import engram_kernels
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.tables.placement import PLACEMENTS
from tests.reports import api, site
from tests.support.documents import ROOT, Document
from tests.support.gpu import results as gpu_results

README = Document("README.md")
OP_FILES = {
    "ngram_hash": "hashing",
    "lookup": "rows",
    "hash_lookup": "hash_rows",
    "gate_residual": "gate",
    "gate_conv_residual": "gate_conv",
}


def table(first: str) -> list[list[str]]:
    """Cells of the README's table whose head begins with ``first``."""
    text = README.text.split(f"\n| {first} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_the_readme_is_short_and_its_first_screen_decides():
    assert len(README.text.split()) < 1000
    screen = README.text.split("\n## ")[0]
    assert all(f"**{word}" in screen for word in ("Status.", "For you if", "Not if", "Install", "Fifteen lines"))
    assert len(README.blocks()[0].strip().splitlines()) == 15


def test_tables_name_all_ops_formats_and_placements():
    ops = [name for name in engram_kernels.__all__ if hasattr(engram_kernels.reference, name)]
    assert sorted(row[0].strip("`") for row in table("op")) == sorted(ops) == sorted(OP_FILES)
    formats = [name for row in table("[format](docs/formats.md) of rows") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(formats) == sorted(set(FORMATS) - {"float64"})
    assert [row[0].strip("`") for row in table("placement")] == list(PLACEMENTS)


def test_last_run_on_comes_from_the_gpu_lane():
    for name, *_, last in table("op"):
        assert last == gpu_results.last_run(OP_FILES[name.strip("`")]), name


def test_links_of_documents_lead_somewhere():
    broken = {str(path): Document(path).broken_links() for path in site.documents()}
    assert len(broken) > 25 and not any(broken.values()), broken


def test_api_pages_are_the_contract():
    """Every public name stands on one page, and pages are what the code has, signatures and docstrings alike."""
    named = [name for names in api.PAGES.values() for name in names]
    assert sorted(named) == sorted(engram_kernels.__all__)
    written = {path.name: path.read_text() for path in api.FOLDER.iterdir()}
    assert written == api.pages(), "python -m tests.reports.api"


@pytest.mark.parametrize("name", engram_kernels.__all__)
def test_signatures_of_api_pages(name):
    """Read from the page, without the code that writes it: names, order and defaults of parameters."""
    page = next(page for page, names in api.PAGES.items() if name in names)
    text = (api.FOLDER / f"{page}.md").read_text()
    given = re.search(rf"^## {name}\n\n```text\n{name}\((.*?)\)(?: -> .*?)?\n```$", text, re.S | re.M)[1]
    parameters = inspect.signature(getattr(engram_kernels, name)).parameters.values()
    for each in parameters:
        default = "" if each.default is each.empty else rf"[^,\n]* = {re.escape(repr(each.default))}"
        assert re.search(rf"(^|\s|\*){each.name}\b.*?{default}", given), each
    order = [re.search(rf"(?:^|[\s*]){each.name}(?:[:,\s=]|$)", given).start() for each in parameters]
    assert order == sorted(order)


def test_the_site_is_built(tmp_path):
    """Gathering needs no mkdocs; ``make docs`` builds, and a link or an anchor that leads nowhere ends it."""
    site.gather(tmp_path)
    pages = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.md")}
    assert pages == set(site.documents()) and (tmp_path / "docs/pictures/data_way.svg").exists()
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs")
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(str(page) for page in pages - {p for p in pages if p.parts[0] == "examples"})
    (tmp_path / "docs/index.md").write_text("[x](serving.md#nowhere)\n")
    config = (ROOT / "mkdocs.yml").read_text().replace("build/pages", str(tmp_path))
    (tmp_path.parent / "mkdocs.yml").write_text(config.replace("build/site", str(tmp_path.parent / "site")))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", tmp_path.parent / "mkdocs.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "does not contain an anchor '#nowhere'" in done.stderr
