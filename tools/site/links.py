"""The links of all Markdown pages: do files and headings that they point at exist?

    python tools/site/links.py               # a line for each dead link, exit code 1 if there is one
    python tools/site/links.py --external    # addresses of other sites, to be looked at by hand; nothing is fetched

Links count as the forge resolves them: relative to the page, with the headings' anchors in GitHub's form. Code blocks
and code spans are no links. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "docs", "embsearch_dist", "examples", "launch", "tests", "tools")

_FENCE = re.compile(r"^\s*(```+|~~~+)")
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_INLINE = re.compile(r"\]\(\s*<?([^\s)>]+)>?(?:\s+[\"'][^)]*[\"'])?\s*\)")
_REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*(\S+)")
_HTML = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)\s*=\s*[\"']([^\"']+)[\"']", re.IGNORECASE)
_BARE = re.compile(r"<(https?://[^>\s]+)>")
_NAMED = re.compile(r"<a\b[^>]*?\b(?:id|name)\s*=\s*[\"']([^\"']+)[\"']", re.IGNORECASE)
_HEADING = re.compile(r"^\s{0,3}#{1,6}\s+(.*?)(?:\s+#+)?\s*$")


@dataclass(frozen=True)
class Link:
    """One link: the page that has it, its line (from 1), and the target as written."""

    page: Path
    line: int
    target: str

    @property
    def external(self) -> bool:
        return bool(re.match(r"[a-z][a-z0-9+.-]*:", self.target, re.IGNORECASE))


def pages(root: Path = ROOT) -> list[Path]:
    """All Markdown files of the repository, those at the top first."""
    return [*sorted(root.glob("*.md")), *(p for name in FOLDERS for p in sorted((root / name).rglob("*.md")))]


def text_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines outside fenced code."""
    fence = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        elif not fence:
            yield number, line


def links(page: Path) -> list[Link]:
    """Every link and picture of a page, in order."""
    found = []
    for number, line in text_lines(page):
        plain = _CODE.sub("", line)
        for pattern in (_INLINE, _REFERENCE, _HTML, _BARE):
            found += [Link(page, number, match[1]) for match in pattern.finditer(plain)]
    return found


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, no punctuation, a hyphen for each space."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """The anchors that a page has: of its headings (a repeated one gets -1, -2, ...) and of named tags."""
    found: set[str] = set()
    for _, line in text_lines(page):
        found.update(_NAMED.findall(line))
        heading = _HEADING.match(line)
        if heading:
            base = name = anchor(heading[1])
            count = 0
            while name in found:
                count += 1
                name = f"{base}-{count}"
            found.add(name)
    return found


def trouble(link: Link, root: Path = ROOT) -> str:
    """What is wrong with a link; empty if nothing is, or if it leads to another site."""
    if link.external:
        return ""
    path, _, fragment = link.target.partition("#")
    target = (link.page.parent / path).resolve() if path else link.page.resolve()
    if path.startswith("/") or not target.is_relative_to(root.resolve()):
        return "leads out of the repository"
    if not target.exists():
        return "no such file"
    if fragment and target.suffix != ".md":
        return "only a Markdown page has anchors"
    if fragment and fragment not in anchors(target):
        return f"{target.relative_to(root.resolve())} has no heading #{fragment}"
    return ""


def dead(root: Path = ROOT) -> list[str]:
    """A line for each dead link of the repository: page:line: target: reason."""
    lines = []
    for page in pages(root):
        for link in links(page):
            reason = trouble(link, root)
            if reason:
                lines.append(f"{page.relative_to(root)}:{link.line}: {link.target}: {reason}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--external", action="store_true", help="list links to other sites in place of checking")
    if parser.parse_args().external:
        for link in (found for page in pages() for found in links(page) if found.external):
            print(f"{link.page.relative_to(ROOT)}:{link.line}: {link.target}")
        return 0
    lines = dead()
    print("\n".join([*lines, f"{len(pages())} pages, {len(lines)} dead links"]))
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
