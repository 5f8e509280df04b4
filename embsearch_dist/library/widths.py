"""Widths under a hard budget by a score of the user's own: his supernet's, or of models that he trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.options import check_section
from embsearch_dist.errors import UserError, nearest
from embsearch_dist.library.own_tables import OwnTables, Tables
from embsearch_dist.library.supernet import Supernet
from embsearch_dist.methods.adass.config import AdassConfig, PolicyConfig
from embsearch_dist.methods.adass.search_stage import Searcher
from embsearch_dist.methods.budget import Budget, cost_table, parse_budget
from embsearch_dist.train.metrics import auc

Score = Callable[[dict[str, int]], float | torch.Tensor]
KEPT = 1 << 26  # losses of rows that are kept, so that a subnet is not asked for again


def search_widths(
    score: Score,
    tables: Supernet | Tables,
    *,
    budget: str = "",
    candidates: Sequence[int] = (0, 4, 8, 16),
    labels: torch.Tensor | None = None,
    seed: int = 0,
    policy: Mapping[str, Any] | None = None,
    name: str = "found",
) -> Allocation:
    """The best widths of one's own tables under a budget, as far as ``score`` tells.

    By default sweeps over single changes of width from the best uniform one, a knapsack over their gains, and a local
    search; with ``policy={"finder": "policy"}`` the policy of AdaS&S. Nothing is asked for twice.

    >>> tables = [EmbeddingBagConfig(name=name, embedding_dim=8, num_embeddings=10) for name in ("user", "item")]
    >>> found = search_widths(lambda widths: 3 * widths["user"] + widths["item"], tables, budget="60%")
    >>> found.widths
    {'user': 8, 'item': 0}
    >>> [config.embedding_dim for config in found.embedding_bag_configs()]
    [8]

    Args:
        score: table -> width, to a number, higher is better; or, where ``labels`` are given, to the logits ``[N]`` of
            held-out rows. The same widths must give the same answer.
        tables: the supernet, or configs or a collection whose widths are the widest there will be.
        budget: ``25%`` of the whole tables' parameters, ``200000`` parameters, ``1.5MB``, or ``ues-8``: what that width
            takes; empty: none.
        candidates: where no supernet is given, see :class:`Supernet`.
        labels: ``[N]``, 0 or 1. With them AUC is what is maximised, and a table is narrowed at last unless its rows'
            loss rises by more than ``evidence`` standard errors.
        seed: of the search.
        policy: keys of ``search.policy`` (finder, moves, metric, evidence, steps, lambda_r, ...).
        name: of the allocation.

    Returns:
        At most of the budget's size; ``embedding_bag_configs()`` keeps the names of tables and features.

    Raises:
        UserError: a budget that nothing can meet, an unknown key, labels that are not 0 and 1 or of one class, or a
            score that is not what was asked for.
    """
    own = tables.own if isinstance(tables, Supernet) else OwnTables.of(tables, candidates)
    config = AdassConfig(candidates=own.candidates, policy=_policy(policy or {}, labels is not None))
    limit = _budget(budget, own)
    _check_labels(labels, config.policy.metric)
    asked = Asked(score, own, labels)
    searcher = Searcher(own.schema, config, asked, own.allowed)  # type: ignore[arg-type]  # it answers alike
    found = searcher.find(seed, limit)
    told: dict[str, object] = {"method": "search_widths", "name": name, "seed": seed, "scored": len(asked.archive)}
    told |= {"budget": budget} if budget else {}
    told |= {k: found.metrics[k] for k in ("score", "auc", "logloss") if k in found.metrics and k in asked.told}
    return own.allocation([own.candidates[j] for j in found.choice], told)


def _check_labels(labels: torch.Tensor | None, metric: str) -> None:
    """See that rows can be judged by their labels.

    Raises:
        UserError: they are no 0 and 1, or of one class where AUC is to tell subnets apart.
    """
    if labels is None:
        return
    if labels.dim() != 1 or not len(labels):
        raise UserError(f"labels must be a row of 0 and 1, one per logit, got the shape {list(labels.shape)}")
    wrong = (labels != 0) & (labels != 1)
    if bool(wrong.any()):
        raise UserError(f"labels must be 0 or 1, got {labels[wrong][0].item()} in row {int(wrong.nonzero()[0])}")
    if metric == "auc" and len(labels.unique()) == 1:
        raise UserError(
            f"labels: all {len(labels):,} are {labels[0].item():g}, so there is no AUC. Give more rows, or "
            "policy={'metric': 'logloss'}"
        )


class Asked:
    """Answers of a user's score as a search reads them; stands where a supernet's scorer does.

    Attributes:
        archive: choice of candidates -> metrics.
        told: the metrics that mean something.
    """

    def __init__(self, score: Score, own: OwnTables, labels: torch.Tensor | None) -> None:
        self._score, self._own = score, own
        self.labels = None if labels is None else labels.detach().cpu().float()
        self.told = ("score",) if labels is None else ("auc", "logloss")
        self.archive: dict[tuple[int, ...], dict[str, float]] = {}
        self._losses: dict[tuple[int, ...], torch.Tensor] = {}

    def part(self, rows: int) -> Asked:
        """All of it: what the score looks at is the user's."""
        return self

    def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
        """Metrics of ``choices [K, F]``."""
        return [self._metrics(tuple(choice)) for choice in choices.tolist()]

    def score_near(self, base: Sequence[int], choices: torch.Tensor) -> list[dict[str, float]]:
        """The same; with labels also ``gain`` and ``gain_se``: the mean over the rows of the base's loss less the
        subnet's, and the standard error of that mean."""
        if self.labels is None:
            return self.score(choices)
        found, start = [], self._row_losses(tuple(int(j) for j in base))
        for choice, metrics in zip(choices.tolist(), self.score(choices), strict=True):
            gains = start - self._row_losses(tuple(choice))
            error = float(gains.std(unbiased=False)) / math.sqrt(len(gains))
            found.append({**metrics, "gain": float(gains.mean()), "gain_se": error})
        return found

    def _metrics(self, choice: tuple[int, ...]) -> dict[str, float]:
        if choice not in self.archive:
            widths = dict(zip(self._own.names, (self._own.candidates[j] for j in choice), strict=True))
            if self.labels is None:
                self.archive[choice] = _alike(self._number(widths))
            else:
                self._ask_logits(choice, widths, self.labels)
        return self.archive[choice]

    def _number(self, widths: dict[str, int]) -> float:
        if not any(widths.values()):  # no model, so nobody is asked for it: not better than the worst one yet
            return min((m["score"] for m in self.archive.values()), default=0.0)
        value = self._score(widths)
        number = float(value) if not isinstance(value, torch.Tensor) or value.numel() == 1 else math.nan
        if not math.isfinite(number):
            what = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise UserError(f"score({widths}) must be a finite number (or logits, with labels=...), got {what}")
        return number

    def _ask_logits(self, choice: tuple[int, ...], widths: dict[str, int], labels: torch.Tensor) -> None:
        if any(widths.values()):
            logits = torch.as_tensor(self._score(widths)).detach().cpu().float()
        else:
            logits = torch.logit(labels.mean(), 1e-6).expand(len(labels))
        if logits.shape != labels.shape or not bool(torch.isfinite(logits).all()):
            raise UserError(
                f"score({widths}) must be the finite logits of {len(labels):,} rows with labels, got the shape "
                f"{list(logits.shape)}"
            )
        losses = binary_cross_entropy_with_logits(logits, labels, reduction="none")
        area = auc(logits.numpy(), labels.numpy())
        accuracy = float(((logits > 0) == (labels > 0.5)).float().mean())
        self.archive[choice] = {"auc": area, "logloss": float(losses.double().mean()), "accuracy": accuracy}
        self._losses[choice] = losses
        while len(self._losses) > 2 and len(self._losses) * len(labels) > KEPT:
            del self._losses[next(iter(self._losses))]

    def _row_losses(self, choice: tuple[int, ...]) -> torch.Tensor:
        self._metrics(choice)
        if choice not in self._losses:  # it was pushed out
            del self.archive[choice]
            self._metrics(choice)
        return self._losses[choice].double()


def _alike(value: float) -> dict[str, float]:
    """One number under every name that a search may look at."""
    return {"score": value, "auc": value, "logloss": -value, "accuracy": value}


def _policy(given: Mapping[str, Any], rows: bool) -> PolicyConfig:
    known = list(vars(PolicyConfig()))
    for key in given:
        if key not in known:
            raise UserError(f"policy: there is no key {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    if not rows and given.get("evidence", -1) >= 0:
        raise UserError("policy: evidence compares losses of rows: let score give logits, and give labels=...")
    # The budget is hard, so nothing else leans towards small tables; an answer may be dear, so few are asked for.
    start = {"finder": "sweeps", "moves": 64, "lambda_r": 0.0, "resource": "parameters"}
    config = PolicyConfig(**{**start, **({} if rows else {"evidence": -1.0}), **given})
    check_section(config, "search.policy")
    return config


def _budget(text: str, own: OwnTables) -> Budget | None:
    """What is written; percents are of the user's whole tables.

    Raises:
        UserError: it is no budget, or the narrowest tables need more.
    """
    if not text:
        return None
    whole = sum(c.num_embeddings * c.embedding_dim for c in own.configs)
    parsed = parse_budget(text, own.schema, "budget")
    if text.strip().endswith("%"):
        parsed = Budget("parameters", int(float(text.strip()[:-1]) / 100 * whole), text)
    costs = cost_table(own.schema, own.candidates, parsed.resource).masked_fill(~own.allowed, math.inf)
    each = costs.min(1).values
    least = int(each.sum())
    if not each.any():  # at least one table is kept
        least = int(costs.masked_fill(costs == 0, math.inf).min())
    if least > parsed.limit:
        raise UserError(
            f"budget {text!r} is {parsed.limit:,} {parsed.resource}, the narrowest tables need {least:,}. Raise it to "
            "at least that, or give candidates a narrower first width (0 drops tables)"
        )
    return parsed
