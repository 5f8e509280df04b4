"""Rewinding: the weights after some epoch of the search are kept, and the chosen values are trained again from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods.gated.task import checkpoint_root
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.train import manifest
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.warm.dense import DenseMove, Layout
from embsearch_dist.train.warm.fill import Saved, fill_head, fill_tables
from embsearch_dist.train.warm.ids import IdMap
from embsearch_dist.train.warm.widths import FieldMove

NAME = "rewound"


def keep(run: Run, task: SubnetTask) -> None:
    """Save the weights as they are, under ``checkpoints/rewound``; all ranks call it.

    Raises:
        SaveError: they cannot be written.
    """
    model = task.model
    optimizer = model.make_optimizer(run.config.optim)  # a checkpoint has one; nothing reads it
    root, schema, data = checkpoint_root(run, NAME), run.schema.fingerprint, run.schema.data
    kept = Checkpointer(root, model, optimizer, run.context, 1, schema=schema, data=data, settings=task.settings)
    kept.save(0, {})


def rewind(run: Run, root: Path, allocation: Allocation, task: SubnetTask) -> None:
    """Begin a training with the weights that were kept: of each table the rows of its values, of the head what reads
    the fields that are there. Gates and the state of optimizers are not taken along.

    Args:
        run: of the training.
        root: directory of the search.
        allocation: a result of that search.
        task: the training's, of that allocation.

    Raises:
        UserError: nothing was kept there, or it is damaged.
    """
    place, context = root / "checkpoints" / NAME / "step-0", run.context
    context.first("checking the rewound weights", lambda: _check(place))
    with context.together("reading the rewound weights"):
        _fill(Saved(place), run, context, allocation, task)


def _check(place: Path) -> None:
    if not place.exists():
        raise UserError(
            f"{place} is missing: the weights after epoch search.rewind, with which this training begins. Run "
            "search.py again, or give --search.rewind 0 for new weights"
        )
    manifest.verify(place)


def _fill(saved: Saved, run: Run, context: Context, allocation: Allocation, task: SubnetTask) -> None:
    schema, model = run.schema, run.config.model
    width = max(allocation.widths.values())
    size = {f.name: f.cardinality for f in schema.fields}
    ids = {
        n: IdMap(torch.from_numpy(allocation.values[n].ids) if n in allocation.values else torch.arange(size[n]))
        for n in allocation.kept
    }
    # The column of the gates is behind the width, in front of a first-order weight.
    tables = {n: FieldMove(width + 1, width) for n in allocation.kept}
    fill_tables(saved, task.model, tables, ids, model.extra, optimizers=False)
    names, body = (schema.names, allocation.kept), dataclasses.asdict(model)
    layouts = [Layout.of(body, own, [width] * len(own), schema.dense) for own in names]
    same = {n: FieldMove(width, width) for n in allocation.kept}
    move = DenseMove(task.model.bare_head, layouts[0], layouts[1], same, model.transform)
    fill_head(saved, task.model, move, None)
