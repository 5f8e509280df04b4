"""A search and a retraining from a config to their results, for the entry scripts and for :mod:`embsearch_dist.api`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from embsearch_dist.config.sections import Config
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.results import restore_allocation
from embsearch_dist.methods.retraining import Found, Results, Retraining, Wish, read_wish, taken
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.ranks.context import Context
from embsearch_dist.ranks.shared import open_shared
from embsearch_dist.run import Run, check_classes, open_data
from embsearch_dist.schema import Schema
from embsearch_dist.train.directories import open_run_directory
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
        start = Start.open(wish.start, wish.start_optimizer) if wish.start else None
        name, found = read_wish(wish, config, run_dir, schema)
    run = Run(config, schema, context)
    check_classes(run, splits=("validation", "test"))
    if context.rank == 0:
        print(taken(wish, config, run_dir, name, found), flush=True)
    job = Retraining(wish, run, run_dir, name, suffix, found, start)
    return Retrained(schema, found, METHODS[config.method]().retrain(job))
