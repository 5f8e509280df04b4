"""HTML of the report: one page, no network, readable in light and dark and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from embsearch_dist.report.style import Picture

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1d2329; --muted: #5d6770; --line: #e0e4e8;
  --soft: #f5f7f8; --accent: #0072b2; --bad: #b3471d; }
@media (prefers-color-scheme: dark) { :root { --back: #161b20; --ink: #e6e9ec; --muted: #a3adb6; --line: #2d353c;
  --soft: #1d242a; --accent: #56b4e9; --bad: #f08a4b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 1000px; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1rem; font-weight: 600; color: var(--muted); margin: 0 0 .75rem; overflow-wrap: anywhere; }
.headline { font-size: 1.55rem; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; margin: 0 0 1rem;
  text-wrap: pretty; max-width: none; }
.more { margin: 0 0 .5rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 1.75rem 0 0; padding: .7rem 0; font-size: .9rem;
  border-block: 1px solid var(--line); }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin-top: 3rem; }
h2 { font-size: 1.3rem; margin: 0 0 .6rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
figure { margin: 1rem 0 1.6rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption, .note { color: var(--muted); font-size: .9rem; max-width: 46rem; margin-top: .5rem; }
.missing { color: var(--muted); border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; font-size: .95rem; }
.wide { overflow-x: auto; margin: 1rem 0 .4rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
tr.found td { font-weight: 650; }
tr.base td { background: var(--soft); }
.sd { color: var(--muted); font-weight: 400; }
.worse { color: var(--bad); }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Consolas,
  "Liberation Mono", monospace; border-radius: 4px; }
@media (max-width: 30rem) { body { padding: 1.25rem .8rem 3rem; } .headline { font-size: 1.2rem; }
  th, td { padding: .35rem .45rem; } section { margin-top: 2rem; }
  figure { overflow-x: auto; } figure img { max-width: max(100%, 44rem); } figcaption { position: sticky; left: 0; } }
@media print { body { max-width: none; } nav { display: none; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Cell:
    """A table cell: text (escaped here) with an optional spread and CSS class."""

    text: str
    sd: str = ""
    css: str = ""

    def html(self) -> str:
        spread = f' <span class="sd">&plusmn; {escape(self.sd)}</span>' if self.sd else ""
        attribute = f' class="{self.css}"' if self.css else ""
        return f"<td{attribute}>{escape(self.text)}{spread}</td>"


@dataclass(frozen=True)
class Section:
    """A titled part of the page; ``body`` is finished HTML."""

    anchor: str
    title: str
    body: str


def page(title: str, headline: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    more = "".join(f'<p class="more">{escape(text)}</p>' for text in headline[1:])
    body = "\n".join(f'<section id="{s.anchor}">\n<h2>{escape(s.title)}</h2>\n{s.body}\n</section>' for s in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n"
        f'<h1>{escape(title)}</h1>\n<p class="headline">{escape(headline[0])}</p>\n{more}\n'
        f"<nav>{links}</nav>\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def picture(image: Picture, caption: str, alt: str) -> str:
    """A plot that follows the reader's light or dark setting, with its caption."""
    data = "data:image/png;base64,"
    return (
        f'<figure id="plot-{image.name}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{data}{image.dark}">'
        f'<img width="{image.width}" src="{data}{image.light}" alt="{escape(alt, quote=True)}"></picture>\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], text_columns: Sequence[int] = ()) -> str:
    """A table; each row comes with the CSS class of its ``tr``."""
    top = "".join(
        f'<th scope="col"{" class=text" if k in text_columns else ""}>{escape(h)}</th>' for k, h in enumerate(head)
    )
    lines = []
    for css, cells in rows:
        attribute = f' class="{css}"' if css else ""
        lines.append(f"<tr{attribute}>{''.join(c.html() for c in cells)}</tr>")
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + ("\n</tbody></table></div>")
    )


def paragraph(text: str, css: str = "") -> str:
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def missing(text: str) -> str:
    """What is not in this run, and what would put it there."""
    return paragraph(text, "missing")


def folded(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
