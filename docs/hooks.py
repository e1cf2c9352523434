"""Of the documentation site: the README is its first page, and pages that the navigation leaves out come under More."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def on_config(config):
    """Add the pages that nobody has placed."""
    pages = sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))
    placed = str(config.nav)
    more = [page for page in pages if f"'{page}'" not in placed]
    if more:
        config.nav.append({"More": more})
    return config


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Put the README where `index.md` asks for it; its links to docs/ become links inside the site."""
    if page.file.src_uri != "index.md":
        return markdown
    return re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text())
