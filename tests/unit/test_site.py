"""The site's pages: all of the repository's, once each, with links that lead somewhere in the site, too."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools.site import links, stage

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = '''"""Not shown."""
# %% [markdown]
# # A title
#
# Prose with `code`.

# %%
import math

print(math.pi)
# %% [markdown]
# The end.
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "source"
    stage.stage(target)
    return target


def test_every_page_is_in_the_navigation_once(site: Path) -> None:
    staged = sorted(str(p.relative_to(site)) for p in site.rglob("*.md"))
    names: list[str] = []
    for section in stage.order(staged):
        for entries in section.values():
            names += [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in entries]
    assert sorted(names) == staged
    assert {"README.md", "docs/serving.md", "docs/api.md", "embsearch_dist/data/load/README.md"} <= set(staged)


def test_a_new_page_needs_no_entry() -> None:
    nav = stage.order(["README.md", "docs/brand_new.md", "docs/results/new.md", "examples/09_new.md"])
    placed = {title: entries for section in nav for title, entries in section.items()}
    assert "docs/brand_new.md" in placed[stage.MORE]
    assert placed["Results"][-1] == "docs/results/new.md" and placed["Tutorials"] == ["examples/09_new.md"]


def test_links_of_the_site_lead_to_files_of_the_site(site: Path) -> None:
    found = [(page, link) for page in site.rglob("*.md") for link in links.links(page) if not link.external]
    assert len(found) > 50
    assert [f"{link.page}: {link.target}" for _, link in found if links.trouble(link, site)] == []
    # and none to a folder, which is no page
    assert [link.target for page, link in found if (page.parent / link.target.partition("#")[0]).is_dir()] == [
        link.target for _, link in found if link.target.startswith("#")
    ]


def test_a_script_in_percent_cells_becomes_a_page() -> None:
    page = stage.percent_to_markdown(SCRIPT)
    assert page == "# A title\n\nProse with `code`.\n\n```python\nimport math\n\nprint(math.pi)\n```\n\nThe end.\n"


@pytest.mark.parametrize("script", sorted((ROOT / stage.TUTORIALS).glob("*.py")), ids=lambda path: path.stem)
def test_a_tutorials_page_has_all_of_its_code(script: Path, site: Path) -> None:
    page = (site / stage.TUTORIALS / f"{script.stem}.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert page.startswith("# ") and "\n## " in page
    assert ast.unparse(ast.parse(code).body) == ast.unparse(ast.parse(script.read_text()).body[1:])  # but the docstring


def test_the_api_page_names_what_the_package_offers(site: Path) -> None:
    import embsearch_dist as es

    named = re.findall(r"^::: embsearch_dist\.api\.(\w+)$", (site / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(es.__all__)


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="was not made by this script"):
        stage.stage(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
