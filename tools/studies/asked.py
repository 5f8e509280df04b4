"""How the command lines of comparisons write lists, budgets and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embsearch_dist.files import read_json, write_json

ASKED = "asked.json"  # in the folder of a study


def words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]


def slug(budget: str) -> str:
    """As searches put a budget into the name of its allocation."""
    return budget.replace("%", "pct").replace(" ", "")


def named(option: str, texts: list[str]) -> dict[str, list[str]]:
    """``NAME:key=value,key=value`` -> name: overrides. A comma inside brackets does not part."""
    found = {}
    for text in texts:
        name, colon, rest = text.partition(":")
        overrides: list[str] = []
        for piece in rest.split(","):
            if overrides and "=" not in piece.split("[")[0]:
                overrides[-1] += f",{piece}"
            else:
                overrides.append(piece)
        if not colon or not name or not all("." in o.partition("=")[0] and "=" in o for o in overrides):
            raise SystemExit(f"{option} {text}: write NAME:section.key=value,section.key=value")
        found[name] = overrides
    return found


def keep_to(out: Path, **settings: Any) -> None:
    """Note what the results in ``out`` depend on, or hold this call to what an earlier one has noted there: what is
    finished is not run again, and would stand under settings that it was not made with.

    Args:
        settings: of a :class:`Path` its text counts, wherever it lies. A name of several words is no option of the
            command line and is told as it is.

    Raises:
        SystemExit: other settings; names those that differ and the cure.
    """
    told = json.loads(json.dumps({k: _digest(v) if isinstance(v, Path) else v for k, v in settings.items()}))
    before: Mapping[str, Any] = read_json(out / ASKED) if (out / ASKED).exists() else {}
    differing = [k for k in told if k in before and before[k] != told[k]]
    if differing:
        words = "; ".join(f"{_shown(k)} {before[k]}, now {told[k]}" for k in differing)
        raise SystemExit(f"{out} holds results of other settings: {words}. Give another --out, or put them back")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / ASKED, {**before, **told})


def _shown(name: str) -> str:
    return name if " " in name else f"--{name.replace('_', '-')}"


def body_of(name: str, body: Mapping[str, Any]) -> str:
    """What :func:`keep_to` notes of a config: its name, and a hash of its keys and values, bases included."""
    return f"{name} {hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]}"


def _digest(path: Path) -> str:
    try:
        return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    except OSError as e:
        raise SystemExit(f"{path}: cannot be read ({e.strerror}). Give a file that is there") from e
