"""Searches, retrainings and what they have left, for the entry scripts and for :mod:`embsearch_dist.api`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GROUPS
from embsearch_dist.methods import CONFIGS, METHODS
from embsearch_dist.methods.gated.collected import is_gated, search_of
from embsearch_dist.methods.results import kept_network, restore_allocation
from embsearch_dist.methods.retraining import Found, Results, Retraining, read_wish, taken
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.methods.wish import BRACKET, Wish
from embsearch_dist.ranks.context import Context
from embsearch_dist.ranks.shared import open_shared
from embsearch_dist.run import Run, check_classes, open_data
from embsearch_dist.rundir import check_text
from embsearch_dist.schema import Schema, differs
from embsearch_dist.train.directories import open_run_directory
from embsearch_dist.train.evaluation import result_name
from embsearch_dist.train.figures import Other
from embsearch_dist.train.metrics import check_group
from embsearch_dist.train.warm.start import Start


def search(config: Config, context: Context, doing: str = "search.py", given: str | None = None) -> Run:
    """Run all stages of a config's method in its run directory; what is done is skipped.

    Args:
        doing: who holds the directory's lock, for people.
        given: the config file of the command line.

    Raises:
        UserError: a setting, the data or the run directory does not allow it; on all ranks.
    """
    schema = open_data(config, context)
    check_group(schema, config.train.group)
    directory, method, run = Path(config.run.dir), METHODS[config.method](), Run(config, schema, context)
    check_stages(method, run)
    check_classes(run, method.needs_classes(config))
    make = partial(open_run_directory, config, schema, directory, doing, given)
    open_shared(context, directory, "opening the run directory", make)
    if context.rank == 0:
        print(f"run directory {directory}, {context.world_size} rank(s) on {context.device.type}", flush=True)
    run_stages(method, run)
    context.first("restoring the allocation", lambda: restore_allocation(directory))
    return run


@dataclass(frozen=True)
class Retrained:
    """What was trained: its schema, the found result, and the figures of every model by its directory's name."""

    schema: Schema
    found: Found
    results: Results


def retrain(config: Config, context: Context, run_dir: Path, wish: Wish, suffix: str = "") -> Retrained:
    """Train what is wished of a run directory, and measure it on the test split.

    Args:
        suffix: behind the name of every result.

    Raises:
        UserError: nothing was found yet, or what training raises; on all ranks.
    """
    schema = open_data(config, context)
    with context.together("reading the allocation"):
        named = wish.allocation not in ("", BRACKET) or config.model.allocation
        if not METHODS[config.method].result and not named:
            raise UserError(
                f"the search of {config.method} trains its model itself and finds no widths: evaluate or export what "
                f"{run_dir / 'retrain'} holds, or give --allocation ues-32 to train a uniform width beside it"
            )
        start = Start.open(wish.start, wish.start_optimizer) if wish.start else None
        name, found = read_wish(wish, config, run_dir, schema)
    run = Run(config, schema, context)
    check_classes(run, splits=("validation", "test"))
    if context.rank == 0:
        print(taken(wish, config, run_dir, name, found), flush=True)
    job = Retraining(wish, run, run_dir, name, suffix, found, start)
    return Retrained(schema, found, METHODS[config.method]().retrain(job))


def continuing(wish: Wish, plain: dict[str, str], overrides: list[str]) -> tuple[Wish, dict[str, str], list[str]]:
    """A command line with what ``--from`` alone leaves open: run, config and widths of the earlier model.

    Args:
        plain, overrides: of :func:`embsearch_dist.config.read.split_arguments`.

    Raises:
        UserError: the earlier model does not lie in a run, or was changed.
    """
    old = Path(wish.start)
    if old.absolute().parent.name != "retrain":
        raise UserError(f"--from {old}: it does not lie in a run's folder retrain/. Give --run or --config beside it")
    if not (old / "config.yaml").exists():
        raise UserError(f"--from {old} holds no trained model (config.yaml is missing). Give RUN/retrain/NAME")
    run_dir = old.absolute().parents[1] if len(old.parts) < 3 else old.parents[1]
    check_text(old / "config.yaml")
    mirror = load_config(CONFIGS, old / "config.yaml").run.mirror.removesuffix(f"/retrain/{old.name}")
    overrides = [f"run.dir={run_dir}", f"run.mirror={mirror}", *kept_network(old), *overrides]
    allocation = wish.allocation or str(old / "allocation.json")
    return replace(wish, allocation=allocation), plain | {"config": str(old / "config.yaml")}, overrides


def trained_config(directory: Path, option: str, overrides: Sequence[str]) -> Config:
    """The config of a directory under ``RUN/retrain``, whose ``run.dir`` is that directory: something was trained
    there, or the model of a search itself was measured.

    Args:
        option: which named it, for messages.

    Raises:
        UserError: nothing was trained there, or its config was changed.
    """
    result = is_gated(directory) or any((directory / name).exists() for name in ("allocation.json", GROUPS))
    if not result or not (directory / "config.yaml").exists():
        raise UserError(
            f"{option} {directory}: not a directory of retrain.py (allocation.json or config.yaml is missing)"
        )
    check_text(directory / "config.yaml")
    config = load_config(CONFIGS, directory / "config.yaml", [*kept_network(directory), *overrides])
    config.run.dir = str(directory)
    return config


def answers_of(directory: Path, run: Run, split: str) -> Other:
    """Another trained model's answers to the rows of ``run``, for ``evaluate.py --against``.

    Raises:
        UserError: nothing was trained there, or on other data; on all ranks.
    """
    config = trained_config(directory, "--against", [])
    config.data, config.dist = run.config.data, run.config.dist
    own = Run(config, run.schema, run.context)
    with run.context.together("comparing the data"):
        kind = METHODS[config.method]().kind(directory)
        before = Schema.load(search_of(directory) if kind == "gated" else directory)
        if before.fingerprint != run.schema.fingerprint or differs(before.data, run.schema.data):
            raise UserError(f"--against {directory}: it was trained on other data, so the rows cannot be compared")
    found = METHODS[config.method]().predictions(own, directory, split, "")
    return Other(result_name(directory.resolve().name), config.run.seed, found)
