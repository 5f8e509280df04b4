"""A fixed panel of subnets that judges a supernet: one of them alone says little of what a search will score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.train.metrics import METRICS, score

TILT = 4.0  # log ratio of the widest and the narrowest candidate's chance, at most, either way
DRAWN = 64  # subnets drawn for each place of the panel
PIECES = 16  # places of the validation split that the rows are taken from


def draw_panel(
    distinct: torch.Tensor, candidates: Sequence[int], cardinalities: Sequence[int], count: int, seed: int
) -> torch.Tensor:
    """Subnets of all sizes, ascending: the narrowest and the widest, and one at random of each layer between.

    Many subnets are drawn, each with its own lean to narrow or wide candidates, sorted by parameters and cut into
    equal layers. A width of 0 is drawn like any other, but is none of the narrowest's.

    Args:
        distinct: ``[F, T]`` bool, the candidates to draw from.
        candidates: widths, ascending.
        cardinalities: rows of each table.
        count: subnets, at least 1; one: the widest.

    Returns:
        ``[count, F]`` candidate indices.
    """
    widths, rows = torch.tensor(candidates), torch.tensor(cardinalities)
    fields, total = distinct.shape
    places = torch.arange(total).expand(fields, total)
    own = distinct & (widths > 0)
    narrowest, widest = places.masked_fill(~own, total).amin(1), places.masked_fill(~own, -1).amax(1)
    if count < 3:
        return torch.stack([narrowest, widest])[-count:]
    generator = torch.Generator().manual_seed(seed * 7919 + 13)
    drawn = (count - 2) * DRAWN
    lean = (torch.rand(drawn, 1, 1, generator=generator) * 2 - 1) * TILT
    order = distinct.cumsum(1) / distinct.sum(1, keepdim=True)  # of the distinct ones, the last is 1
    chances = (lean * order).exp() * distinct
    found = torch.multinomial(chances.view(-1, total), 1, generator=generator).view(drawn, fields)
    size = (widths[found] * rows).sum(1)
    empty = size == 0  # nothing is left of such a subnet
    found[empty], size[empty] = narrowest, (widths[narrowest] * rows).sum()
    layers = found[size.argsort(stable=True)].view(count - 2, DRAWN, fields)
    picked = torch.randint(DRAWN, (count - 2,), generator=generator)
    return torch.stack([narrowest, *layers[torch.arange(count - 2), picked], widest])


class Panel:
    """Judges a supernet by the mean metrics of its subnets on the same validation rows each time."""

    def __init__(self, run: Run, choices: torch.Tensor, rows: int, batch: int) -> None:
        """
        Args:
            choices: ``[K, F]`` of :func:`draw_panel`, the narrowest first and the widest last.
            rows: how many rows at most, over all ranks, from pieces spread evenly over the split. This rank's share
                of them is read once and kept.
            batch: global rows of a look-up.
        """
        self._context, self._choices = run.context, choices.to(run.context.device)
        some = rows < run.schema.rows["validation"]
        size = max(run.context.world_size, min(batch, rows // PIECES)) if some else batch
        stream = run.stream("validation", size, shuffle=False)
        total = stream.batches_per_epoch
        count = min(total, max(1, rows // size)) if some else total
        wanted = {(2 * k + 1) * total // (2 * count) for k in range(count)}
        self._batches = [b for k, b in enumerate(stream.epoch(0)) if k in wanted]

    def judge(self, model: SupernetModel) -> dict[str, float]:
        """Mean ``auc``, ``logloss``, ``accuracy`` over the panel, ``rows``, and AUC and logloss of its ends, the same
        on every rank. ``model`` is in evaluation mode."""
        logits, labels = panel_logits(model, self._choices, self._batches, self._context)
        each = [score(row, labels) for row in logits]
        found = {name: sum(m[name] for m in each) / len(each) for name in METRICS}
        ends = {"narrowest": each[0], "widest": each[-1]}
        return {
            **found,
            "rows": float(len(labels)),
            **{f"{name}_{end}": m[name] for end, m in ends.items() for name in ("auc", "logloss")},
        }


@torch.no_grad()
def panel_logits(
    model: SupernetModel, choices: torch.Tensor, batches: Iterable[Batch], context: Context
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[K, rows]`` of the subnets ``[K, F]`` and labels ``[rows]`` of all ranks, on the CPU of each; one
    look-up for each batch."""
    head = model.bare_head
    keep = torch.ones(choices.shape[1], dtype=torch.bool, device=context.device)
    pieces = []
    for batch in batches:
        own = batch.to(context.device)
        pooled = model.tables(own.sparse)
        logits = [head(own.dense, pooled, choice, keep).float() for choice in choices]
        pieces.append(torch.stack([*logits, own.label], 1))
    values = context.gather(torch.cat(pieces).flatten()).view(-1, len(choices) + 1).T.cpu()
    return values[:-1].contiguous(), values[-1].contiguous()
