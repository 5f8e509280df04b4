"""Links between the pages lead somewhere, and the check that says so finds those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.site import links


def test_no_page_has_a_dead_link() -> None:
    assert len(links.pages()) > 30  # the check has looked at something
    assert links.dead() == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## What's `new`, and where?\n\n## Twice\n\n## Twice\n")
    (tmp_path / "docs" / "data.csv").write_text("a\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a](docs/other.md)", ""),
        ("[a](docs/other.md#whats-new-and-where)", ""),
        ("[a](docs/other.md#twice-1)", ""),
        ("[a](#here)", ""),
        ("[a](docs)", ""),
        ('![a](docs/data.csv "a title")', ""),
        ("[a]: docs/other.md", ""),
        ("`[a](gone.md)`", ""),
        ("```\n[a](gone.md)\n```", ""),
        ("[a](https://gone.example/x)", ""),
        ("[a](docs/gone.md)", "no such file"),
        ("![a](docs/gone.png)", "no such file"),
        ("[a]: docs/gone.md", "no such file"),
        ('<a href="docs/gone.md">a</a>', "no such file"),
        ("`code` [a](docs/gone.md) `code`", "no such file"),
        ("````\n```\n````\n[a](gone.md)", "no such file"),
        ("[a](docs/other.md#gone)", "no heading #gone"),
        ("[a](docs/other.md#twice-2)", "no heading #twice-2"),
        ("[a](#gone)", "no heading #gone"),
        ("[a](docs/data.csv#gone)", "only a Markdown page"),
        ("[a](../outside.md)", "leads out"),
        ("[a](/docs/other.md)", "leads out"),
    ],
)
def test_a_link_is_followed_as_the_forge_does(tree: Path, text: str, reason: str) -> None:
    (tree.parent / "outside.md").touch()
    (tree / "README.md").write_text(f"# Here\n\n{text}\n")
    lines = links.dead(tree)
    assert len(lines) == bool(reason)
    assert all(reason in line and line.startswith("README.md:") for line in lines)


def test_links_to_other_sites_are_told_apart(tree: Path) -> None:
    (tree / "README.md").write_text("[a](https://x.example) <https://y.example> [b](docs/other.md) [c](mailto:z)\n")
    assert [link.external for link in links.links(tree / "README.md")] == [True, False, True, True]
