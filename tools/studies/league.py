"""The league of embedding searches: every method at equal budgets on several data sets, ranks and all, in one command.

    python tools/studies/league.py run --plan tools/league/plans/tiny.yaml --out runs/tiny
    python tools/studies/league.py run --plan tools/league/plans/movielens_1m_time.yaml --raw ml-1m/ --out runs/league
    python tools/studies/league.py run --plan tools/league/plans/planted_*.yaml --out runs/league --seeds 3 --jobs 2
    python tools/studies/league.py run --plan ... --out runs/league --dry-run        list the commands
    python tools/studies/league.py run --plan ... --searches                         what searches cost, and no more
    python tools/studies/league.py run --plan ... --first-seed 3 --seeds 2 --earlier docs/results/league.csv
    python tools/studies/league.py tables runs/league/league.csv more.csv --out runs/pages

``run`` prepares the data of each plan where they are not there yet, then searches and trains with the functions of
tools/studies/compare_budgets.py, in OUT/DATA_SET. What is finished is skipped, so a stopped league continues, and one
that is given more plans, seeds or methods keeps what it has. It leaves OUT/league.csv, a line for each data set, seed,
method and budget, and what ``tables`` makes of it. tools/league/plan.py says what a plan may hold.

What --earlier tells (a league.csv of the same plans and data) is not run again and stands in the new league.csv.

``tables`` makes OUT/league.md and pictures from CSV files alone: those of ``run``, and comparison.csv files of
compare_budgets.py, of which NAME=FILE names the data set. docs/league.md says how to read them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.errors import UserError
from tools.league import costs
from tools.league.pictures import draw_all
from tools.league.plan import LeaguePlan, read_plan, ready
from tools.league.published import read_orders
from tools.league.rows import Row, groups_of, read_rows, write_rows
from tools.league.tables import page
from tools.studies.budget_tables import write_all
from tools.studies.compare_budgets import Plan
from tools.studies.jobs import Job, read_csv, run_all, shown, write_csv

LEAGUE = "league.csv"
COSTS = "search_costs.csv"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.command(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    run = commands.add_parser("run", help="prepare, search, train, tables")
    run.set_defaults(command=run_plans)
    run.add_argument(
        "--plan", type=Path, nargs="+", required=True, help="YAML files, e.g. tools/league/plans/tiny.yaml"
    )
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--data", type=Path, help="prepared data of the plan; only with one plan")
    run.add_argument("--raw", default="", help="folder of raw data, for plans that prepare from it")
    run.add_argument("--seeds", type=int, default=0, help="0, the default: as many as each plan says")
    run.add_argument("--first-seed", type=int, default=0, help="number of the first one")
    run.add_argument("--earlier", type=Path, help="league.csv whose lines are not run again and join the tables")
    run.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    run.add_argument("--searches", action="store_true", help="train nothing that is found: what do searches cost?")
    run.add_argument("--dry-run", action="store_true", help="print the commands and leave")
    tables = commands.add_parser("tables", help="tables and pictures from CSV files")
    tables.set_defaults(command=make_tables)
    tables.add_argument("csv", nargs="+", help="league.csv, or DATA_SET=comparison.csv")
    tables.add_argument("--out", type=Path, required=True)
    return top


def run_plans(args: argparse.Namespace) -> int:
    """Run all plans, then write what is finished.

    Raises:
        UserError: a plan is wrong, two are of one data set, or raw data are missing.
    """
    plans = [read_plan(path) for path in args.plan]
    names = [plan.data_set for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--plan: two plans are of the data set {name}. Give one of them another data_set")
    if args.data is not None and len(plans) > 1:
        raise UserError("--data is the data of one plan, and there are several. Give one plan")
    for plan in plans:  # before hours are spent on the first of them
        preparation(plan, args)
    for k, plan in enumerate(plans):
        print(f"plan {k + 1} of {len(plans)}: {plan.data_set}", flush=True)
        run_plan(plan, args)
    if args.dry_run:
        return 0
    if args.searches:
        return write_costs(plans, args)
    rows = [row for plan in plans for row in rows_of(args.out, plan.data_set)]
    write_rows(args.out / LEAGUE, merged(args.out / LEAGUE, rows, names))
    return write_tables([("", args.out / LEAGUE)], args.out)


def run_plan(plan: LeaguePlan, args: argparse.Namespace) -> None:
    """Prepare, search and train; or print the commands."""
    out = args.out / plan.data_set
    before = preparation(plan, args)
    if not args.dry_run:
        run_all([before], out / "logs", 1)
    comparison = comparison_of(plan, args)
    if args.dry_run:
        jobs = costs.jobs(comparison) if args.searches else comparison.jobs()
        for job in [*before, *jobs]:
            print(f"{job.name}: {shown(job)}")
        return
    if args.searches:
        costs.carry_out(comparison)
        return
    comparison.carry_out()
    write_all(out, comparison.trained(), comparison.earlier.with_new)


def comparison_of(plan: LeaguePlan, args: argparse.Namespace) -> Plan:
    """The comparison that a plan stands for under this command line."""
    asked = plan.arguments(args.out / plan.data_set, data_of(plan, args), args.jobs, args.seeds)
    asked.first_seed, asked.earlier = args.first_seed, args.earlier
    return Plan(asked, plan.data_set)


def write_costs(plans: Sequence[LeaguePlan], args: argparse.Namespace) -> int:
    """OUT/search_costs.csv and its table."""
    rows = [row for plan in plans for row in costs.rows_of(comparison_of(plan, args), plan.data_set)]
    rows = merged(args.out / COSTS, rows, [plan.data_set for plan in plans])
    write_csv(args.out / COSTS, costs.COLUMNS, rows)
    print(costs.markdown(rows))
    return 0


def preparation(plan: LeaguePlan, args: argparse.Namespace) -> list[Job]:
    """The commands that make the data; none where they are there.

    Raises:
        UserError: ``--data`` names no prepared data, or data are needed and not given.
    """
    data = data_of(plan, args)
    if ready(data):
        return []
    if args.data is not None:
        raise UserError(f"--data {data}: no prepared data are there. Give the folder that prepare.py wrote")
    if not plan.prepare:
        raise UserError(f"{plan.data_set}: the plan does not say how its data are prepared. Give them (--data)")
    return plan.preparation(args.out / plan.data_set, data, args.raw)


def data_of(plan: LeaguePlan, args: argparse.Namespace) -> Path:
    """Where the prepared data of a plan are, or are to be."""
    return args.data if args.data is not None else args.out / plan.data_set / "data"


def rows_of(out: Path, data_set: str) -> list[Row]:
    """The lines of one plan's comparison, with the name of its data set."""
    return [{"data_set": data_set, **row} for row in read_csv(out / data_set / "comparison.csv")]


def merged(path: Path, rows: list[Row], names: Sequence[str]) -> list[Row]:
    """New lines, behind those that an earlier league left there of other data sets."""
    if not path.exists():
        return rows
    return [row for row in read_csv(path) if row["data_set"] not in names] + rows


def make_tables(args: argparse.Namespace) -> int:
    return write_tables([named(text) for text in args.csv], args.out)


def named(text: str) -> tuple[str, Path]:
    """``NAME=FILE`` or ``FILE``: the name, or nothing, and the file."""
    name, sign, file = text.rpartition("=")
    return ("", Path(text)) if not sign or Path(text).exists() else (name, Path(file))


def write_tables(files: Sequence[tuple[str, Path]], out: Path) -> int:
    """OUT/league.md and the pictures that the lines are enough for."""
    groups = groups_of(read_rows(files))
    out.mkdir(parents=True, exist_ok=True)
    (out / "league.md").write_text(page(groups, read_orders()))
    for path in [out / "league.md", *draw_all(groups, out)]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
