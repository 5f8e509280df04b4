"""Exact figures over all rows of all ranks: AUC and logloss, and on request what :mod:`.measures` adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from embsearch_dist.config.options import one_of
from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema
from embsearch_dist.train.measures import areas_by_group, normalised_entropy, pack, reliability

if TYPE_CHECKING:
    from embsearch_dist.data.load.batch import Batch  # with TorchRec, which who scores rows alone does not need

METRICS = ("auc", "logloss", "accuracy")
BINS = 1 << 16  # of :func:`binned_auc`: 1024 to a unit of the logit, which is clamped to 32 on both sides
SCORED_AT_A_TIME = 1 << 24  # logits that :func:`score_many` has in hand at a time: 128 MiB of places in the bins
PIECE_ROWS = 1 << 22  # predictions that stay on the device at most: 32 MB


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted as one half (the Mann-Whitney statistic).

    Args:
        scores: ``[N]`` any order-preserving score (a logit will do).
        labels: ``[N]`` 0 or 1.

    Returns:
        The area; NaN when only one class is present, or a score is not a number.
    """
    if np.isnan(scores).any():
        return float("nan")
    packed = pack(scores, labels)
    packed.sort()
    return _area(packed)


def _area(packed: np.ndarray) -> float:
    """:func:`auc` of rows that are packed and sorted."""
    positive = (packed & 1).astype(bool)
    places = np.flatnonzero(positive)
    positives, negatives = len(places), len(packed) - len(places)
    if positives == 0 or negatives == 0:
        return float("nan")
    # Negatives before each positive, those of its own score included; of these one half is taken back.
    below = int(places.sum()) - positives * (positives - 1) // 2
    return (below - 0.5 * _tied_pairs(packed >> 1, positive)) / (positives * negatives)


def _tied_pairs(scores: np.ndarray, positive: np.ndarray) -> int:
    """Pairs of a positive and a negative with the same score; ``scores`` ascending."""
    same = scores[1:] == scores[:-1]
    if not same.any():
        return 0
    # Ties are rare: only the rows in one are looked at again.
    tied = np.flatnonzero(np.concatenate((same, [False])) | np.concatenate(([False], same)))
    scores, positive = scores[tied], positive[tied]
    starts = np.flatnonzero(np.concatenate(([True], scores[1:] != scores[:-1])))
    of_group = np.add.reduceat(positive.astype(np.int64), starts)
    sizes = np.diff(np.append(starts, len(scores)))
    return int((of_group * (sizes - of_group)).sum())


def binned_auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """:func:`auc` without a sort, for comparing many models: logits in the same 1/1024, or beyond 32, count as tied.

    On 100,000 rows it is within 1e-5 of the exact area, since order inside so narrow a bin is chance.
    """
    if np.isnan(logits).any():
        return float("nan")
    place = np.clip(logits * np.float32(1024) + np.float32(BINS / 2), 0, BINS - 1).astype(np.int32)
    place += (labels > 0.5).astype(np.int32) * BINS
    counts = np.bincount(place, minlength=2 * BINS)
    negatives, positives = counts[:BINS], counts[BINS:]
    total = int(negatives.sum()) * int(positives.sum())
    if total == 0:
        return float("nan")
    below = negatives.cumsum() - negatives
    return float((positives * (2 * below + negatives)).sum()) / (2 * total)


def logloss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross-entropy of ``[N]`` logits, in nats; the rows' losses are added in double precision."""
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return float(losses.sum(dtype=torch.float64)) / len(losses)


def binned_counts(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many rows of each class lie in each bin of :func:`binned_auc`, for many models.

    Nothing here waits for the device. ``bincount`` would, to learn how many bins there are.

    Args:
        logits: ``[K, N]`` float32, a row for each model.
        labels: ``[N]`` 0 or 1, on the same device.

    Returns:
        ``[K, 2, BINS]`` int64, negatives before positives.
    """
    counts = torch.zeros(len(logits), 2 * BINS, dtype=torch.int64, device=logits.device)
    place = (logits * 1024 + BINS / 2).clamp_(0, BINS - 1).nan_to_num_(0).long()
    place += (labels > 0.5).long() * BINS
    return counts.scatter_add_(1, place, place.new_ones(()).expand_as(place)).view(-1, 2, BINS)


def score_many(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """:func:`score` of many models on one sample, where the logits lie, without waiting for the device.

    Args:
        logits: ``[K, N]`` float32, a row for each model.
        labels: ``[N]`` 0 or 1, on the same device.

    Returns:
        ``[K, 3]`` float64, :data:`METRICS`: AUC (that of :func:`binned_auc`, exactly; NaN when only one class is
        present, or where the logloss is not a number), logloss in nats and accuracy.
    """
    at_a_time = max(1, SCORED_AT_A_TIME // max(1, logits.shape[1]))
    return torch.cat([_score_some(some, labels) for some in logits.split(at_a_time)])


def _score_some(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    negatives, positives = binned_counts(logits, labels).unbind(1)
    below = negatives.cumsum(1) - negatives
    pairs = negatives.sum(1) * positives.sum(1)
    area = (positives * (2 * below + negatives)).sum(1) / (2 * pairs).double()
    losses = functional.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none")
    right = (logits > 0) == (labels > 0.5)
    means = [x.sum(1, dtype=torch.float64) / logits.shape[1] for x in (losses, right)]
    return torch.stack([area.where(~means[0].isnan(), math.nan), *means], 1)


def evaluate(
    predict: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], context: Context, group: str = ""
) -> dict[str, float]:
    """Run ``predict`` (batch -> logits ``[B]``) over the batches; metrics over all ranks, on every rank.

    Returns:
        ``auc``, ``logloss``, ``accuracy``, ``rows``, ``ne``, ``calibration`` and ``ece``; with ``group``, the name of a
        field, ``group_auc`` and its ``group_count`` and ``group_share`` too (:func:`figures`). NaN where undefined.
    """
    return figures(predictions(predict, batches, context, group))


@dataclass(frozen=True)
class Predictions:
    """One pass over a split: all rows of all ranks, on every rank.

    Attributes:
        logits, labels: ``[N]`` float32 on the CPU.
        groups: ``[N]`` int32 ids of a field; None where no field was asked for.
        sizes: rows of each of this rank's batches, while the rows stand rank by rank; None once they are in stored
            order.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor | None
    sizes: Sequence[int] | None

    def in_stored_order(self, context: Context) -> Predictions:
        """The rows as they are stored, whatever the number of ranks and the batch size; all ranks call it."""
        if self.sizes is None:
            return self
        places = torch.from_numpy(stored_places(context.every(list(self.sizes))))
        logits, labels, groups = (
            None if x is None else torch.empty_like(x).index_copy_(0, places, x)
            for x in (self.logits, self.labels, self.groups)
        )
        assert logits is not None and labels is not None
        return replace(self, logits=logits, labels=labels, groups=groups, sizes=None)


def stored_places(sizes: Sequence[Sequence[int]]) -> np.ndarray:
    """Where rows gathered rank by rank stand in the stored order, in which every batch holds rank after rank.

    Args:
        sizes: of the batches, ``[ranks][batches]``.
    """
    counts = np.asarray(sizes, np.int64)
    ends = counts.T.reshape(-1).cumsum().reshape(counts.T.shape).T
    starts = (ends - counts).reshape(-1)
    return np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts.reshape(-1))] or [np.zeros(0, np.int64)])


@torch.no_grad()
def predictions(
    predict: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], context: Context, group: str = ""
) -> Predictions:
    """Predict the batches of all ranks.

    ``group``: a field with one id a row (:func:`check_group`) whose ids are kept beside; empty: none.
    """
    logits, labels, groups, sizes = _own_predictions(predict, batches, context.device, group)
    if context.world_size > 1:
        logits, labels = (context.gather(own.to(context.device)).cpu() for own in (logits, labels))
        groups = None if groups is None else context.gather(groups.to(context.device)).cpu()
    return Predictions(logits, labels, groups, sizes)


def figures(found: Predictions) -> dict[str, float]:
    """:func:`score` and, of one sort, what :mod:`embsearch_dist.train.measures` says of the probabilities; by group too
    where groups are known: ``group_auc`` (mean weighed by rows), ``group_count`` (groups with both classes) and
    ``group_share`` (of all rows, theirs). NaN where undefined: an order of rows says nothing once a logit is not
    finite."""
    packed = pack(found.logits.numpy(), found.labels.numpy())
    packed.sort()
    told = score(found.logits, found.labels, lambda *_: _area(packed))
    curve = reliability(packed)
    rate = float((packed & 1).sum()) / len(packed) if len(packed) else math.nan
    told |= {
        "ne": normalised_entropy(told["logloss"], rate),
        "calibration": curve.calibration,
        "ece": curve.error,
    }
    if found.groups is not None:
        del packed
        areas = areas_by_group(found.logits.numpy(), found.labels.numpy(), found.groups.numpy())
        told |= {"group_auc": math.nan if math.isnan(told["auc"]) else areas.mean}  # of one class neither is defined
        told |= {"group_count": float(len(areas.rows)), "group_share": areas.share}
    return told


def check_group(schema: Schema, group: str) -> None:
    """Raises:
    UserError: ``group`` is named and is no field with one id a row.
    """
    if not group:
        return
    if group in schema.dense:
        raise UserError(f"config key train.group: {group!r} is a dense column. AUC by group needs a categorical field")
    one_of("train.group", group, schema.names)
    if schema.fields[schema.names.index(group)].is_list:
        raise UserError(
            f"config key train.group: {group!r} is a list, so a row would be in several groups. Name a field with one "
            "value a row"
        )


def shown(value: float | None, digits: int = 5) -> str:
    """A metric for people; a dash where it is undefined."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def area_of(metrics: dict[str, float], split: str) -> dict[str, Any]:
    """``auc`` for a result file: null, and why, where it is undefined."""
    if not math.isnan(metrics["auc"]):
        return {"auc": metrics["auc"]}
    if not math.isfinite(metrics["logloss"]):
        return {"auc": None, "auc_undefined": f"a prediction of the {split} split is not a finite number"}
    return {"auc": None, "auc_undefined": f"the {split} split has rows of one class only"}


def _own_predictions(
    predict: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], device: torch.device, group: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int]]:
    """Logits, labels and groups ``[N]`` of this rank's rows, on CPU, and the batches' sizes. They are collected on the
    device and brought in large pieces: a copy per batch would make the device wait for the host in each."""
    there: list[torch.Tensor] = []
    pieces, rows = [torch.zeros(3 if group else 2, 0)], 0
    sizes: list[int] = []
    for batch in batches:
        batch = batch.to(device)
        columns = [predict(batch).float(), batch.label]
        if group:
            # The bits of the ids, so that one copy brings all: they are never computed with as floats.
            columns.append(batch.sparse[group].values().int().view(torch.float32))
        there.append(torch.stack(columns))  # a view would keep the whole batch there
        rows += batch.size
        sizes.append(batch.size)
        if rows >= PIECE_ROWS:
            pieces.append(torch.cat(there, 1).cpu())
            there, rows = [], 0
    if there:
        pieces.append(torch.cat(there, 1).cpu())
    logits, labels, *groups = torch.cat(pieces, 1)
    return logits, labels, groups[0].view(torch.int32) if groups else None, sizes


def score(
    logits: torch.Tensor,
    labels: torch.Tensor,
    area: Callable[[np.ndarray, np.ndarray], float] = auc,
) -> dict[str, float]:
    """AUC (by ``area``; NaN where a logit is not finite), logloss and accuracy of ``[N]`` logits."""
    return {
        "auc": area(logits.numpy(), labels.numpy()) if bool(torch.isfinite(logits).all()) else math.nan,
        "logloss": logloss(logits, labels),
        "accuracy": float(((logits > 0) == (labels > 0.5)).double().mean()),
        "rows": float(len(labels)),
    }


def beside_click_rate(schema: Schema, logloss: float) -> str:
    """A note where a validation logloss is above that of the click rate alone; empty where it is not, or unknown."""
    means = schema.provenance.get("label_mean")
    rate = means.get("validation") if isinstance(means, dict) else None
    if not isinstance(rate, float) or not 0 < rate < 1:
        return ""
    base = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    if logloss <= base:
        return ""
    return (
        f"note: the best checkpoint by AUC has logloss {logloss:.5f}, the click rate {rate:.4f} alone has {base:.5f}: "
        "it orders rows, but its probabilities are off. --train.metric logloss selects by them; a lower learning rate "
        "or more data may help both"
    )
