"""Parts of a run directory that a report reads in its own way: config, lines of records, figures of newer versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from embsearch_dist import written
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.rundir import HEAD, check_text

PARTS = {"reliability": ("rows", "predicted", "clicked"), "by_group": ("field", "auc", "groups", "rows")}
DIFFERENCE = "difference-to-"


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


def extra_told(config: str | None) -> int | None:
    """Columns of a table beside its width, by the text of a config.yaml; None where it does not tell."""
    try:
        model = (yaml.safe_load(config or "") or {}).get("model")
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):
        return None  # a person's own file: the page shows it as it is
    if not isinstance(model, dict) or not {"backbone", "first_order"} <= model.keys():
        return None
    return ModelConfig(backbone=str(model["backbone"]), first_order=str(model["first_order"])).extra


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


def told_beside(body: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The parts of an evaluation that older versions did not write, those that are there.

    Raises:
        UserError: one lacks a key.
    """
    found = {}
    for part, keys in PARTS.items():
        told = body.get(part)
        if told is None:
            continue
        if not isinstance(told, dict) or not set(keys) <= told.keys():
            raise UserError(f"{path}: key {part!r} needs {', '.join(keys)}; evaluate that model again")
        found[part] = told
    return found


def differences_beside(path: Path, split: str) -> list[dict[str, Any]]:
    """What ``evaluate.py --against`` has left beside an evaluation: differences on the rows of its split.

    Raises:
        UserError: a file is damaged or lacks a key.
    """
    kind = path.stem.removeprefix("evaluation")
    found = []
    for file in sorted(path.parent.glob(f"{DIFFERENCE}*{kind}.json")):
        body = read_sealed(file, "Compare again with evaluate.py --against, or delete it")
        if not {"against", "against_seed", "split", "drawn", "router"} <= body.keys():
            raise UserError(f"{file}: not a difference between two models. Compare again, or delete it")
        if body["split"] == split and f"-{body['router']}" * bool(body["router"]) == kind:
            found.append(body)
    return found
