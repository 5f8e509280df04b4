"""Lay out the pages of the site, in order: README.md, docs/, the tutorials, the folders' pages, the public names.

    python tools/site/stage.py runs/site/source        # tools/site.sh does this, and builds

Pages keep their places, so links between them lead where they lead on the forge. A tutorial (a script in percent
cells) becomes a page. Files that a page links to come along; a link to a folder, which a site has no page for, becomes
plain text. FOLDER/../mkdocs.yml is written: tools/site/mkdocs.yml with the pages. Only the standard library is needed.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.site.links import ROOT, links, pages

TUTORIALS = "examples"
# What a newcomer needs first comes first. A page of docs/ that stands nowhere here is put under MORE.
ORDER: dict[str, list[str]] = {
    "Start": ["README.md", "docs/searches.md", "docs/running.md", "docs/config.md"],
    "Tutorials": [],
    "Data": ["docs/your_data.md", "docs/data.md", "docs/public_data.md", "docs/ids.md", "docs/object_stores.md"],
    "Methods": [
        "docs/adass.md",
        "docs/utilities.md",
        "docs/width_table.md",
        "docs/league.md",
        "docs/ihas.md",
        "docs/nasrec.md",
    ],
    "Use": ["docs/library.md", "docs/api.md", "docs/serving.md"],
    "Scale": [
        "docs/training.md",
        "docs/sharding.md",
        "docs/cluster.md",
        "docs/docker.md",
        "docs/gpu.md",
        "docs/faults.md",
    ],
    "Results": ["docs/results.md"],
    "Develop": ["CONTRIBUTING.md", "docs/adding_a_method.md", "docs/testing.md", "CHANGELOG.md"],
    "Architecture": [],
}
MORE = "Use"


def percent_to_markdown(text: str) -> str:
    """A script in percent cells as a page: ``# %% [markdown]`` cells are prose, the others Python."""
    parts = []
    for cell in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def api_page(package: Path) -> str:
    """The page of the names in ``__all__`` of the package, for mkdocstrings; the package is not imported."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__"
    ]
    names = [str(name) for name in ast.literal_eval(lists[0])]
    head = "# Public names\n\n`import embsearch_dist as es` offers these; [As a library](library.md) shows their use.\n"
    return head + "".join(f"\n::: {package.name}.api.{name}\n" for name in names)


def site_pages(root: Path) -> dict[str, str]:
    """Path in the site -> text: what the repository's pages, tutorials and public names become."""
    wanted = [p for p in pages(root) if p.parent == root or p.relative_to(root).parts[0] in ("docs", "embsearch_dist")]
    tutorials = sorted((root / TUTORIALS).glob("*.py"))
    rendered = {p.resolve() for p in [*wanted, *tutorials]}
    found = {str(p.relative_to(root)): linked(p, rendered, root) for p in wanted}
    for script in tutorials:
        found[str(script.relative_to(root).with_suffix(".md"))] = percent_to_markdown(
            script.read_text(encoding="utf-8")
        )
    return found | {"docs/api.md": api_page(root / "embsearch_dist")}


def linked(page: Path, rendered: set[Path], root: Path) -> str:
    """The text of a page, its links as the site needs them: tutorials as pages, folders as plain text."""
    text = page.read_text(encoding="utf-8")
    for target in {link.target for link in links(page) if not link.external and not link.target.startswith("#")}:
        place = (page.parent / target.partition("#")[0]).resolve()
        if place.is_dir():
            inner = place / "README.md"
            if inner in rendered:
                text = text.replace(f"]({target})", f"]({target.rstrip('/')}/README.md)")
            else:
                text = re.sub(rf"\[([^\]]*)\]\({re.escape(target)}\)", r"\1", text)
        elif place.suffix == ".py" and place in rendered:
            text = text.replace(f"]({target})", f"]({target.removesuffix('.py')}.md)")
    return text


def attachments(root: Path, texts: dict[str, str]) -> set[Path]:
    """Files that pages link to and that are no pages: pictures, tables, sources."""
    found = set()
    for page in (root / name for name in texts if (root / name).exists()):
        for link in links(page):
            place = (page.parent / link.target.partition("#")[0]).resolve()
            if not link.external and place.is_file() and place.suffix != ".md":
                found.add(place.relative_to(root))
    return found


def order(names: list[str]) -> list[dict[str, list[str | dict[str, str]]]]:
    """The navigation: each section with its pages; every page stands in exactly one. Titles are the pages' own."""
    placed = {name for section in ORDER.values() for name in section}
    nav: dict[str, list[str | dict[str, str]]] = {title: [*section] for title, section in ORDER.items()}
    nav["Start"][0] = {"Overview": "README.md"}
    for name in names:
        if name in placed:
            continue
        folder = name.partition("/")[0]
        title = {TUTORIALS: "Tutorials", "embsearch_dist": "Architecture"}.get(folder, MORE)
        nav["Results" if name.startswith("docs/results/") else title].append(name)
    return [{title: section} for title, section in nav.items() if section]


def stage(target: Path, root: Path = ROOT) -> None:
    """Write all pages, attachments and mkdocs.yml. What an earlier call wrote is replaced.

    Raises:
        ValueError: the folder holds something else.
    """
    mark = target / ".staged"
    if target.exists() and any(target.iterdir()) and not mark.exists():
        raise ValueError(f"{target} was not made by this script; name another folder")
    shutil.rmtree(target, ignore_errors=True)
    texts = site_pages(root)
    for name, text in texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    for name in attachments(root, texts):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, target / name)
    mark.touch()
    here = root / "tools" / "site"
    shutil.copy(here / "site.css", target)
    settings = {
        "INHERIT": str(here / "mkdocs.yml"),
        "docs_dir": str(target.resolve()),
        "site_dir": str(target.resolve().with_name("html")),
        "nav": order(list(texts)),
    }
    target.with_name("mkdocs.yml").write_text(json.dumps(settings, indent=2), encoding="utf-8")  # JSON is YAML


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
