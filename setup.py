"""The README as an index page shows it; everything else is in pyproject.toml.

An index page has no files beside it. With a repository in ``[project.urls]``, as "Source", links and pictures of the
README point there; without one links are plain words, and pictures are left out.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def index_page(text: str, source: str | None) -> str:
    """The README with absolute links alone."""

    def absolute(link: re.Match) -> str:
        picture, words, target = link.groups()
        if source is None:
            return "" if picture else words
        return f"{picture}[{words}]({source}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:)([^)]+)\)", absolute, text)


project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
setup(
    long_description=index_page((ROOT / "README.md").read_text(), project["urls"].get("Source")),
    long_description_content_type="text/markdown",
)
