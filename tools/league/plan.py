"""Plans of a league: what a file under tools/league/plans says, how its data are made, and how it is carried out.

A plan is YAML:

    data_set: planted_widths              # what tables call it
    config: configs/synthetic/adass_deepfm.yaml           # the recipe of all runs, and the search section of adass
    prepare:                              # commands, in order; each is skipped where the file that it leaves is there
      - command: launch/prepare.py --format synthetic --out {data}
        leaves: "{data}/schema.json"
    methods: all                          # or a list of names
    settings: {autofield: {search.width: 16}}             # of one method's search
    budgets: [10%, 25%, 50%]
    widths: [3, 8, 16, 32]                # uniform ones
    seeds: 3
    extra: {}                             # of all runs: section.key: value

``{data}`` is where the prepared data lie, ``{out}`` the folder of the plan's runs, ``{raw}`` what ``--raw`` names.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from embsearch_dist.errors import UserError
from tools.studies.comparable import comparable
from tools.studies.compare_budgets import parser
from tools.studies.jobs import ROOT, Job

NEEDED = ("data_set", "config", "budgets", "widths", "seeds")
KEYS = (*NEEDED, "prepare", "methods", "settings", "extra")
ALL = "all"


@dataclass(frozen=True)
class Step:
    """One command that makes the data, and the file that says that it is done; both with ``{...}`` in them."""

    command: str
    leaves: str


@dataclass(frozen=True)
class LeaguePlan:
    """One data set and recipe of a league.

    Attributes:
        data_set: its name in tables, and of its folder.
        config: of the recipe, seen from the root of the repository or from the working directory.
        budgets: as ``search.budget`` takes them.
        widths: uniform ones.
        seeds: how many: 0, 1, ...
        prepare: how the data are made.
        methods: whose searches are compared.
        settings: method -> override -> value, of its search.
        extra: override -> value, of every run.
    """

    data_set: str
    config: str
    budgets: Sequence[str]
    widths: Sequence[int]
    seeds: int
    prepare: Sequence[Step] = ()
    methods: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def preparation(self, out: Path, data: Path, raw: str) -> list[Job]:
        """The commands that make the data, those included whose result is there.

        Args:
            out: folder of the plan.
            data: where the prepared data are to lie.
            raw: folder of the raw data, or empty.

        Raises:
            UserError: a command that is still to be run needs ``--raw``.
        """
        places = {"out": str(out), "data": str(data), "raw": raw}
        jobs = []
        for k, step in enumerate(self.prepare):
            script, *arguments = (word.format(**places) for word in shlex.split(step.command))
            job = Job(f"prepare-{k + 1}", script, arguments, Path(step.leaves.format(**places)))
            if "{raw}" in step.command and not raw and not job.done:
                raise UserError(
                    f"{self.data_set}: its data are made from raw files. Give their folder (--raw), or data that are "
                    "prepared (--data)"
                )
            jobs.append(job)
        return jobs

    def arguments(self, out: Path, data: Path, jobs: int, seeds: int) -> argparse.Namespace:
        """The command line of ``compare_budgets.py`` that the plan stands for; ``seeds`` 0: those of the plan."""
        return parser().parse_args(self.words(out, data, jobs, seeds))

    def words(self, out: Path, data: Path, jobs: int, seeds: int) -> list[str]:
        """The same as words."""
        words = ["--config", self.config_path(), "--data", str(data), "--out", str(out), "--jobs", str(jobs)]
        words += ["--seeds", str(seeds or self.seeds), "--budgets", ",".join(self.budgets)]
        words += ["--methods", ",".join(self.methods), "--widths", ",".join(map(str, self.widths))]
        if self.settings:
            words += ["--settings", *(f"{m}:{','.join(overrides(s))}" for m, s in self.settings.items() if s)]
        return words + (["--extra", *overrides(self.extra)] if self.extra else [])

    def config_path(self) -> str:
        """As it is written where it can be found so, which keeps commands free of a machine's folders."""
        return self.config if Path(self.config).exists() else str(ROOT / self.config)


def read_plan(path: Path) -> LeaguePlan:
    """
    Raises:
        UserError: names the file, the key, and what it should be.
    """
    try:
        body = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f"{path}: cannot be read as YAML: {str(e).splitlines()[0]}") from e
    if not isinstance(body, dict):
        raise UserError(f"{path}: holds no keys. A plan has {', '.join(KEYS)}")
    _check_keys(path, "", body, KEYS, NEEDED)
    steps = body.pop("prepare", [])
    for k, step in enumerate(steps):
        _check_keys(path, f"prepare, command {k + 1}: ", step, ("command", "leaves"), ("command", "leaves"))
    methods = body.pop("methods", ALL)
    names = comparable() if methods == ALL else list(methods)
    for name in names:
        if name not in comparable():
            raise UserError(f"{path}: methods: {name} is none of {', '.join(comparable())}; {ALL} means all")
    for name in body.get("settings", {}):
        if name not in names:
            raise UserError(f"{path}: settings: {name} is not among the methods {', '.join(names)}")
    plan = LeaguePlan(prepare=[Step(**step) for step in steps], methods=names, **body)
    if not isinstance(plan.seeds, int) or plan.seeds < 1:
        raise UserError(f"{path}: seeds: must be a number from 1 on, got {plan.seeds!r}")
    if not Path(plan.config_path()).exists():
        raise UserError(f"{path}: config: no file {plan.config}, neither here nor in {ROOT}")
    return plan


def _check_keys(path: Path, where: str, body: Mapping[str, Any], may: Sequence[str], must: Sequence[str]) -> None:
    unknown = [key for key in body if key not in may]
    if unknown:
        raise UserError(f"{path}: {where}unknown key {unknown[0]}; there are {', '.join(may)}")
    missing = [key for key in must if key not in body]
    if missing:
        raise UserError(f"{path}: {where}key {missing[0]} is missing")


def overrides(values: Mapping[str, Any]) -> list[str]:
    """``{"search.width": 16}`` -> ``["search.width=16"]``, values as a command line takes them."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def ready(data: Path) -> bool:
    """Whether data are prepared there; they appear whole or not at all."""
    return (data / "schema.json").exists()
