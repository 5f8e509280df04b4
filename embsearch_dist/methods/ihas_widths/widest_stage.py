"""Stage 3: the widest model of each group, trained on its rows with the recipe of every retrained model."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch

from embsearch_dist.methods.ihas.groups_stage import read_open
from embsearch_dist.methods.ihas.retraining import Begin, begins_with, open_group, train_on
from embsearch_dist.methods.ihas_widths.config import IHASWidthsConfig
from embsearch_dist.methods.widest import WidestStage, folder_of, widest_of
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.run import Run
from embsearch_dist.train.retrain import load_best


class GroupWidestStage(WidestStage):
    """Trains the model of uniform width ``search.width`` on each group's rows; leaves them under ``widest/group-K``.

    One group after the other, so that the optimizer states of two are never held at once.
    """

    def inputs(self, run: Run[IHASWidthsConfig]) -> dict[str, Any]:
        groups = {k: v for k, v in dataclasses.asdict(run.config.search.groups).items() if k != "keep"}
        return {**super().inputs(run), "search.groups": groups}

    def run(self, run: Run[IHASWidthsConfig]) -> None:
        runs = group_runs(run)
        begins: Sequence[Begin] = [lambda task: None] * len(runs)
        if run.config.search.groups.inherit and len(runs) > 1:
            every = {name: torch.arange(run.config.search.width) for name in run.schema.names}
            begins = begins_with(run, [every] * len(runs))
        for own, begin in zip(runs, begins, strict=True):
            train_on(own, widest_of(own), begin)
            gc.collect()  # what DDP and TorchRec build refers to itself, and would stay beside the next group


def group_runs(run: Run[IHASWidthsConfig]) -> list[Run[IHASWidthsConfig]]:
    """A run on the rows of each group, whose directory is that of its widest model; on all rows where there is one
    group.

    Raises:
        UserError: the rows are not grouped, or are not those of the search's data.
    """
    count = 0
    with run.context.together("reading the groups"):
        count = len(read_open(run))
    if count > 1:
        return [open_group(run, run.config, k, folder_of(run) / f"group-{k}") for k in range(count)]
    own = dataclasses.replace(run.config.run, dir=str(folder_of(run)))
    return [Run(dataclasses.replace(run.config, run=own), run.schema, run.context)]


def load_widest_of(run: Run[IHASWidthsConfig]) -> SubnetModel:
    """The finished widest model of one of :func:`group_runs` with its best weights, in evaluation mode.

    Raises:
        UserError: it is missing or damaged.
    """
    task = load_best(run.config, widest_of(run), run.context, run.dir)
    task.model.eval()
    return task.model
