"""The supernet of random prefixes, the scores that evolution asks of it, and both as a method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.allocating import AllocateStage, BudgetOptions, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.columns import cost_of
from embsearch_dist.methods.masked import MaskedStage, MaskedTask
from embsearch_dist.methods.noise import uniform_noise
from embsearch_dist.methods.optembed.evolution import Evolution, EvolutionConfig, Widths
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.methods.widest import Sample, logits_of, sample_of, unified
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.train.metrics import score
from embsearch_dist.train.monitor import Monitor

PIECE_ROWS = 8192


@dataclass
class OptEmbedConfig(BudgetOptions):
    """OptEmbed: a supernet of random prefixes, then evolution over widths."""

    width: int = option(32, "d: the widest a field can be", low=1)
    drop: bool = option(False, "widths may be 0, so that fields can be dropped; as published they are at least 1")
    rows: int = option(20_000, "validation rows that score a candidate", low=1)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)

    @property
    def candidates(self) -> list[int]:
        """All widths that a field may get."""
        return list(range(0 if self.drop else 1, self.width + 1))


class Prefix(nn.Module):
    """Closes the columns of ``[B, F, d]`` behind ``widths [B, F]`` (or ``[F]``); all are open while it is None."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.widths is None else closed(x, self.widths)


def closed(x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """``x [..., d]`` with zeros from column ``widths [...]`` on."""
    return x * (torch.arange(x.shape[-1], device=x.device) < widths[..., None])


class PrefixTask(MaskedTask):
    """Every row and field draws a width in every step: the same for any number of ranks on CPU."""

    mask: Prefix

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        self.mask.widths = self.drawn(batch.size, step)
        try:
            return super().loss(batch, step)
        finally:
            self.mask.widths = None

    def drawn(self, rows: int, step: int) -> torch.Tensor:
        """Widths ``[rows, F]`` of this rank's rows of a step, uniform on the candidates."""
        search, context, fields = self.run.config.search, self.run.context, len(self.run.schema.fields)
        first = context.rank * search.training.batch_size // context.world_size
        even = fields + fields % 2
        uniform = uniform_noise(self.run.config.run.seed, step, first, (rows, even), context.device)[:, :fields]
        least, most = search.candidates[0], search.width
        return (least + (uniform * (most - least + 1)).floor()).clamp(max=most)


class PrefixStage(MaskedStage):
    """Trains the supernet under ``checkpoints/prefixes``; figures shown are those of all columns."""

    name = "prefixes"
    own = ("drop",)

    def task(self, run: Run) -> MaskedTask:
        return PrefixTask(run, Prefix(), self.settings(run))


@torch.no_grad()
def measured(model: SubnetModel, sample: Sample, widths: Widths, context: Context) -> dict[str, float]:
    """AUC and logloss of the supernet's weights with field f cut to ``widths[f]``, over the rows of all ranks.

    What the values of a dropped field weigh by themselves (``model.first_order value``) is dropped with it.
    """
    kept, parts, head = torch.tensor(widths, device=context.device), [], model.bare_head
    for piece in sample.pieces(PIECE_ROWS):
        x = closed(piece.x, kept[:, None].expand(piece.x.shape[:2]))
        values = piece.values * (kept > 0) if piece.values.shape[1] else piece.values
        parts.append(logits_of(head, unified(head, x), piece.dense, values).float())
    logits, labels = context.gather(torch.cat(parts)), context.gather(sample.label)
    return score(logits.cpu(), labels.cpu())


class EvolveStage(AllocateStage):
    """An evolution for each budget."""

    name = "evolution"

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: OptEmbedConfig = run.config.search
        model, fields = PrefixStage().trained(run).model, len(run.schema.fields)
        sample, extra = sample_of(run, model, "validation", search.rows), run.config.model.extra

        def fitness(widths: Widths) -> float:
            found = measured(model, sample, widths, run.context)
            # Rows of one class have no AUC. Ranks gather the same figures; rank 0 decides all the same.
            value = -found["logloss"] if math.isnan(found["auc"]) else found["auc"]
            return float(run.context.share(value))

        def find(budget: Budget | None) -> Chosen:
            cost = cost_of(run.schema, budget.resource if budget else "parameters", extra)
            limit = budget.limit if budget else math.inf
            seed = [run.config.run.seed, budget.limit if budget else 0]
            least = search.candidates[0]
            evolution = Evolution(search.evolution, fields, least, search.width, cost, limit, fitness, seed)
            best = evolution.run()
            told: dict[str, object] = {"candidates_scored": len(evolution.scored)}
            return Chosen(best, told, measured(model, sample, best, run.context))

        return find


class OptEmbed(Method):
    """OptEmbed (Lyu et al. 2022), its search for widths."""

    config = OptEmbedConfig
    planted = {
        "search": {
            "width": 8,
            "rows": 6000,
            "training": {"batch_size": 512, "eval_batch_size": 6000, "epochs": 6, "patience": 0},
            "evolution": {"generations": 6, "mutations": 10, "crossovers": 10, "keep": 5},
        }
    }
    trial = {
        "search": {
            "width": 4,
            "pareto": ["60%"],
            "rows": 300,
            "training": TRAINING,
            "evolution": {"generations": 2, "mutations": 3, "crossovers": 3, "keep": 3},
        }
    }

    def stages(self) -> list[Stage]:
        return [PrefixStage(), EvolveStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)
