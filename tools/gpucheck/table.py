"""The results as tables: for a terminal, and as Markdown for the documentation. Imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tools.gpucheck.listing import ONE_CARD

OK, FAILED, LEFT_OUT, SKIPPED = "ok", "FAILED", "left out", "skipped"
Result = Mapping[str, Any]
WIDTH = 120


def told(result: Result) -> str:
    """The figures that are numbers or words, in their order, behind the reason where there is one."""
    figures = [f"{k} {_short(v)}" for k, v in result["figures"].items() if not isinstance(v, list | dict)]
    return "; ".join([*([result["why"]] if result["why"] else []), *figures])


def text_table(results: Sequence[Result]) -> str:
    """For a terminal: the figures are wrapped under their check."""
    lines = [f"{'#':>2}  {'check':<10} {'status':<9}{'seconds':>8}  figures"]
    for r in results:
        head = f"{r['number']:>2}  {r['check']:<10} {r['status']:<9}{r['seconds']:>8.1f}  "
        wrapped = textwrap.wrap(told(r), max(40, WIDTH - len(head)), break_long_words=False) or [""]
        lines += [head + wrapped[0], *(" " * len(head) + part for part in wrapped[1:])]
    return "\n".join([*lines, "", summary(results), ONE_CARD])


def markdown(results: Sequence[Result], facts: Mapping[str, str], command: str) -> str:
    """Ready to be pasted into docs/results/gpu.md."""
    where = ", ".join(f"{k} {v}" for k, v in facts.items())
    head = [
        f"`{command}` ({where}):",
        "",
        "| # | check | status | seconds | figures |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = [
        f"| {r['number']} | {r['check']} | {r['status']} | {r['seconds']:.1f} | {_cell(told(r))} |" for r in results
    ]
    return "\n".join([*head, *rows, "", f"{summary(results)} {ONE_CARD}", ""])


def summary(results: Sequence[Result]) -> str:
    """``15 checks: 13 ok, 1 FAILED, 1 left out.``"""
    kinds = [(kind, sum(r["status"] == kind for r in results)) for kind in (OK, FAILED, SKIPPED, LEFT_OUT)]
    return f"{len(results)} checks: " + ", ".join(f"{n} {kind}" for kind, n in kinds if n) + "."


def _short(value: Any) -> str:
    """A number in four digits; whole ones and large ones with commas."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
