"""Checks a built site: every link within it leads somewhere, nothing is fetched from elsewhere, no markup leaks.

python docs/check_site.py docs/_build/html
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Emphasis, literals and roles that were meant as markup, and escapes that were not.
_LEAK = r".{0,30}(?:\*\*\w(?:[\w ]*\w)?\*\*|``|:\w+:`|\\\*).{0,30}"


class Page(HTMLParser):
    """The links, anchors, sources and running text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.anchors: set[str] = set()
        self.prose: list[str] = []
        self._skipped: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.sources.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon") and found.get("href"):
            self.sources.append(found["href"])
        if tag in ("pre", "code", "script", "style") or "math" in (found.get("class") or "").split():
            self._skipped.append(tag)

    def handle_endtag(self, tag):
        if self._skipped and self._skipped[-1] == tag:
            self._skipped.pop()

    def handle_data(self, data):
        if not self._skipped:
            self.prose.append(data)


def problems(root: Path) -> list[str]:
    """What is wrong, a line each."""
    pages = {path: Page(path.read_text()) for path in root.rglob("*.html") if "_modules" not in path.parts}
    found = []
    for path, page in pages.items():
        where = path.relative_to(root)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                found.append(f"{where}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {link} has no such place")
        found += [f"{where}: fetches {source}" for source in page.sources if urlsplit(source).netloc]
        prose = " ".join(page.prose)
        found += [f"{where}: leaks {leak!r}" for leak in re.findall(_LEAK, prose)]
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    wrong = problems(root)
    print("\n".join(wrong) or f"{len(list(root.rglob('*.html')))} pages: all links lead somewhere.")
    sys.exit(bool(wrong))
