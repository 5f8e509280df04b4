"""The widest models of all groups as one model, whose fields are the tables of group 0, then those of group 1, ...

A row goes to the model of its own group, so the loss over all rows is the mean of the groups' losses by their shares of
the rows, and to cut a table of one group changes nothing for the rows of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from embsearch_dist.methods.truncated import Changes, Truncated, TruncatedModel
from embsearch_dist.train.metrics import score

T = TypeVar("T")


class TruncatedGroups(Truncated):
    """Truncated models of groups, all with the same fields F, as one of K * F; field f of group k is ``k * F + f``."""

    def __init__(self, groups: Sequence[TruncatedModel]) -> None:
        self.groups = list(groups)
        self.context = groups[0].context
        self.fields = sum(g.fields for g in groups)
        self.rows, self.own_rows = sum(g.rows for g in groups), sum(g.own_rows for g in groups)

    def parts(self, whole: Sequence[T]) -> list[Sequence[T]]:
        """What is given for all tables, group by group; nothing for each where nothing is given."""
        own = len(whole) // len(self.groups)
        return [whole[k * own : (k + 1) * own] for k in range(len(self.groups))]

    def calibrated(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> torch.Tensor:
        parts = zip(self.groups, self.parts(ranks), self.parts(precisions), strict=True)
        return torch.cat([g.calibrated(own, p) for g, own, p in parts])

    def metrics(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> dict[str, float]:
        parts = zip(self.groups, self.parts(ranks), self.parts(precisions), strict=True)
        logits = self.context.gather(torch.cat([g.logits(own, p) for g, own, p in parts]))
        labels = self.context.gather(torch.cat([g.sample.label for g in self.groups]))
        return score(logits.cpu(), labels.cpu())

    def knowing(self, fields: Sequence[int]) -> torch.Tensor:
        """A row has the tables of its own group only: those of others say nothing against it."""
        count = self.groups[0].fields
        asked = [[f % count for f in fields if f // count == k] for k in range(len(self.groups))]
        return torch.cat([g.knowing(own) for g, own in zip(self.groups, asked, strict=True)])

    def of_one_class(self) -> list[int]:
        """The groups whose measured rows, on all ranks, are of one class; all ranks call it."""
        clicks = torch.stack([g.sample.label.double().sum() for g in self.groups])
        every = zip(self.context.sum(clicks).tolist(), self.groups, strict=True)
        return [k for k, (own, g) in enumerate(every) if own in (0, g.rows)]

    def known_shares(self) -> torch.Tensor:
        """Of the rows of a table's own group."""
        return torch.cat([g.known_shares() for g in self.groups])

    def again(self) -> torch.Tensor:
        """In the rows of a table's own group."""
        return torch.cat([g.again() for g in self.groups])

    def changes(
        self,
        choice: Sequence[int],
        candidates: Sequence[int],
        precisions: Sequence[str] = (),
        tick: Callable[[int], None] = lambda rows: None,
        known: bool = False,
    ) -> Changes:
        """As :meth:`Truncated.changes` says; ``precisions`` are of the candidates, which all groups share."""
        parts = zip(self.groups, self.parts(choice), strict=True)
        found = [g.changes(own, candidates, precisions, tick, known) for g, own in parts]
        return joined(found, [g.rows / self.rows for g in self.groups])


def joined(groups: Sequence[Changes], shares: Sequence[float]) -> Changes:
    """Changes of the tables of all groups, ``[K * F, T]``, in nats a row of all groups together.

    A group's rows are a share of all rows, so what they lose on average counts that much; its standard error does so,
    too.

    Args:
        shares: ``[K]``, of the measured rows.
    """
    weighed = list(zip(groups, shares, strict=True))
    counts = [torch.full((len(g.more),), float(g.rows)) if g.counts is None else g.counts for g in groups]
    return Changes(
        loss=sum(share * g.loss for g, share in weighed),
        rows=sum(g.rows for g in groups),
        more=torch.cat([share * g.more for g, share in weighed]),
        second=torch.cat([share**2 * g.second for g, share in weighed]),
        counts=torch.cat(counts),
    )
