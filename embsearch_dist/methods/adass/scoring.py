"""What all scorers of a frozen supernet share: metrics of many subnets from their logits, over rows of all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass.layout import Layout
from embsearch_dist.methods.adass.passes import compare
from embsearch_dist.methods.adass.terms import slices
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.models.unify import SupernetUnify
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.metrics import METRICS, binned_auc, score, score_many

CANDIDATES_PER_PASS = 256  # that share the terms of a slab, where they are made anew in each pass
CANDIDATES_TOGETHER = 64  # of these whose activations are held at a time


class Scoring(ABC):
    """Inherited-weight metrics of subnets on a fixed sample of validation rows, spread over the ranks.

    Every result is kept: a candidate is never scored twice (``archive``).

    Attributes:
        labels: of the scored rows of all ranks.
        rows_of: how many of them each rank has.
        scored: of them this rank's: the last ones of its sample, whose labels are ``own_labels``.
        known: ``[F, n]`` bool, of this rank's sample: whether a row has a value of the field with an id of its own.
    """

    layout: Layout
    labels: torch.Tensor
    own_labels: torch.Tensor
    known: torch.Tensor
    scored: int
    rows_of: list[int]

    def __init__(self, model: SupernetModel, context: Context) -> None:
        """Put the model into evaluation mode."""
        self.context, head = context, model.bare_head
        assert isinstance(head.unify, SupernetUnify)
        self.unify: SupernetUnify = head.unify
        self.backbone: Any = head.backbone
        self.fields, self.candidates = len(model.tables.names), len(self.unify.mask)
        self.moments: tuple[torch.Tensor, torch.Tensor] | None = None
        self._forget()
        model.eval()

    @abstractmethod
    def part(self, rows: int) -> Scoring:
        """A scorer of the first ``rows`` rows over all ranks, or a few more; itself if it has no more."""

    @abstractmethod
    def logits(self, choices: torch.Tensor) -> torch.Tensor:
        """``choices [K, F]`` candidate indices -> logits of this rank's scored rows ``[K, rows]``."""

    @abstractmethod
    def logits_near(self, base: Sequence[int], choices: torch.Tensor) -> torch.Tensor:
        """:meth:`logits` of subnets ``[K, F]`` that differ from ``base [F]`` in few fields."""

    def _forget(self) -> None:
        self.archive: dict[tuple[int, ...], dict[str, float]] = {}
        self._near_archive: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[str, float]] = {}

    def _share(self, labels: torch.Tensor) -> None:
        """Let every rank know the labels of all scored rows; ``labels [rows]``: of this rank's."""
        self.scored = len(labels)
        self.rows_of = self.context.every(self.scored)
        every = self.context.gather(labels)
        self.labels = every if self.layout.together else every.cpu()

    def _check_classes(self, area: bool) -> None:
        """Raises:
        UserError: AUC is wanted of a sample of one class.
        """
        if area and self.labels.sum() in (0, len(self.labels)):
            raise UserError(
                f"the validation sample of {len(self.labels)} rows has one class only: AUC is undefined. Raise "
                "search.policy.rows, or set --search.policy.metric logloss"
            )

    def _chosen(self, x: torch.Tensor, choice: torch.Tensor, fields: Sequence[int]) -> torch.Tensor:
        """Unified embeddings ``[n, F', d]`` of the given ``fields`` at their candidates ``choice [F']``.

        Args:
            x: pooled rows ``[F', n, table width]``.
        """
        u = self.unify.mapped(x, choice, fields)
        if self.moments is None:
            u = self.unify.norm(u, choice)
        else:
            u = self.unify.norm.apply_statistics(u, choice, *(m[choice, list(fields)] for m in self.moments))
        return self.unify.filled(u, choice)

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and variance ``[T, F, d]`` over the whole sample, for a norm of each (field, candidate). A pair that was
        drawn rarely has running statistics of an older supernet; those of the sample are exact and use no label."""
        if self.unify.norm.kind != "field":
            return None
        count = self.context.sum(torch.tensor(float(x.shape[1]), device=x.device))
        means, variances = [], []
        for j in range(self.candidates):
            u = self.unify.mapped(x, torch.full((self.fields,), j, device=x.device))
            means.append(self.context.sum(u.sum(1)) / count)
            square = torch.stack([(v - m).square_().sum(0) for v, m in zip(u, means[-1], strict=True)])
            variances.append(self.context.sum(square) / count)
        return torch.stack(means), torch.stack(variances)

    def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
        """Metrics (auc, logloss, accuracy) of subnets ``[K, F]``, on every rank, from the archive if known."""
        keys = [tuple(row) for row in choices.tolist()]
        new = list(dict.fromkeys(k for k in keys if k not in self.archive))
        for part in slices(len(new), CANDIDATES_PER_PASS):
            some = new[part]
            for key, metrics in zip(some, self._measured(self.logits(torch.tensor(some))), strict=True):
                self.archive[key] = {n: metrics[n] for n in (*METRICS, "rows")}
        return [self.archive[k] for k in keys]

    def score_near(self, base: Sequence[int], choices: torch.Tensor) -> list[dict[str, float]]:
        """Metrics of subnets ``[K, F]`` that differ from ``base [F]`` in few fields, and how they compare with it.

        Returns:
            As :meth:`score`, with ``gain`` (the mean over the scored rows of the base's loss less the subnet's, in
            nats) and ``gain_se`` (the standard error of this mean of paired differences).
        """
        own = tuple(int(j) for j in base)
        keys = [tuple(row) for row in choices.tolist()]
        known = self._near_archive
        new = sorted(
            {k for k in keys if (own, k) not in known},
            # Subnets that change the same fields share their terms.
            key=lambda k: [(f, j) for f, (j, b) in enumerate(zip(k, own, strict=True)) if j != b],
        )
        reference = self.context.gather(self.logits_near(own, torch.tensor([own]))[0]) if new else None
        for key_part in slices(len(new), CANDIDATES_TOGETHER):
            some = new[key_part]
            found = self._measured(self.logits_near(own, torch.tensor(some)), reference)
            for key, metrics in zip(some, found, strict=True):
                known[own, key] = metrics
                self.archive.setdefault(key, {n: metrics[n] for n in (*METRICS, "rows")})
        found = [known[own, k] for k in keys]
        if len(known) > 4 * len(keys) + 20_000:
            known.clear()
        return found

    def _measured(self, local: torch.Tensor, reference: torch.Tensor | None = None) -> list[dict[str, float]]:
        """Metrics of the candidates of a pass from this rank's logits ``[K, rows]``, on every rank. One copy comes
        back from the device.

        Args:
            reference: logits ``[all rows]`` that the losses are compared with.
        """
        world, rank = self.context.world_size, self.context.rank
        shares = [len(range(r, len(local), world)) for r in range(world)]
        own = self._exchange(local, shares)
        names = METRICS if reference is None else (*METRICS, "gain", "gain_se")
        table = torch.zeros(len(local), len(names), dtype=torch.float64, device=self.context.device)
        share = table.split(shares)[rank]
        share[:, : len(METRICS)].copy_(self._measure(own))
        if reference is not None:
            share[:, len(METRICS) :].copy_(compare(own, reference, self.labels))
        rows = float(len(self.labels))
        return [{**dict(zip(names, values, strict=True)), "rows": rows} for values in self.context.sum(table).tolist()]

    def _exchange(self, local: torch.Tensor, shares: list[int]) -> torch.Tensor:
        """Logits of this rank's rows and all candidates ``[K, rows]`` -> of all rows and this rank's candidates.

        Rank r works out the metrics of the ``shares[r]`` candidates behind those of the ranks before it. So each
        logit travels once; summing counts per bin over the ranks would move :data:`BINS` numbers of each class for
        each candidate, which is more until the sample has hundreds of thousands of rows.
        """
        world, rank = self.context.world_size, self.context.rank
        if world == 1:
            return local
        sent, received = [k * self.scored for k in shares], [shares[rank] * n for n in self.rows_of]
        out = local.new_empty(sum(received))
        dist.all_to_all_single(out, local.flatten(), received, sent)
        parts = zip(out.split(received), self.rows_of, strict=True)
        return torch.cat([x.view(shares[rank], n) for x, n in parts], 1)

    def _measure(self, logits: torch.Tensor) -> torch.Tensor:
        """:data:`METRICS` of the candidates ``[K, all rows]`` -> ``[K, 3]`` float64."""
        if self.layout.together:
            return score_many(logits, self.labels)
        found = [score(row, self.labels, binned_auc) for row in logits]
        return torch.tensor([[m[n] for n in METRICS] for m in found], dtype=torch.float64).view(-1, len(METRICS))
