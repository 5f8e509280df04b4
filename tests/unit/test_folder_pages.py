"""A folder of many files has a page that says what each holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MANY = 6


def here(folder: Path) -> list[str]:
    """What the page of a folder has to name: its modules, and the packages in it."""
    modules = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
    packages = [f"{p.name}/" for p in folder.iterdir() if (p / "__init__.py").exists()]
    return sorted([*modules, *packages])


FOLDERS = sorted(
    p.parent for p in (ROOT / "embsearch_dist").rglob("__init__.py") if len(list(p.parent.glob("*.py"))) - 1 > MANY
)


def test_there_are_such_folders() -> None:
    assert len(FOLDERS) > 10


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_names_what_is_there_and_nothing_else(folder: Path) -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == here(folder)
    assert all(len(text) > 15 for _, text in rows)
