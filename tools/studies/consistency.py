"""How well a supernet ranks subnets: Kendall's tau between inherited scores and subnets trained alone (Table 4).

    python tools/studies/consistency.py --config configs/movielens_1m_time/adass_deepfm.yaml --data PREPARED \\
        --out runs/tau --subnets 40 --truths 3 --seeds 3
    python tools/studies/consistency.py --space tools/tables/movielens_100k.yaml \\
        --table tools/tables/movielens_100k.csv --data PREPARED --out runs/tau --seeds 5
    python tools/studies/consistency.py ... --settings "printed:search.sampling.eq5=layernorm"
    python tools/studies/consistency.py ... --seeds 0               subnets trained alone, and no supernet
    python tools/studies/consistency.py ... --alone subnets.csv --earlier consistency.csv     go on where both ended
    python tools/studies/consistency.py ... --keeping user_id,movie_id      judge by subnets that drop none of these

The second command takes every allocation of a table as a subnet, so nothing is trained alone.

The last setting is no supernet: the widest model, trained once per seed, is cut down to every subnet (as utilities do).

The truth of a subnet is the mean test AUC of its trainings alone, with seeds of their own. The ceiling is what one
more training alone is worth as a score: the tau between the validation AUC of one seed and the mean test AUC of the
others. Each setting trains its supernet once per seed and scores all subnets on the whole validation split; settings
that differ in scoring alone share a supernet. All is resumable; another config, data, --draw or --extra need another
OUT. It writes OUT/consistency.csv and OUT/consistency.md, and
OUT/subnets.csv with a line for each training alone, those of --alone among them. With --keeping the first two are
OUT/consistency-keeping.csv and .md: a subnet without its best field is told from the others by any score.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config, written
from embsearch_dist.config.widths import SCHEMES
from embsearch_dist.errors import UserError, nearest
from embsearch_dist.methods.adass.config import MODES
from embsearch_dist.methods.adass.scored_rows import make_scorer
from embsearch_dist.methods.utilities.search_stage import make_searcher
from embsearch_dist.ranks.context import start
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.width_table import Space, WidthTable
from launch.common import CONFIGS
from tools.gpucheck.facts import commit, hardware
from tools.studies import alone
from tools.studies.alone import Truth, of_table, tau
from tools.studies.asked import body_of, keep_to, named
from tools.studies.jobs import ROOT, Job, machine_of, read_csv, recorded, run_all, trained_in, write_csv
from tools.studies.seeds import spread, with_deviation

# Keys that change what is scored and how, and leave the trained supernet as it is.
SCORING = ("search.policy.", "search.supernet.keep")
# The config as it is, its changes to the printed method taken back one at a time, and options that are off by default.
SETTINGS = {
    "as configured": [],
    "Eq. 5 as printed": ["search.sampling.eq5=layernorm"],
    **{mode: [f"search.sampling.mode={mode}"] for mode in MODES[1:]},
    **{f"{scheme} tables": [f"search.scheme={scheme}"] for scheme in SCHEMES},
    "no warm-up": ["search.sampling.warmup=0"],
    "widest subnet judges": ["search.supernet.panel=1"],
    "last weights": ["search.supernet.keep=last"],
    "2,000 scored rows": ["search.policy.rows=2000"],
    "heads refitted": ["search.policy.refit=linear"],
    "sandwich of 4 subnets": ["search.sampling.subnets=4"],
}
CUT_DOWN = "widest model, cut down"
SCORED = ("tau_test", "tau_validation", "regret")
COLUMNS = ("setting", "seed", "subnets", *SCORED, "ceiling", "noise")
FACTS = ("commit", "hardware", "command")


def main() -> None:
    try:
        carry_out(parser().parse_args())
    except UserError as e:
        raise SystemExit(f"error: {e}") from e


def carry_out(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: neither a config nor a table with its space is given, or a file of an earlier study is of another.
        SystemExit: a command failed; names its log.
    """
    settings = named("--settings", args.settings) or SETTINGS
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args)
    study.keep_to()
    study.check_earlier()
    wanted = [(name, seed) for name in [*settings, CUT_DOWN] for seed in range(args.seeds)]
    known = {(row["setting"], int(row["seed"])): row for row in study.earlier}
    rows = [row for key, row in known.items() if key not in wanted]
    jobs = [
        study.widest(s) if n == CUT_DOWN else study.supernet(settings[n], s) for n, s in wanted if (n, s) not in known
    ]
    try:
        run_all([*unique([[job] for job in jobs]), *study.alone()], args.out / "logs", args.jobs)
    finally:
        study.write_subnets()
    truth = study.truth()
    facts = {"commit": commit(ROOT), "hardware": hardware("1 thread"), "command": told(args)}
    for name, seed in wanted:
        scores = partial(study.cut_down, seed) if name == CUT_DOWN else partial(study.scores, settings[name], seed)
        new = (name, seed) not in known
        figures = measured(truth, scores(truth.choices)) | facts if new else known[name, seed]
        rows.append({**figures, "setting": name, "seed": seed})
    stem = "consistency-keeping" if args.keeping else "consistency"
    write_csv(args.out / f"{stem}.csv", [*COLUMNS, *FACTS], rows)
    text = markdown(rows) if rows else ""
    (args.out / f"{stem}.md").write_text(text)
    print(text or f"{args.out / alone.FILE}: {truth.test.size} trainings alone")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--config", type=Path, help="config of an adass search; of a table it is that of its space")
    add("--data", type=Path, required=True, help="prepared data set")
    add("--out", type=Path, required=True)
    add("--subnets", type=int, default=40, help="subnets drawn at random and trained alone")
    add("--truths", type=int, default=3, help="trainings alone of each subnet")
    add("--draw", type=int, default=0, help="seed of the drawn subnets")
    add("--alone", type=Path, help="subnets.csv of an earlier study: its trainings are not run again")
    add("--earlier", type=Path, help="consistency.csv of an earlier study: its lines stand in the new table")
    add("--keeping", default="", help="comma-separated fields: only subnets that drop none of them are scored")
    add("--space", type=Path, help="with --table: groups of fields and their widths, YAML")
    add("--table", type=Path, help="CSV of tools/studies/width_table.py: its allocations are the subnets")
    add("--seeds", type=int, default=3, help="supernets of each setting")
    add("--settings", nargs="*", default=[], help="NAME:key=value,... in place of the built-in ones")
    add("--extra", nargs="*", default=[], help="further overrides for all runs, section.key=value")
    add("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    return found


def told(args: argparse.Namespace) -> str:
    """The command as it was given, without the folders of this machine."""
    paths = {str(args.out): "OUT", str(args.data): "PREPARED"}
    return shlex.join(["python", "tools/studies/consistency.py", *(paths.get(x, x) for x in sys.argv[1:])])


def unique(chains: list[list[Job]]) -> list[list[Job]]:
    """Settings that share a supernet have one job."""
    return list({chain[0].name: chain for chain in chains}.values())


class Study:
    """The runs, by the command line's arguments."""

    def __init__(self, args: argparse.Namespace) -> None:
        """
        Raises:
            UserError: neither a config nor a table with its space is given, ``--alone`` is of other subnets, or
                ``--keeping`` names no field.
        """
        self.args, self.schema = args, Schema.load(args.data)
        self.extra: list[str] = [*args.extra, f"data.path={args.data}"]
        self.table: WidthTable | None = None
        if args.table and args.space:
            space = Space.load(args.space)
            space.check(self.schema)
            self.table = WidthTable.load(args.table, space)
            self.config = args.config or ROOT / space.config
            widths = sorted({w for g in space.groups for w in g.widths})
            self.extra += [f"{key}={value}" for key, value in space.overrides.items() if not key.startswith("train.")]
            self.extra += [f"search.candidates={widths}", "search.budget="]
        elif args.config:
            self.config = args.config
        else:
            raise UserError("give --config, or --space together with --table")
        self.keeping = [name for name in args.keeping.split(",") if name]
        for name in self.keeping:
            if name not in self.schema.names:
                raise UserError(f"--keeping: {args.data} has no field {name!r}{nearest(name, self.schema.names)}")
        self.earlier: list[dict[str, Any]] = lines_of(args.earlier) if args.earlier else []
        as_it_is = self.read([])
        self.candidates: list[int] = as_it_is.search.candidates
        self.own_seed = int(as_it_is.run.seed)
        drawn = [alone.told(self.widths(k)) for k in range(args.subnets)] if self.table is None else []
        self.trained_before = alone.read_lines(args.alone, drawn) if args.alone else {}

    def keep_to(self) -> None:
        """Hold OUT to its config, data, draw and overrides; subnets, trainings, seeds and settings may be added."""
        config, data = body_of(self.config.name, written(self.config)), self.args.data / "schema.json"
        extra = [x for x in self.extra if not x.startswith("data.path=")]
        keep_to(self.args.out, config=config, draw=self.args.draw, extra=extra, data=data)

    def check_earlier(self) -> None:
        """
        Raises:
            UserError: the lines of ``--earlier`` were judged by other trainings alone than those of this study.
        """
        if not self.earlier:
            return
        left = [job for chain in self.alone() for job in chain if not job.done]
        ceiling = None if left else str(round(self.truth().ceiling(), 4))
        if other := [row["ceiling"] for row in self.earlier if row["ceiling"] != ceiling]:
            here = f"{len(left)} of them are still to be run" if left else f"ceiling {other[0]}, here {ceiling}"
            raise UserError(
                f"--earlier {self.args.earlier}: its lines were judged by other trainings alone ({here}). Give the "
                "subnets.csv of that study as --alone, or leave --earlier out: supernets that are there get new scores"
            )

    def read(self, more: Sequence[str]) -> Any:
        return load_config(CONFIGS, self.config, [*self.extra, *more])

    def supernet(self, setting: Sequence[str], seed: int) -> Job:
        """A search whose policy is a token: only the supernet is wanted."""
        directory = self.directory(setting, seed)
        short = ["search.policy.steps=1", "search.policy.refine=false", "search.policy.rows=1000"]
        wanted = [*self.extra, *training_only(setting), f"run.seed={seed}", f"run.dir={directory}", *short]
        arguments = ["--config", str(self.config), *(f"--{x}" for x in wanted)]
        return Job(directory.name, "launch/search.py", arguments, directory / "allocation.json")

    def directory(self, setting: Sequence[str], seed: int) -> Path:
        plain = "_".join(x.removeprefix("search.").replace("=", "-") for x in training_only(setting)) or "configured"
        return Path(self.args.out / f"seed{seed}-{plain}")

    def scores(self, setting: Sequence[str], seed: int, choices: np.ndarray) -> list[float]:
        """Validation AUC of all subnets under one supernet."""
        exact = ["search.policy.rows=10000000", "search.policy.precision=float32"]
        config = self.read([*exact, *setting, f"run.seed={seed}", f"run.dir={self.directory(setting, seed)}"])
        with start(config.run, config.dist) as context:
            scored = make_scorer(Run(config, self.schema, context)).score(torch.from_numpy(choices))
        return [float(s["auc"]) for s in scored]

    def widest(self, seed: int) -> Job:
        """A search by utilities with little to search: its trained widest model is wanted."""
        directory = self.args.out / f"seed{seed}-widest"
        wanted = [*self.shared(), f"run.seed={seed}", f"run.dir={directory}", "search.rows=1000", "search.rounds=1"]
        arguments = ["--config", str(self.utilities()), *(f"--{x}" for x in wanted)]
        return Job(directory.name, "launch/search.py", arguments, directory / "allocation.json")

    def shared(self) -> list[str]:
        """Overrides that are not those of AdaS&S's search."""
        return [x for x in self.extra if not x.startswith("search.")]

    def utilities(self) -> Path:
        """The recipe of the config with a search by utilities in it."""
        search = {"candidates": self.candidates, "width": max(self.candidates)}
        path = Path(self.args.out / "utilities.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {**written(self.config), "method": "utilities", "search": search}
        path.write_text(yaml.safe_dump(body, sort_keys=False))
        return path

    def cut_down(self, seed: int, choices: np.ndarray) -> list[float]:
        """Validation AUC of the widest model, cut down to each subnet."""
        directory = self.args.out / f"seed{seed}-widest"
        words = [*self.shared(), f"run.seed={seed}", f"run.dir={directory}", "search.rows=10000000"]
        config = load_config(CONFIGS, self.utilities(), words)
        with start(config.run, config.dist) as context:
            model = make_searcher(Run(config, self.schema, context)).model
            return [float(model.metrics([self.candidates[j] for j in c])["auc"]) for c in choices.tolist()]

    def alone(self) -> list[list[Job]]:
        """Trainings of the drawn subnets; none for a table, which has them."""
        if self.table is not None:
            return []
        return [[self.alone_job(k, seed)] for k, seed in self.trainings() if (k, seed) not in self.trained_before]

    def trainings(self) -> list[tuple[int, int]]:
        """(subnet, seed) of each."""
        return [(k, seed) for seed in range(self.args.truths) for k in range(self.args.subnets)]

    def alone_job(self, k: int, seed: int) -> Job:
        path = self.args.out / "subnets" / f"subnet{k}.json"
        if not path.exists():
            Allocation(self.schema, self.widths(k), {"method": "random", "name": path.stem}).save(path)
        wanted = [*self.extra, f"run.seed={seed}", f"run.dir={self.args.out / 'alone'}"]
        arguments = ["--config", str(self.config), *(f"--{x}" for x in wanted), "--allocation", str(path)]
        arguments += ["--name", path.stem]
        result = self.trained(k, seed) / "evaluation.json"
        return Job(f"seed{seed}-{path.stem}", "launch/retrain.py", arguments, result)

    def trained(self, k: int, seed: int) -> Path:
        return trained_in(self.args.out / "alone", f"subnet{k}", seed, self.own_seed)

    def drawn(self) -> np.ndarray:
        """``[subnets, fields]``: every field's candidate at random."""
        rng = np.random.default_rng(self.args.draw)
        return rng.integers(len(self.candidates), size=(self.args.subnets, len(self.schema.names)))

    def widths(self, k: int) -> dict[str, int]:
        """Of a drawn subnet, by field."""
        return dict(zip(self.schema.names, (self.candidates[j] for j in self.drawn()[k].tolist()), strict=True))

    def lines(self) -> dict[tuple[int, int], dict[str, Any]]:
        """A line for each training alone that is finished, here or in an earlier study, by (subnet, seed)."""
        found = dict(self.trained_before)
        records = recorded(self.args.out / "logs")
        for k, seed in self.trainings() if self.table is None else ():
            directory = self.trained(k, seed)
            if (k, seed) not in found and (directory / "evaluation.json").exists():
                record = records.get(f"seed{seed}-subnet{k}", {})
                line = {"subnet": k, "seed": seed, "widths": alone.told(self.widths(k))}
                line |= {
                    "hardware": machine_of(record, "1 thread"),
                    "commit": record.get("commit", ""),
                    "command": self.shown(record.get("command", "")),
                }
                found[k, seed] = line | alone.line_of(directory)
        return found

    def shown(self, command: str) -> str:
        """A command without the folders of this machine."""
        return command.replace(str(self.args.out), "OUT").replace(str(self.args.data), "PREPARED")

    def write_subnets(self) -> None:
        """OUT/subnets.csv, by seed; nothing where no training alone is finished."""
        lines = sorted(self.lines().items(), key=lambda item: (item[0][1], item[0][0]))
        if lines:
            write_csv(self.args.out / alone.FILE, alone.COLUMNS, [line for _, line in lines])

    def truth(self) -> Truth:
        """What is known of the subnets when all of them were trained; of those that keep ``--keeping``.

        Raises:
            UserError: fewer than two keep them.
        """
        every = self.every_truth()
        widths = np.array(self.candidates)[every.choices]
        kept = (widths[:, [self.schema.names.index(name) for name in self.keeping]] > 0).all(1)
        if kept.sum() < 2:
            raise UserError(f"--keeping {self.args.keeping}: {kept.sum()} of {len(kept)} subnets keep them all")
        return Truth(every.choices[kept], every.validation[:, kept], every.test[:, kept])

    def every_truth(self) -> Truth:
        if self.table is not None:
            return of_table(self.table, self.schema)
        lines, seeds, subnets = self.lines(), range(self.args.truths), range(self.args.subnets)
        figures = (np.array([[float(lines[k, s][x]) for k in subnets] for s in seeds]) for x in alone.FIGURES)
        return Truth(self.drawn(), *figures)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of an earlier consistency.csv.

    Raises:
        UserError: it is missing or lacks a column.
    """
    if not path.exists():
        raise UserError(f"--earlier {path}: no such file. Give the consistency.csv that a study left")
    rows: list[dict[str, Any]] = list(read_csv(path))
    for column in (*COLUMNS, *FACTS):
        if any(row.get(column) is None for row in rows):
            raise UserError(f"--earlier {path}: column {column} is missing. Give the consistency.csv that a study left")
    return rows


def training_only(setting: Sequence[str]) -> list[str]:
    return [x for x in setting if not x.startswith(SCORING)]


def measured(truth: Truth, scores: Sequence[float]) -> dict[str, Any]:
    """Taus of one supernet's scores, and what the truth allows."""
    test = truth.test.mean(0)
    figures = {
        "tau_test": tau(scores, test),
        "tau_validation": tau(scores, truth.validation.mean(0)),
        "ceiling": truth.ceiling(),
        "noise": truth.noise(),
        "regret": float(test.max() - test[int(np.argmax(scores))]),
    }
    return {"subnets": len(test), **{key: round(value, 4) for key, value in figures.items()}}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each setting: means over its supernets."""
    first = rows[0]
    ceiling, noise = float(first["ceiling"]), float(first["noise"])
    lines = [
        f"{first['subnets']} subnets. One training alone ranks them with tau {ceiling:.3f} by its validation "
        f"AUC against the mean test AUC of the other seeds (the ceiling), with {noise:.3f} by its test AUC. "
        "Regret: the test AUC that the best subnet has more than the one with the best score.\n",
        "| setting | tau, test AUC | of the ceiling | tau, validation AUC | regret |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(r["setting"] for r in rows):
        mine = {key: spread([float(r[key]) for r in rows if r["setting"] == name]) for key in SCORED}
        cells = {key: with_deviation(mine[key], ".3f") for key in ("tau_test", "tau_validation")}
        share = f"{mine['tau_test'][0] / ceiling:.2f}"
        regret = f"{mine['regret'][0]:.4f}"
        lines.append(f"| {name} | {cells['tau_test']} | {share} | {cells['tau_validation']} | {regret} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
