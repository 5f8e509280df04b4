"""How the command lines of comparisons write lists, budgets and settings."""

from __future__ import annotations


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
