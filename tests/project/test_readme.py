"""The README's tables against the package: what it names exists, with the signature it gives."""

import inspect
import re

import engram_kernels
from tests.support.documents import ROOT, Document
from tests.support.gpu import results as gpu_results

README = Document("README.md").text


def names_table():
    """Name -> signature in words (None where the row gives none) of the table below "What there is"."""
    table = README.split("## What there is")[1].split("\n\n| op |")[0]
    rows = re.findall(r"^\| `(\w+)(\([^`]*\))?` \|", table, re.M)
    return {name: signature or None for name, signature in rows}


def written(function):
    """A signature without annotations."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_names_are_the_contract():
    assert sorted(names_table()) == sorted(engram_kernels.__all__)


def test_signatures():
    given = {name: signature for name, signature in names_table().items() if signature}
    assert len(given) >= 6
    for name, signature in given.items():
        assert signature == written(getattr(engram_kernels, name)), name


def test_methods_named_exist():
    for line in README.splitlines():
        if match := re.match(r"\| `(EngramConfig|HashPlan|EngramTable)` \|(.*)", line):
            for method in re.findall(r"`\.?(\w+)\(", match[2]):
                assert callable(getattr(getattr(engram_kernels, match[1]), method)), method


def test_ops_table_has_a_row_for_every_op():
    table = README.split("| op | formats")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.M)
    ops = [name for name in engram_kernels.__all__ if hasattr(engram_kernels.reference, name)]
    assert sorted(rows) == sorted(ops)


def test_links_of_documents_lead_somewhere():
    paths = [path.relative_to(ROOT) for folder in (".", "docs", "bench") for path in (ROOT / folder).glob("*.md")]
    broken = {str(path): Document(path).broken_links() for path in paths}
    assert len(broken) > 15 and not any(broken.values()), broken


OP_FILES = {
    "ngram_hash": "hashing",
    "lookup": "rows",
    "hash_lookup": "hash_rows",
    "gate_residual": "gate",
    "gate_conv_residual": "gate_conv",
}


def test_last_run_on_comes_from_the_gpu_lane():
    table = README.split("| op | formats")[1].split("\n\n")[0]
    for line in table.splitlines():
        if match := re.match(r"\| `(\w+)` \|", line):
            last = line.strip("|").split("|")[-1].strip()
            assert last == gpu_results.last_run(OP_FILES[match[1]]), match[1]
