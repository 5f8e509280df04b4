"""Found widths against uniform ones: which to train beside them, and which of two trained models to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.methods.found import budget_of
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.metrics import auc
from embsearch_dist.train.retrain import SubnetTask


def uniform_like(found: Allocation, width: int) -> Allocation:
    """Uniform widths for the same data, counted alike."""
    return Allocation.uniform(found.schema, width).counted(found.extra)


def bracket(found: Allocation) -> list[int]:
    """The uniform widths whose size is just not above and just not below that of ``found``; one where it is theirs.

    Sizes are of what its budget counts. As bytes of served tables several widths cost the same: the widest of them.
    """
    resource = budget_of(found).resource
    size = found.total(resource)
    below = _widest(found, resource, size)
    if below and uniform_like(found, below).total(resource) == size:
        return [below]
    above = _widest(found, resource, uniform_like(found, below + 1).total(resource))
    return [w for w in (below, above) if w > 0]


def widest_within(found: Allocation) -> int:
    """The largest uniform width inside the budget that ``found`` was searched under; inside its own size where it names
    none. 0: none fits."""
    budget = budget_of(found)
    return _widest(found, budget.resource, budget.limit)


def _widest(found: Allocation, resource: str, limit: int) -> int:
    """The widest uniform width that costs at most ``limit``; 0: none does."""
    fits, beyond = 0, 1
    while uniform_like(found, beyond).total(resource) <= limit:
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if uniform_like(found, middle).total(resource) <= limit else (fits, middle)
    return fits


@torch.no_grad()
def predictions(task: SubnetTask, stream: BatchStream, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels ``[N]`` of a whole split, on every rank; for one number of ranks always in one order."""
    task.model.eval()
    logits, labels = [], []
    for batch in stream.epoch(0):
        here = batch.to(context.device)
        logits.append(task.predict(here).float())
        labels.append(here.label)
    whole = [context.gather(torch.cat(part)).cpu().numpy() for part in (logits, labels)]
    return whole[0], whole[1]


def paired_logloss(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """By how much the logits ``a [N]`` have less logloss than ``b``, in nats, and its standard error, paired by row."""
    target = torch.from_numpy(labels).double()
    one, other = (
        binary_cross_entropy_with_logits(torch.from_numpy(x).double(), target, reduction="none") for x in (a, b)
    )
    gain = (other - one).numpy()
    return float(gain.mean()), float(gain.std(ddof=1) / len(gain) ** 0.5)


def paired_auc(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """AUC of logits ``a [N]`` minus that of ``b``, and its standard error on the same rows (DeLong et al. 1988)."""
    clicked = labels > 0.5
    placed = [_placements(x, clicked) for x in (a, b)]
    of_clicked, of_others = (placed[0][k] - placed[1][k] for k in range(2))
    variance = sum(float(d.var(ddof=1)) / len(d) for d in (of_clicked, of_others) if len(d) > 1)
    return auc(a, labels) - auc(b, labels), variance**0.5


def _placements(scores: np.ndarray, clicked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each clicked row the share of others below it; of each other row the share of clicked ones above it."""
    from scipy.stats import rankdata  # half a second to load

    ranks, positives = rankdata(scores), int(clicked.sum())
    negatives = len(scores) - positives
    below = (ranks[clicked] - rankdata(scores[clicked])) / max(negatives, 1)
    above = 1 - (ranks[~clicked] - rankdata(scores[~clicked])) / max(positives, 1)
    return below, above


@dataclass(frozen=True)
class Trained:
    """A retrained model as the choice sees it: ``logits [N]`` of the validation split, and the size of its tables."""

    name: str
    size: int
    logits: np.ndarray
    unit: str = "parameters"


def choose_of(trained: Sequence[Trained], labels: np.ndarray, metric: str) -> dict[str, Any]:
    """:func:`choose` between the found model, the first one, and the best uniform one of the others by ``metric``."""
    found, *uniform = trained
    measured = auc if metric == "auc" and len(np.unique(labels > 0.5)) == 2 else _less_loss
    final = choose(found, max(uniform, key=lambda m: measured(m.logits, labels)), labels, metric)
    return final | {"size": {m.name: m.size for m in trained}}


def _less_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return paired_logloss(logits, np.zeros_like(logits), labels)[0]


def choose(found: Trained, uniform: Trained, labels: np.ndarray, metric: str) -> dict[str, Any]:
    """Keep the found model or fall back to the uniform one, by validation rows.

    The better one by more than a standard error is kept; of two that are level, the smaller one.

    Args:
        metric: ``auc`` or ``logloss``, as early stopping has it.

    Returns:
        What ``final.json`` says: ``name``, ``fallback``, ``reason`` in words, and the figures.
    """
    if len(np.unique(labels > 0.5)) < 2:
        metric = "logloss"  # AUC is undefined
    gain, error = (paired_auc if metric == "auc" else paired_logloss)(found.logits, uniform.logits, labels)
    level = abs(gain) <= error
    kept = min(found, uniform, key=lambda m: m.size) if level else found if gain > 0 else uniform
    what = "AUC" if metric == "auc" else "logloss saved"
    figures = f"{gain:+.5f} validation {what}, standard error {error:.5f}"
    beside = f"{found.name} ({found.size:,} {found.unit}) against {uniform.name} ({uniform.size:,})"
    if level:
        reason = f"{beside}: {figures}: level, so the smaller one"
    elif kept is found:
        reason = f"{beside}: {figures}: the found widths are better"
    else:
        reason = f"{beside}: {figures}: the found widths are worse, so the uniform width takes their place"
    return {
        "name": kept.name,
        "fallback": kept is uniform,
        "reason": f"{reason}. {kept.name} is the final model",
        "split": "validation",
        "metric": metric,
        "difference": gain,
        "standard_error": error,
        "size": {m.name: m.size for m in (found, uniform)},
        "unit": found.unit,
    }
