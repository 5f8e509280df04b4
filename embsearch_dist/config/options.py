"""Options: a default, what it means and what it may be, written once and checked from there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from embsearch_dist.errors import UserError, nearest


def option(
    default: Any,
    text: str,
    before: Any = None,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A config field with its help text and what it may be, which :func:`check_section` compares.

    Args:
        before: what versions without this key did, where that is not today's default.
        choices: the words that it may be.
        low, above: the least value, or one that it must be above.
        high, below: the largest value, or one that it must be below.
    """
    metadata: dict[str, Any] = {"help": text} if before is None else {"help": text, "before": before}
    metadata |= {"choices": tuple(choices)} if choices else {}
    bounds = {"low": low, "above": above, "high": high, "below": below}
    metadata |= {"bounds": {k: v for k, v in bounds.items() if v is not None}}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, key: str, message: str) -> None:
    """Raise ``UserError`` naming the key unless ``condition`` holds."""
    if not condition:
        raise UserError(f"config key {key}: {message}")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Check a choice; the error offers the nearest name."""
    if value not in allowed:
        raise UserError(f"config key {key}: {value!r} is none of {', '.join(allowed)}{nearest(value, allowed)}")


def check_section(section: Any, prefix: str) -> None:
    """Check every option of a section and of the sections in it, then what their ``check()`` compares, where it is.

    Raises:
        UserError: names the key, the value and what it may be.
    """
    for f in dataclasses.fields(section):
        value, key = getattr(section, f.name), f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(value):
            check_section(value, key)
        elif "choices" in f.metadata:
            one_of(key, value, f.metadata["choices"])
        elif bounds := f.metadata.get("bounds"):
            require(_inside(value, bounds), key, f"must be {_bounds_told(bounds)}, got {value}")
    if hasattr(section, "check"):
        section.check()


def _inside(value: float, bounds: Mapping[str, float]) -> bool:
    least, most = bounds.get("low", -math.inf), bounds.get("high", math.inf)
    return least <= value <= most and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)


def _bounds_told(bounds: Mapping[str, float]) -> str:
    if len(bounds) == 2:
        opening, closing = "[" if "low" in bounds else "(", "]" if "high" in bounds else ")"
        return f"in {opening}{', '.join(str(v) if isinstance(v, int) else f'{v:g}' for v in bounds.values())}{closing}"
    ((kind, value),) = bounds.items()
    word = {"low": "at least", "above": "above", "high": "at most", "below": "below"}[kind]
    return f">= {value:g}" if kind == "low" and value == 0 else f"{word} {value:g}"
