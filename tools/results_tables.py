"""Write the tables of docs/results from the CSV files beside them.

    python tools/results_tables.py            rewrite every table that its CSV has outgrown
    python tools/results_tables.py --check    change nothing; exit code 1 and the names of pages that are out of date

A page says where a table goes:

    <!-- comparison FILE.csv -->
    ... what stands here is replaced ...
    <!-- end -->

FILE.csv lies beside the page and is the comparison.csv of tools/compare_budgets.py: a line per trained model, with
command, commit, seed and hardware.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from budget_tables import markdown, summarise  # noqa: E402

PAGES = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- comparison (\S+\.csv) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for page in sorted(PAGES.glob("*.md")):
        before = page.read_text()
        after = filled(before, page.parent)
        if after != before:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after)
    print("\n".join(stale) or "all tables are up to date")
    sys.exit(int(check and bool(stale)))


def filled(text: str, folder: Path) -> str:
    """The text of a page with each of its blocks made anew from the CSV file it names, in ``folder``.

    Raises:
        SystemExit: a file is missing or has no line.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{table_of(folder / found[2])}{found[3]}", text)


def table_of(path: Path) -> str:
    """Verdicts and table of one comparison."""
    if not path.exists():
        raise SystemExit(f"{path}: a page names this file, but it is not there")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{path}: no line below the head")
    return markdown(rows, summarise(rows), len({r["seed"] for r in rows}))


if __name__ == "__main__":
    main()
