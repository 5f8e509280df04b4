"""Found widths that begin with the widest model: its tables are cut down to them, and training goes on.

A narrow model that begins with fresh weights has to find in its few columns what a wide one finds easily; a wide one
that is cut down has found it already. How columns are turned before they are cut is told by
:mod:`embsearch_dist.train.warm.widths`. (To cut a trained network down and train it further is what pruning usually
does, e.g. Han et al. 2015, "Learning both Weights and Connections".)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from embsearch_dist.allocation import REFERENCE_WIDTH, Allocation
from embsearch_dist.config.backbones import ADDITIVE
from embsearch_dist.config.sections import Config
from embsearch_dist.methods.widest import FOLDER
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema, differs
from embsearch_dist.stores.mirror import below
from embsearch_dist.stores.mirroring import mirroring
from embsearch_dist.train.directories import read_own_config
from embsearch_dist.train.warm.start import Start

FINETUNED = "-finetuned"  # behind the name of a uniform width that began so
Trainer = Callable[[Run, Allocation, Path, str], Any]


def by_default(config: Config) -> bool:
    """Whether what a search has found begins with the widest model unless the user says otherwise: where the method
    says so (``search.finetune``), and where columns of this model can be turned before they are cut."""
    model = config.model
    alike = model.transform == "field" or (model.transform == "identity" and model.backbone in ADDITIVE)
    return bool(getattr(config.search, "finetune", False)) and alike and model.norm == "none"


def widest_start(run: Run, run_dir: Path, beside: str, train: Trainer) -> Start:
    """The widest model of the search, where it is one of this model, seed and data; else one that is trained for this.

    Args:
        run: of the retraining.
        run_dir: of the search.
        beside: name of the folder in ``run_dir`` of a model that is trained for this.
        train: trains an allocation in a directory, under a name, and leaves what :meth:`Start.open` reads.

    Raises:
        UserError: a file of the search is damaged, or what ``train`` raises.
    """
    context, config, width = run.context, run.config, width_of(run.config)
    with context.together("reading the widest model"):
        own = _own_search(run, run_dir)
    folder = run_dir / (beside if own is None else FOLDER)
    whole = Allocation.uniform(run.schema, width).counted(config.model.extra)
    if own is not None:
        context.first("completing the widest model", partial(leave_facts, folder, own, run.schema, whole))
    else:
        here = Run(copy.deepcopy(config), run.schema, context)
        here.config.run.dir = str(folder)
        here.config.run.mirror = below(config.run.mirror, run_dir, folder)
        if context.rank == 0:
            print(f"{folder} is trained first: width {width} everywhere, which then is cut down", flush=True)
        with mirroring(here.config, context):
            train(here, whole, folder, folder.name)
    with context.together("reading the widest model"):
        return Start.open(folder)


def width_of(config: Config) -> int:
    """Of the widest model: that of the search, or its widest candidate, or :data:`REFERENCE_WIDTH`."""
    search = config.search
    candidates = getattr(search, "candidates", None) or [REFERENCE_WIDTH]
    return int(getattr(search, "width", 0) or max(candidates))


def leave_facts(folder: Path, config: Config, schema: Schema, allocation: Allocation) -> None:
    """Write beside the search's widest model what makes it one that others can begin with."""
    config.save(folder)
    schema.save(folder)
    allocation.save(folder / "allocation.json")


def _own_search(run: Run, run_dir: Path) -> Config | None:
    """The config of the search in ``run_dir``, where it has trained a widest model of the seed, model and data of
    ``run``; else None."""
    if not (run_dir / FOLDER / "training.json").exists() or not (run_dir / "config.yaml").exists():
        return None
    old = read_own_config(run_dir, run.config)
    same = old is not None and _alike(old, run.config) and not _other_data(run_dir, run.schema)
    return old if same else None


def _alike(old: Config, new: Config) -> bool:
    """Whether two configs have one seed, one model and one widest width."""
    return (old.run.seed, width_of(old), _model(old)) == (new.run.seed, width_of(new), _model(new))


def _model(config: Config) -> dict[str, Any]:
    return {k: v for k, v in config.model.settings().items() if k not in ("allocation", "architecture")}


def _other_data(run_dir: Path, schema: Schema) -> bool:
    before = Schema.load(run_dir)
    return before.fingerprint != schema.fingerprint or differs(before.data, schema.data)
