"""Found widths against uniform ones: which to train beside them, and which of two trained models to keep."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.methods.found import budget_of
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.metrics import auc
from embsearch_dist.train.retrain import SubnetTask

LEAST_ROWS = 10
"""Of each class, for AUC to be compared. Its standard error comes from a variance over the rows of the rarer class, and
of few rows that is too small too often: of models that do not differ 48% lie apart by more than one standard error with
two clicks, 39% with five, 34% with ten (32% is right), and by more than two 27%, 12% and 8% (5% is right)."""
LOWER = "lower --optim.embedding_lr and --optim.dense_lr, or look at the dense columns of the data"


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
    """AUC of logits ``a [N]`` minus that of ``b``, and its standard error on the same rows (DeLong et al. 1988).

    The error is infinite where a class has fewer than :data:`LEAST_ROWS` rows, since so few do not tell it."""
    gain = auc(a, labels) - auc(b, labels)
    if rarer(labels) < LEAST_ROWS:
        return gain, float("inf")
    clicked = labels > 0.5
    placed = [_placements(x, clicked) for x in (a, b)]
    of_clicked, of_others = (placed[0][k] - placed[1][k] for k in range(2))
    variance = sum(float(d.var(ddof=1)) / len(d) for d in (of_clicked, of_others))
    return gain, variance**0.5


def rarer(labels: np.ndarray) -> int:
    """How many of ``labels [N]`` are of the rarer class."""
    clicks = int((labels > 0.5).sum())
    return min(clicks, len(labels) - clicks)


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

    @property
    def diverged(self) -> bool:
        """Whether a logit is not finite: no metric can speak for such a model."""
        return not bool(np.isfinite(self.logits).all())


@dataclass(frozen=True)
class Compared:
    """Two models on the same rows, by one metric after the other.

    Attributes:
        metrics: what was compared until they differed, of ``auc`` and ``logloss``.
        gains, errors: by how much the first model is better, and the standard error, for each of these.
        first: it is kept.
        size: they are level by every metric, so size decides.
        few: AUC was not compared: so many rows the rarer class has, which are too few for it; None: it could be.
        diverged: names of those of the two that have diverged; nothing was compared then.
    """

    metrics: tuple[str, ...]
    gains: tuple[float, ...]
    errors: tuple[float, ...]
    first: bool
    size: bool
    few: int | None = None
    diverged: tuple[str, ...] = ()

    def told(self) -> str:
        """The figures in words."""
        if self.diverged:
            return f"{' and '.join(self.diverged)} diverged"
        why = "" if self.few is None else f" (AUC needs {LEAST_ROWS} rows of each class, the rarer one has {self.few})"
        what = {"auc": "validation AUC", "logloss": "validation logloss saved"}
        parts = zip(self.metrics, self.gains, self.errors, strict=True)
        figures = [f"{gain:+.5f} {what[m]}, standard error {error:.5f}" for m, gain, error in parts]
        return "; level, ".join(figures) + why


def compare(a: Trained, b: Trained, labels: np.ndarray, metric: str, margin: float = 1.0) -> Compared:
    """Which of two models to keep, by their rows.

    The better one by ``metric``, by more than the margin. Of two that are level by it the better one by the other
    metric: AUC does not see that a model is too sure of itself, and logloss not how well it ranks. Of two that are
    level by both the smaller one; of equal size the better one by ``metric``. One that has diverged loses. Where a
    class has too few rows for AUC (:data:`LEAST_ROWS`) logloss alone is compared.

    Args:
        metric: ``auc`` or ``logloss``, as early stopping has it.
        margin: standard errors by which two models must differ, or they are level.
    """
    if lost := tuple(m.name for m in (a, b) if m.diverged):
        return Compared((), (), (), not a.diverged, False, None, lost)
    both = {"auc": paired_auc, "logloss": paired_logloss}
    order = [metric, *(name for name in both if name != metric)]
    count = rarer(labels)
    few = count if count < LEAST_ROWS else None
    if few is not None:
        order = ["logloss"]
    gains: list[float] = []
    errors: list[float] = []
    for name in order:
        gain, error = both[name](a.logits, b.logits, labels)
        gains, errors = [*gains, gain], [*errors, error]
        if abs(gain) > margin * error:
            return Compared(tuple(order[: len(gains)]), tuple(gains), tuple(errors), gain > 0, False, few)
    first = a.size < b.size if a.size != b.size else gains[0] >= 0  # the first one where they are the same
    return Compared(tuple(order), tuple(gains), tuple(errors), first, True, few)


def choose_of(
    found: Trained, uniform: Sequence[Trained], labels: np.ndarray, metric: str, alike: bool = False
) -> dict[str, Any]:
    """:func:`choose` between the found model and the best uniform one."""
    best = functools.reduce(lambda a, b: a if compare(a, b, labels, metric).first else b, uniform)
    return choose(found, best, labels, metric, alike)


def choose(found: Trained, uniform: Trained, labels: np.ndarray, metric: str, alike: bool = False) -> dict[str, Any]:
    """Keep the found model or fall back to the uniform one, by validation rows: see :func:`compare`.

    Args:
        alike: both have the same widths; the found model began with the widest one, the other with fresh weights.

    Returns:
        What ``final.json`` says: ``name``, ``fallback``, ``reason`` in words, and the figures of the metric that
        decided (of the first one where size did; none where one of them has diverged).

    Raises:
        UserError: both have diverged.
    """
    result = compare(found, uniform, labels, metric)
    if len(result.diverged) == 2:
        raise UserError(
            f"{found.name} and {uniform.name} have both diverged, so there is no model to keep: {LOWER}",
            everywhere=True,
        )
    kept = found if result.first else uniform
    figures = f"{found.name} ({found.size:,} {found.unit}) against {uniform.name} ({uniform.size:,}): {result.told()}"
    if result.diverged:
        reason = figures
    elif result.size:
        why = "the smaller one" if found.size != uniform.size else f"{kept.name}, of one size"
        reason = f"{figures}: level, so {why}"
    elif alike:
        began = "the widest model" if kept is found else "fresh weights"
        reason = f"{figures}: both have the uniform width of the budget, which is better begun with {began}"
    elif kept is found:
        reason = f"{figures}: the found widths are better"
    else:
        reason = f"{figures}: the found widths are worse, so the uniform width takes their place"
    decided = 0 if result.size else -1
    measured = (
        {}
        if result.diverged
        else {
            "metric": result.metrics[decided],
            "difference": result.gains[decided],
            "standard_error": result.errors[decided],
        }
    )
    return {
        "name": kept.name,
        "fallback": kept is uniform,
        "reason": f"{reason}. {kept.name} is the final model",
        "split": "validation",
        **measured,
        "size": {m.name: m.size for m in (found, uniform)},
        "unit": found.unit,
    }
