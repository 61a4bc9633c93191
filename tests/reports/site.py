"""Build the documents as a site, build/site, strictly: a link that leads nowhere is an error.

python -m tests.reports.site

mkdocs takes one folder, and our documents link to files beside docs/. So they are gathered first, each where it lies in
the checkout, with the pictures and programs that they link to.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "build" / "pages"


def documents() -> list[Path]:
    """Every page, from the root."""
    folders = (ROOT, ROOT / "docs", ROOT / "docs" / "api", ROOT / "bench")
    return sorted(path.relative_to(ROOT) for folder in folders for path in folder.glob("*.md"))


def gather(folder: Path) -> None:
    """Copies of all documents in ``folder``; links to folders and to what is no page or picture become plain words."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in documents():
        text = (ROOT / path).read_text()
        for target in set(re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text)):
            file = (ROOT / path).parent.joinpath(target).resolve()
            if file.suffix in (".png", ".svg"):
                copy = folder / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
            elif file.exists() and file.relative_to(ROOT) not in documents():
                text = re.sub(rf"\[([^\]]*)\]\({re.escape(target)}[^)]*\)", r"\1", text)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


if __name__ == "__main__":
    gather(PAGES)
    sys.exit(subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=ROOT).returncode)
