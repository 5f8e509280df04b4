"""Counts of a sweep's cases as Markdown tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def tables(
    cases: Sequence[Case],
    by: Mapping[str, Callable[[Case], str]],
    classes: Sequence[str],
    sums: Sequence[str] = (),
) -> str:
    """One table for each of ``by`` (its head, and what a case counts under there), a column for each class; the last
    table ends with a line of all cases.

    Args:
        sums: keys of a case that are summed up beside the number of cases.
    """
    lines = []
    for what, of in by.items():
        lines.append("| " + " | ".join([what, "cases", *sums, *classes]) + " |")
        lines.append("| --- |" + " ---: |" * (1 + len(sums) + len(classes)))
        parts = {value: [c for c in cases if of(c) == value] for value in sorted({of(c) for c in cases})}
        if what == [*by][-1]:
            parts["all"] = list(cases)
        for value, part in parts.items():
            counts = Counter(c["class"] for c in part)
            numbers = [len(part), *(sum(c[key] for c in part) for key in sums), *(counts[c] for c in classes)]
            lines.append(f"| {value} | " + " | ".join(map(str, numbers)) + " |")
        lines.append("")
    return "\n".join(lines)
