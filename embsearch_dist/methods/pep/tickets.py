"""The masks of PEP trained again from the initial tables, as the paper does it (its section on retraining)."""

from __future__ import annotations

from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import SAFETY_KEYS
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.methods.allocating import budgets_of
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.pep.margins import bins_of, edge_of
from embsearch_dist.methods.pep.thresholds import ThresholdStage, ThresholdTask
from embsearch_dist.methods.stages import Stage, training_inputs
from embsearch_dist.run import Run
from embsearch_dist.sharding.sharded_tables import LocalShard, ShardedTables
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer

Place = tuple[str, int, int]
"""Table, first row and first column of a shard."""


def place_of(shard: LocalShard) -> Place:
    """Where a shard lies."""
    return shard.table.name, shard.row_offset, shard.column_offset


def masks_of(sharded: ShardedTables, s: dict[str, torch.Tensor], width: int, shift: float) -> dict[Place, torch.Tensor]:
    """The entries that stay in this rank's shards of trained tables, ``[rows, columns]`` bool: those that were counted.

    Args:
        s: of each field ``[width]``.
        width: columns behind it (a value's own weight, padding) are no part of the mask: they all stay.
    """
    found = {}
    for shard in sharded.local_shards():
        first = shard.column_offset
        mask = torch.ones_like(shard.tensor, dtype=torch.bool)
        stop = max(0, min(width - first, mask.shape[1]))
        own = s[shard.table.name][first : first + stop].to(mask.device)
        mask[:, :stop] = bins_of(shard.tensor.detach()[:, :stop], own) > edge_of(shift)
        found[place_of(shard)] = mask
    return found


class TicketTask(SubnetTask):
    """The model of the search's width without thresholds, from its initial weights, whose closed entries are 0 from the
    first step to the last.

    Args:
        masks: by place; those of the same sharding.
        told: what the masks are of.
    """

    def __init__(self, run: Run, masks: dict[Place, torch.Tensor], told: dict[str, Any]) -> None:
        super().__init__(run.config, Allocation.uniform(run.schema, run.config.search.width), run.context)
        self.masks = masks
        self.settings |= told
        self._close()

    @torch.no_grad()
    def _close(self) -> None:
        for shard in self.model.sharded.local_shards():
            shard.tensor.mul_(self.masks[place_of(shard)])

    def after_step(self, step: int, monitor: Monitor) -> None:
        self._close()


class TicketStage(Stage):
    """Trains the mask of each budget by the ``train`` section; ``search/ticket-NAME.json`` has its figures.

    The best checkpoint by validation rows is measured on validation and test rows; nothing is chosen by the latter.
    Does nothing unless ``search.tickets`` asks for it, and nothing for a mask that its budget does not hold; a training
    that was begun with other settings is refused by its checkpoints.
    """

    name = "tickets"
    repeatable = True

    def inputs(self, run: Run) -> dict[str, Any]:
        if not run.config.search.tickets:
            return {"search.tickets": False}
        return (
            super().inputs(run)
            | training_inputs(run, "train", run.config.train)
            | {"model": run.config.model.settings()}
        )

    def run(self, run: Run) -> None:
        if not run.config.search.tickets:
            return
        trained = ThresholdStage().trained(run)
        assert isinstance(trained, ThresholdTask)
        s = dict(zip(run.schema.names, trained.mask.per_entry(), strict=True))
        for name, _ in budgets_of(run):
            with run.context.together("reading the mask"):
                told = read_sealed(run.dir / "search" / f"mask-{name}.json")
            if told.get("mask_over_budget"):
                if run.context.rank == 0:
                    print(f"tickets: no mask obeys the budget of {name}, so none is trained", flush=True)
                continue
            masks = masks_of(trained.model.sharded, s, run.config.search.width, float(told["shift"]))
            self._train(run, name, masks, told)

    def _train(self, run: Run, name: str, masks: dict[Place, torch.Tensor], told: dict[str, Any]) -> None:
        torch.manual_seed(run.config.run.seed)
        train, optim, stage = run.config.train, run.config.optim, f"ticket-{name}"
        batches = run.stream("train", train.batch_size, shuffle=True)
        validation, test = (run.stream(x, train.eval_batch_size, shuffle=False) for x in ("validation", "test"))
        own = {f"train.{k}": v for k, v in vars(train).items() if k not in SAFETY_KEYS}
        task = TicketTask(run, masks, {"mask": told["shift"], "entries": told["entries"], **own})
        root = gated.checkpoint_root(run, stage)
        with Monitor(run.dir, stage, run.context.rank) as monitor:
            monitor.say(f"{stage}: {told['entries']:,} of {told['of']:,} entries, from the initial tables")
            trainer = Trainer(task, train, optim, batches, validation, run.context, monitor, root)
            progress = trainer.fit()
            trainer.restore_best()
        task.model.eval()
        body = {k: told[k] for k in ("entries", "of", "served_bytes")} | {"dense_parameters": task.model.dense_count()}
        body |= {"steps": progress.step, "best_step": progress.best_step}
        for split, stream in (("validation", validation), ("test", test)):
            metrics = evaluate(task.predict, stream.epoch(0), run.context)
            body[split] = {k: metrics[k] for k in ("auc", "logloss")}
        file = run.dir / "search" / f"{stage}.json"
        run.context.first("writing the figures of the mask", lambda: write_sealed(file, body))
