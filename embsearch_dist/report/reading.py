"""Files of a run directory that are no sealed JSON: the config and lines of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embsearch_dist import written
from embsearch_dist.errors import UserError
from embsearch_dist.rundir import HEAD, check_text


def there(path: Path) -> bool:
    """Whether anything has that name: a loop of links, too, which is no missing file."""
    return path.exists() or path.is_symlink()


def config_text(path: Path) -> str:
    """The text of a config.yaml; held to its checksum where a run has written it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text or text.startswith(HEAD) or written.knows(path):
        check_text(path)
    return text


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The readable JSON objects of a file, and how many lines were not (a killed run cuts off its last line)."""
    lines: list[dict[str, Any]] = []
    bad = 0
    if not there(path):
        return lines, bad
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for text in stream:
                if not text.strip():
                    continue
                try:
                    body = json.loads(text)
                except (ValueError, RecursionError):
                    body = None
                if isinstance(body, dict):
                    lines.append(body)
                else:
                    bad += 1
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}). Delete it: the report does without") from e
    return lines, bad
