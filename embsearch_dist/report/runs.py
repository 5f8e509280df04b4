"""Reads run directories: every file is optional, a broken one is an error that names it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embsearch_dist.allocation import Allocation, cost
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, read_sealed
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.base import Method
from embsearch_dist.networks.architecture import FORMAT, KIND, Architecture, read_architecture
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.space import Space
from embsearch_dist.networks.space import load as load_architecture
from embsearch_dist.report.reading import config_text, extra_told, read_lines, there
from embsearch_dist.report.result import (
    AGAIN,
    BY_OTHER_ROUTER,
    NETWORK,
    Result,
    optional,
    read_result,
    split_seed,
    whole,
)
from embsearch_dist.schema import Schema
from embsearch_dist.train.lines import compare_lines
from embsearch_dist.written import knows

# What a run directory may hold, and what is lost without it; the report says so in these words.
FILES = {
    "config.yaml": "the resolved configuration",
    "schema.json": "the fields and their cardinalities, so parameter counts and P-R",
    "allocation.json": "the widths the search chose",
    "metrics.jsonl": "learning and search curves",
    "heatmaps.jsonl": "the sampling and policy probabilities over time",
    "search/pareto.json": "the trade-off between size and quality among the scored subnets",
    "retrain": "retrained models and their test results",
}
SCORED = "evolution.json"  # of a search for networks: all it scored
OPTIONAL = ("truth.json", "stability.json", "evaluation.json", GROUPS, NETWORK, SCORED)


@dataclass
class Group:
    """One group of a search by instances: how many rows of each split it has, its widths, and ``extra`` columns of its
    tables beside them."""

    rows: dict[str, int]
    widths: dict[str, int]
    extra: int = 0


@dataclass
class Network:
    """An architecture and what its search wrote down about it; nothing for one that a person wrote.

    ``logloss`` is that on validation rows with the supernet's weights, ``fitness`` what the search minimised;
    ``flops`` and ``parameters`` are those of the dense part. ``generation`` 0 is the random start.
    """

    architecture: Architecture
    key: str
    numbers: dict[str, float]

    def number(self, name: str) -> float:
        return self.numbers.get(name, math.nan)


@dataclass
class Evolution:
    """All that a search for networks scored, in order.

    Attributes:
        alive: the last so many are the population.
        done: generations scored, the random start counted.
        settings: of the search: its sections evolution and scoring, and the space.
    """

    scored: list[Network]
    alive: int
    done: int
    settings: dict[str, Any]

    def setting(self, name: str, default: Any) -> Any:
        return (self.settings.get("evolution") or {}).get(name, default)

    @property
    def beginning(self) -> str:
        """How the networks of generation 0 came about, in words."""
        return "kept by the prefilter or drawn at random" if self.settings.get("prefilter") else "drawn at random"

    @property
    def over(self) -> bool:
        return self.done > int(self.setting("generations", 0))


@dataclass
class Retrain:
    """One retrain's learning curve, or that of one group's model in it."""

    name: str
    seed: int | None
    metrics: list[dict[str, Any]]


@dataclass
class Run:
    """One run directory, as far as it is there.

    ``rows``: of the tables of fields that keep some of their values alone. ``extra``: columns of its tables beside
    their widths; None where no file tells.
    """

    path: Path
    label: str = ""
    config: str | None = None
    schema: Schema | None = None
    widths: dict[str, int] | None = None
    rows: dict[str, int] = field(default_factory=dict)
    extra: int | None = None
    groups: list[Group] = field(default_factory=list)
    space: Space | None = None
    networks: list[Network] = field(default_factory=list)
    evolution: Evolution | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    heatmaps: list[dict[str, Any]] = field(default_factory=list)
    pareto: dict[str, Any] | None = None
    truth: dict[str, Any] | None = None
    final: dict[str, Any] | None = None
    stability: dict[str, Any] | None = None
    results: list[Result] = field(default_factory=list)
    retrains: list[Retrain] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    skipped_lines: int = 0
    damaged: list[str] = field(default_factory=list)

    def parameters(self, name: str) -> int:
        """Of the found table of a field; asks for ``widths`` and ``schema``."""
        assert self.widths is not None and self.schema is not None
        cardinality = next(f.cardinality for f in self.schema.fields if f.name == name)
        return cost("parameters", self.rows.get(name, cardinality), self.widths[name], self.extra or 0)

    @property
    def method(self) -> type[Method] | None:
        """The method of its config; None where there is no config, or one of another version."""
        named = re.search(r"^method: *([\w-]+)", self.config or "", re.MULTILINE)
        return METHODS.get(named.group(1)) if named else None

    @property
    def without_policy(self) -> bool:
        """Whether there is no policy to show; a directory without a config tells it by the stages that ran."""
        widest = any(str(line.get("stage")).startswith("widest") for line in self.metrics)
        return widest or (self.method is not None and not self.method.policy)

    @property
    def by_instance(self) -> bool:
        """Whether the search chose by rows: then there is no policy, and no subnet was scored."""
        return bool(self.groups) or (self.method is not None and self.method.finds in ("groups", "rows"))

    @property
    def by_network(self) -> bool:
        """Whether the search is one for networks; ``networks`` are the best it left, best first, once it is over."""
        named = self.method is not None and self.method.finds == "network"
        return bool(self.networks) or self.evolution is not None or (named and self.widths is None)


def load_runs(directories: Sequence[Path | str]) -> list[Run]:
    """Read run directories that belong together (seeds of one experiment); the same one twice counts once.

    Raises:
        UserError: no directory, nothing of a run in one of them, or runs on different data sets.
    """
    unique = list({Path(d).resolve(): Path(d) for d in directories}.values())
    if not unique:
        raise UserError("no run directory given; name at least one")
    runs = [load_run(d) for d in unique]
    with_schema = [r for r in runs if r.schema is not None]
    for run in with_schema[1:]:
        first = with_schema[0]
        assert run.schema is not None and first.schema is not None
        if run.schema.fingerprint != first.schema.fingerprint:
            raise UserError(
                f"{first.path} and {run.path} are runs on different data ({first.schema.dataset!r}, "
                f"{run.schema.dataset!r}, or other cardinalities); report them one by one"
            )
    _same_budgets(runs)
    labels = [r.path.resolve().name for r in runs]
    for run, label in zip(runs, labels, strict=True):
        run.label = label if labels.count(label) == 1 else "/".join(run.path.resolve().parts[-2:])
    return runs


def _same_budgets(runs: Sequence[Run]) -> None:
    """
    Raises:
        UserError: searches of one name had different budgets, so a mean over them would be of no size at all.
    """
    first: dict[str, Run] = {}
    for run in (r for r in runs if r.provenance.get("method")):
        name = str(run.provenance.get("name") or run.provenance["method"])
        other = first.setdefault(name, run)
        one, two = (
            " at ".join(str(r.provenance[k]) for k in ("budget", "precision") if r.provenance.get(k)) or "no budget"
            for r in (other, run)
        )
        if one != two:
            raise UserError(
                f"{other.path} and {run.path} both hold {name!r}, found under {one} and under {two}: a mean of them is "
                "of neither. Report them one by one, or search with other names (--search.name)"
            )


def load_run(directory: Path) -> Run:
    """Read one run directory with its retrains."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the run directory that search.py or retrain.py wrote")
    if not any((directory / name).exists() for name in (*FILES, *OPTIONAL)):
        raise UserError(
            f"{directory} is not a run directory: it holds none of {', '.join((*FILES, *OPTIONAL))}. "
            "Give the directory that search.py or retrain.py wrote"
        )
    run = Run(directory, missing=[name for name in FILES if not (directory / name).exists()])
    if there(directory / "config.yaml"):
        run.config = config_text(directory / "config.yaml")
    if there(directory / "schema.json"):
        run.schema = Schema.load(directory)
    _load_allocation(run)
    _load_groups(run)
    if run.extra is None:
        run.extra = extra_told(run.config)
    _load_networks(run)
    run.metrics, bad = read_lines(directory / "metrics.jsonl")
    folders = [directory / "widest", *sorted((directory / "widest").glob("group-*"))]
    for folder in folders:
        lines, bad_lines = read_lines(folder / "metrics.jsonl")
        run.metrics += [{**line, "stage": " ".join(folder.relative_to(directory).parts)} for line in lines]
        bad += bad_lines
    run.heatmaps, bad_maps = read_lines(directory / "heatmaps.jsonl")
    run.skipped_lines = bad + bad_maps
    _compare(run, directory, {p.stem: p for p in sorted((directory / "stages").glob("*.json"))})
    for folder in folders:
        _compare(run, folder, {"retrain": folder / "training.json"})
    never = ["search/pareto.json"] * run.by_instance + ["metrics.jsonl", "heatmaps.jsonl"] * run.without_policy
    if run.by_network:
        never += ["allocation.json", "search/pareto.json", "heatmaps.jsonl"]
    if run.by_instance:
        never.append("allocation.json")  # groups have widths of their own; who weighs rows chooses none
    _note_gone(run, [directory / n for n in (*FILES, *OPTIONAL)])
    run.missing = [name for name in run.missing if name not in never]
    run.pareto = optional(directory / "search" / "pareto.json")
    run.truth = optional(directory / "truth.json")
    run.final = optional(directory / "final.json")
    run.stability = optional(directory / "stability.json")
    _add_result(run, directory)
    if (directory / "retrain").is_dir():
        for sub in sorted(p for p in (directory / "retrain").iterdir() if p.is_dir()):
            _note_gone(run, [sub / n for n in ("evaluation.json", BY_OTHER_ROUTER)])
            result = _add_result(run, sub)
            _add_result(run, sub, BY_OTHER_ROUTER)
            name, seed = (result.name, result.seed) if result else split_seed(sub.name)
            parts = sorted(sub.glob("group-*"), key=lambda p: (len(p.name), p.name))
            for part in (sub, *parts):
                _note_gone(run, [part / "training.json"])
                _compare(run, part, {"retrain": part / "training.json"})
                lines, _ = read_lines(part / "metrics.jsonl")
                if lines:
                    label = name if part is sub else f"{name} {part.name.replace('-', ' ')}"
                    run.retrains.append(Retrain(label, seed, lines))
    return run


def series(
    lines: Sequence[dict[str, Any]], key: str, stage: str | None = None, split: str | None = None
) -> tuple[list[float], list[float]]:
    """Steps and values of one curve, in step order; of two lines for a step the later one counts.

    ``split=None`` takes the training lines: those without a split tag or tagged ``train``.
    """
    wanted = (split,) if split else (None, "train")
    points = {
        float(line["step"]): float(line[key])
        for line in lines
        if line.get(key) is not None
        and (stage is None or line.get("stage") == stage)
        and line.get("split") in wanted
        and isinstance(line.get("step"), int | float)
    }
    steps = sorted(points)
    return steps, [points[s] for s in steps]


def _load_allocation(run: Run) -> None:
    path = run.path / "allocation.json"
    if not there(path):
        return
    if run.schema is not None:
        allocation = Allocation.load(path, run.schema)
        run.widths, run.provenance = allocation.widths, dict(allocation.provenance)
        run.rows, run.extra = {n: allocation.rows(n) for n in allocation.values}, allocation.extra
        return
    body = read_json(path)
    if not isinstance(body.get("widths"), dict):
        raise UserError(f'{path}: not an allocation: key "widths" (field -> width) is missing')
    run.widths = {str(k): int(v) for k, v in body["widths"].items()}
    run.provenance = dict(body.get("provenance", {}))
    run.extra = int(body["extra_columns"]) if "extra_columns" in body else None


def _load_groups(run: Run) -> None:
    path = run.path / GROUPS
    if not there(path):
        return
    if run.schema is not None:
        grouped = GroupedAllocation.load(path, run.schema)
        run.groups = [Group(r, a.widths, a.extra) for r, a in zip(grouped.rows, grouped.allocations, strict=True)]
        run.extra = grouped.allocations[0].extra
        provenance = dict(grouped.provenance)
    else:
        body = read_json(path)
        try:
            run.groups = [Group(whole(g["rows"]), whole(g["widths"])) for g in body["groups"]]
            provenance = dict(body.get("provenance", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{path}: not a grouped allocation ({e!r}). Run search.py again") from e
    run.provenance = run.provenance or provenance


def _load_networks(run: Run) -> None:
    path = run.path / SCORED
    if there(path):
        body = read_sealed(path, AGAIN)
        try:
            scored = [_network(b, {"blocks": b["blocks"], "format": FORMAT, "kind": KIND}, path) for b in body["seen"]]
            run.evolution = Evolution(scored, len(body["population"]), int(body["generation"]), dict(body["signature"]))
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path}: not the state of a search ({e!r}). Run search.py again") from e
    path = run.path / NETWORK
    if there(path):
        _, run.space = load_architecture(path)
        bodies = {path: read_architecture(path)}
        provenance = bodies[path].get("provenance", {})
        run.provenance = run.provenance or {k: provenance[k] for k in ("method", "name", "seed") if k in provenance}
        ranked = sorted((run.path / "architectures").glob("rank-*.json"), key=lambda p: (len(p.name), p.name))
        bodies = {p: read_architecture(p) for p in ranked} or bodies
        run.networks = [_network(b.get("provenance", {}), b, p) for p, b in bodies.items()]
        known = {n.key: n for n in (run.evolution.scored if run.evolution else ())}
        run.networks = [known.get(n.key, n) for n in run.networks]
        if run.widths is not None and set(run.widths.values()) == {run.space.width}:
            run.widths = None  # the tables of a network: nobody searched their widths
    elif run.evolution is not None and "space" in run.evolution.settings:
        run.space = Space.from_json(run.evolution.settings["space"], str(run.path / SCORED))


def _network(numbers: dict[str, Any], body: dict[str, Any], path: Path) -> Network:
    architecture = Architecture.from_json(body, str(path))
    kept = {k: float(v) for k, v in numbers.items() if isinstance(v, int | float)}
    return Network(architecture, str(numbers.get("key") or key(architecture)), kept)


def _add_result(run: Run, directory: Path, file: str = "evaluation.json") -> Result | None:
    result = read_result(directory, file, {n.key: rank for rank, n in enumerate(run.networks, 1)})
    run.results += [result] if result else []
    return result


def _note_gone(run: Run, paths: Sequence[Path]) -> None:
    """Note those that were written there and are no longer there: what they said is missing from the page."""
    run.damaged += [f"{p} is gone: it was written there" for p in paths if not there(p) and knows(p)]


def _compare(run: Run, directory: Path, marks: dict[str, Path]) -> None:
    """Note the curves that are not those that a finished stage or training has left; ``marks``: by stage."""
    for stage, path in marks.items():
        body = optional(path)
        if body is not None and body.get("state", "done") == "done":
            run.damaged += compare_lines(directory, stage, body.get("lines"))
