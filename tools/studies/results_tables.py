"""Write the tables of the pages under docs/ from CSV files.

    python tools/studies/results_tables.py            rewrite every table that its CSV has outgrown
    python tools/studies/results_tables.py --check    change nothing; exit code 1 and the names of stale pages

A page says where a table goes:

    <!-- comparison FILE.csv -->
    ... what stands here is replaced ...
    <!-- end -->

FILE.csv is seen from the folder of the page. It is the comparison.csv of tools/studies/compare_budgets.py: a line per
trained model, with command, commit, seed and hardware. ``backbones``, ``consistency`` and ``search_table`` in its place
do the same with what the tools of these names leave, ``costs`` with the search_costs.csv of tools/studies/league.py.
The comparison.csv of tools/studies/compare_methods.py needs the result that the others are compared with:

    <!-- methods FILE.csv: RESULT -->
    <!-- end -->

Of any other CSV file a block shows the columns that it names:

    <!-- columns FILE.csv: column, column, ... -->
    <!-- end -->

Tables of a league (tools/league/tables.py) come from one such file or several, whose data set may be named:

    <!-- league DATA_SET=FILE.csv LEAGUE.csv: quality, winners, cost, stability, ranks, published -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from embsearch_dist.errors import UserError  # noqa: E402
from tools.league import costs  # noqa: E402
from tools.league.published import read_orders  # noqa: E402
from tools.league.rows import groups_of, read_rows  # noqa: E402
from tools.league.tables import sections  # noqa: E402
from tools.studies import compare_backbones, consistency, method_tables, search_table  # noqa: E402
from tools.studies.budget_tables import markdown, summarise  # noqa: E402
from tools.studies.jobs import read_csv  # noqa: E402

PAGES = ROOT / "docs" / "results"
COLUMNS = re.compile(r"(<!-- columns (\S+\.csv): ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
METHODS = re.compile(r"(<!-- methods (\S+\.csv): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
LEAGUE = re.compile(r"(<!-- league ([^>:]+): ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(
    r"(<!-- (comparison|backbones|consistency|search_table|costs) (\S+\.csv) -->\n).*?(<!-- end -->)", re.DOTALL
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        before = page.read_text()
        after = filled(before, page.parent)
        if after != before:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after)
    print("\n".join(stale) or "all tables are up to date")
    sys.exit(int(check and bool(stale)))


def pages() -> list[Path]:
    """All pages that may have such blocks."""
    return sorted(PAGES.parent.rglob("*.md"))


def filled(text: str, folder: Path) -> str:
    """The text of a page with each of its blocks made anew from the CSV file it names, in ``folder``.

    Raises:
        SystemExit: a file is missing or has no line.
    """
    made = {
        "comparison": table_of,
        "backbones": backbones_of,
        "costs": lambda path: costs.markdown(lines_of(path)),
        "consistency": lambda path: measured_by(consistency.markdown, path),
        "search_table": lambda path: measured_by(search_table.markdown, path),
    }
    text = LEAGUE.sub(lambda found: f"{found[1]}{league_of(folder, found[2], found[3])}{found[4]}", text)
    text = BLOCK.sub(lambda found: f"{found[1]}{made[found[2]](folder / found[3])}{found[4]}", text)
    text = METHODS.sub(
        lambda found: f"{found[1]}{method_tables.markdown(lines_of(folder / found[2]), found[3])}{found[4]}", text
    )
    return COLUMNS.sub(lambda found: f"{found[1]}{columns_of(folder / found[2], found[3])}{found[4]}", text)


def league_of(folder: Path, files: str, parts: str) -> str:
    """Some tables of a league.

    Raises:
        SystemExit: a file is missing or no part has such a name.
    """
    named = [file.rpartition("=") for file in files.split()]
    try:
        groups = groups_of(read_rows([(name, folder / path) for name, _, path in named]))
        text = sections(groups, read_orders(), [part.strip() for part in parts.split(",")])
    except UserError as e:
        raise SystemExit(str(e)) from e
    return re.sub(r"^## ", "### ", text, flags=re.MULTILINE)  # below a heading of the page


def lines_of(path: Path) -> list[dict[str, str]]:
    """Of a CSV file."""
    if not path.exists():
        raise SystemExit(f"{path}: a page names this file, but it is not there")
    rows = read_csv(path)
    if not rows:
        raise SystemExit(f"{path}: no line below the head")
    return rows


def columns_of(path: Path, names: str) -> str:
    """Some columns of a file, below how its lines were made: command, commit and hardware."""
    rows, wanted = lines_of(path), [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in rows[0]]
    if unknown:
        raise SystemExit(f"{path}: a page wants column {unknown[0]!r}, the file has {', '.join(rows[0])}")
    titles = [f"| {' | '.join(name.replace('_', ' ') for name in wanted)} |", "| --- " * len(wanted) + "|"]
    return (
        "\n".join([*head(rows), *titles, *(f"| {' | '.join(row[name] for name in wanted)} |" for row in rows)]) + "\n"
    )


def table_of(path: Path) -> str:
    """Verdicts and table of one comparison."""
    rows = lines_of(path)
    return markdown(rows, summarise(rows), len({r["seed"] for r in rows}))


def backbones_of(path: Path) -> str:
    """The table of one comparison of backbones."""
    return compare_backbones.markdown([compare_backbones.typed(row) for row in lines_of(path)])


def measured_by(markdown: Callable[[list[dict[str, str]]], str], path: Path) -> str:
    """A table below how its lines were made."""
    rows = lines_of(path)
    return "\n".join([*head(rows), markdown(rows)])


def head(rows: list[dict[str, str]]) -> list[str]:
    """Command, commits and machines: a file that was continued later can have more than one of each."""
    commands, commits, machines = (
        list(dict.fromkeys(r[name] for r in rows)) for name in ("command", "commit", "hardware")
    )
    told = f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}; {'; '.join(machines)}."
    return [*(f"    {one}" for one in commands), "", told, ""]


if __name__ == "__main__":
    main()
