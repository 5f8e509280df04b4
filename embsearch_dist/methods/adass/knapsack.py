"""Choose widths from a supernet by measured losses and a knapsack, as ``method: utilities`` does from a widest model.

What differs is where losses come from. There one trained model is cut down; here a subnet inherits its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from embsearch_dist.methods.adass.config import AdassConfig
from embsearch_dist.methods.adass.scored_rows import on_training_rows, training_rows
from embsearch_dist.methods.adass.scoring import CANDIDATES_TOGETHER, Scoring
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.methods.truncated import Changes, ChangeSums, Truncated, calibration, losses_of
from embsearch_dist.methods.utilities.config import MeasuredSearch
from embsearch_dist.methods.utilities.search_stage import Searcher, by_losses
from embsearch_dist.methods.widest import Repeats
from embsearch_dist.run import Run


class InheritedLosses(Truncated):
    """Losses of subnets on a scorer's rows. ``ranks`` are widths, all of them candidates of the supernet."""

    def __init__(
        self, scorer: Scoring, candidates: Sequence[int], allowed: torch.Tensor, again: torch.Tensor | None = None
    ) -> None:
        """
        Args:
            allowed: ``[F, T]`` bool. A candidate that is not has the losses of the next allowed one below.
            again: ``[F]``, see :meth:`Truncated.again`; None: not counted.
        """
        self.scorer, self.candidates, self.context = scorer, list(candidates), scorer.context
        self.fields, self.own_rows, self.rows = scorer.fields, scorer.scored, len(scorer.labels)
        self.labels, self.known = scorer.own_labels[-scorer.scored :], scorer.known[:, -scorer.scored :]
        self.alike = cheapest_alike(allowed)
        self.counted = torch.full((self.fields,), torch.nan, dtype=torch.float64) if again is None else again

    def subnet(self, ranks: Sequence[int]) -> list[int]:
        """Widths ``[F]`` -> the candidates that stand for them."""
        return [self.alike[f][self.candidates.index(width)] for f, width in enumerate(ranks)]

    def calibrated(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> torch.Tensor:
        own = self._logits(self.subnet(ranks))
        scale, shift = calibration(own, self.labels, self.context)
        return losses_of(scale * own + shift, self.labels).double()

    def metrics(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> dict[str, float]:
        return self.scorer.score(torch.tensor([self.subnet(ranks)]))[0]

    def knowing(self, fields: Sequence[int]) -> torch.Tensor:
        return self.known[list(fields)].all(0)

    def known_shares(self) -> torch.Tensor:
        return self.context.sum(self.known.sum(1).double()).cpu() / max(self.rows, 1)

    def again(self) -> torch.Tensor:
        return self.counted

    @torch.no_grad()
    def changes(
        self,
        choice: Sequence[int],
        candidates: Sequence[int],
        precisions: Sequence[str] = (),
        tick: Callable[[int], None] = lambda rows: None,
        known: bool = False,
    ) -> Changes:
        """As :meth:`Truncated.changes` says; losses are of ``scale * logit + shift``, which fit ``choice`` best."""
        base = self.subnet([candidates[j] for j in choice])
        own = self._logits(base)
        scale, shift = calibration(own, self.labels, self.context)
        now = losses_of(scale * own + shift, self.labels)
        sums = ChangeSums(self.fields, len(candidates), own.device)
        sums.loss += now.double().sum()
        together = max(1, CANDIDATES_TOGETHER // len(candidates))
        for first in range(0, self.fields, together):
            some = range(first, min(first + together, self.fields))
            changed = torch.tensor(base).repeat(len(some), len(candidates), 1)
            for k, f in enumerate(some):
                changed[k, :, f] = torch.tensor([self.alike[f][self.candidates.index(w)] for w in candidates])
            found = self.scorer.logits_near(base, changed.flatten(0, 1)).unflatten(0, (len(some), -1))
            for f, logits in zip(some, found, strict=True):
                losses = losses_of(scale * logits + shift, self.labels)
                sums.add(f, choice[f], losses, now, self.known[f] if known else None)
            tick(self.own_rows * some.stop // self.fields - self.own_rows * some.start // self.fields)
        return sums.changes(self.rows, self.context)

    def _logits(self, subnet: list[int]) -> torch.Tensor:
        """``[n]`` of this rank's rows, from the sums that the changes around it start from."""
        return self.scorer.logits_near(subnet, torch.tensor([subnet]))[0]


def cheapest_alike(allowed: torch.Tensor) -> list[list[int]]:
    """``[F][T]``: the candidate that stands for each: itself if it is allowed, else the next allowed one below."""
    places = torch.arange(allowed.shape[1]).expand(allowed.shape)
    found: list[list[int]] = places.masked_fill(~allowed, 0).cummax(1).values.tolist()
    return found


def make_measured(run: Run[AdassConfig], task: SupernetTask, scorer: Scoring, allowed: torch.Tensor) -> Searcher:
    """The search by measured losses of ``method: utilities``, of a supernet's subnets."""
    config, batches = run.config.search, training_rows(run, task)
    repeats = Repeats(run.schema.names)
    for _ in repeats.watch(iter(batches)):
        pass
    again = repeats.again(run.schema.rows["train"], run.context)
    trained = InheritedLosses(on_training_rows(run, task, batches), config.candidates, allowed, again)
    measured = InheritedLosses(scorer, config.candidates, allowed)
    return by_losses(run.schema, settings(config), measured, trained, run.config.model.extra)


def settings(config: AdassConfig) -> MeasuredSearch:
    """What the search by measured losses reads, from the keys of AdaS&S."""
    policy = config.policy
    return MeasuredSearch(
        candidates=config.candidates,
        width=max(config.candidates),
        evidence=max(policy.evidence, 0.0),
        judge=policy.judge,
        spend=policy.spend,
    )
