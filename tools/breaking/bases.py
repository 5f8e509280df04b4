"""Tiny runs of every method in a folder of their own, made once: prepared data, and a run in each state.

All commands are given with relative paths inside one folder, so that a copy of it is the same run elsewhere.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from embsearch_dist import methods
from embsearch_dist.methods.trial import merged
from tools.breaking import lab

ROWS = 1200
RUN: dict[str, Any] = {
    "data": {"path": "data"},
    "run": {"device": "cpu", "threads": 1},
    "dist": {"timeout_s": 30},
}
SEARCH = ("search.py", "--config", "method.yaml", "--run.dir", "run")
RETRAIN = ("retrain.py", "--run", "run")
REPORT = ("report.py", "run")
# After these steps of a training it is killed, to have one that is half done.
KILL_STEP = {"searching": 5, "retraining": 8}
METHODS = tuple(methods.METHODS)
NO_RETRAIN = tuple(n for n, m in methods.METHODS.items() if not m.result)  # the searched model is the result


@dataclass(frozen=True)
class State:
    """A point in the life of a run: how it is reached, and the commands that may come next."""

    name: str
    commands: tuple[tuple[str, ...], ...]


def evaluate_words(method: str) -> tuple[str, ...]:
    return ("evaluate.py", "--run", f"run/retrain/{retrained_name(method)}")


def retrained_name(method: str) -> str:
    return {"ues": "ues-4", "truncation": "fdo"}.get(method, method)


def small(method: str) -> str:
    """Name of the allocation under the smaller budget."""
    return f"{retrained_name(method)}-60pct"


def states(method: str) -> list[State]:
    """``fresh`` has prepared data only, ``searching`` and ``retraining`` were killed halfway."""
    retrain = () if method in NO_RETRAIN else (RETRAIN,)
    more: list[tuple[str, ...]] = []
    if "pareto" in methods.METHODS[method].trial.get("search", {}):
        more = [
            (*SEARCH, "--search.budget", "50%"),
            (*RETRAIN, "--allocation", f"run/allocations/{small(method)}.json"),
        ]
    found = [State("fresh", (SEARCH,)), State("searched", (SEARCH, *retrain, REPORT, *more))]
    if any(not stage.repeatable for stage in methods.METHODS[method]().stages()):  # it trains, so it can be killed
        found.append(State("searching", (SEARCH,)))
    if retrain:
        found.append(State("retraining", (RETRAIN,)))
        found.append(State("retrained", (SEARCH, RETRAIN, evaluate_words(method), REPORT)))
    return found


def write_clicks(folder: Path, seed: int) -> None:
    """``clicks.csv`` with three categorical columns and a number, and its source file."""
    rng = random.Random(seed)
    lines = ["click,left,big,right,x"]
    for k in range(ROWS):
        left, right, x = rng.randrange(12), rng.randrange(7), rng.gauss(0, 1)
        click = int(rng.random() < (0.8 if (left * 7 + right * 3) % 5 < 2 else 0.2))
        lines.append(f"{click},{left},{k * 7 % 400},{right},{x:.4f}")
    (folder / "clicks.csv").write_text("\n".join(lines) + "\n")
    kinds = "left: categorical, big: categorical, right: categorical, x: dense"
    (folder / "clicks.yaml").write_text(f"name: tiny\nfiles: clicks.csv\nlabel: click\nfields: {{{kinds}}}\n")


def prepare_words(seed: int) -> tuple[str, ...]:
    return (
        *("prepare.py", "--format", "table", "--input", "clicks.yaml", "--out", "data", "--min-count", "1"),
        *("--seed", str(seed), "--quiet", "--row-group-rows", "150"),
    )


class Bases:
    """``FOLDER/METHOD-KIND/STATE``: folders to copy and run in. ``KIND`` is ``own``, or ``other`` for a run of another
    seed on data prepared with another seed: what a file may be mixed up with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, method: str, state: str, kind: str = "own") -> Path:
        """Made when first asked for."""
        home = self.folder / f"{method}-{kind}"
        if not (home / "whole").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            self._make(method, home, seed=0 if kind == "own" else 1)
            (home / "whole").touch()
        return home / state

    def _make(self, method: str, home: Path, seed: int) -> None:
        now = home / "now"
        now.mkdir()
        write_clicks(now, 0)
        body = {"method": method, **RUN, **merged(methods.METHODS[method].trial)}
        body["run"] = {**RUN["run"], "seed": seed}
        (now / "method.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
        self._must(now, prepare_words(seed))
        self._keep(now, home / "fresh")
        wanted = {s.name for s in states(method)}
        if "searching" in wanted:
            self._killed(now, SEARCH, KILL_STEP["searching"])
            self._keep(now, home / "searching")
        self._must(now, SEARCH)
        self._keep(now, home / "searched")
        if "retraining" in wanted:
            self._killed(now, RETRAIN, KILL_STEP["retraining"])
            self._keep(now, home / "retraining")
            self._must(now, RETRAIN)
            self._keep(now, home / "retrained")
        shutil.rmtree(now)

    def _keep(self, now: Path, place: Path) -> None:
        shutil.copytree(now, place, symlinks=True, ignore=shutil.ignore_patterns("printed.*", "tb"))

    def _must(self, now: Path, words: tuple[str, ...]) -> None:
        done = lab.run(words[0], words[1:], now, now / "printed")
        if done.code:
            raise SystemExit(f"a base could not be made: {' '.join(words)} in {now}\n{done.text}")

    def _killed(self, now: Path, words: tuple[str, ...], step: int) -> None:
        env = {"EMBSEARCH_FAULTS": f"kill step={step}"}
        code = lab.finish([lab.start(words[0], words[1:], now, now / "printed", env)], 120)[0]
        if code != -9:
            raise SystemExit(f"{' '.join(words)} in {now} was to die at step {step}, it ended with {code}")
